"""Blocks whose weights accelerate has offloaded to CPU memory or to disk, or placed on several devices.

Accelerate's hooks put the weights of a layer on a device when the layer is called, and drop them afterwards, together
with everything that was written into them. `resident_through_hooks` keeps them for longer, and writes what changed to
the place where the hooks read it.
"""

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    named_module_tensors,
    offload_weight,
    save_offload_index,
    set_module_tensor_to_device,
)
from torch import Tensor, nn


# Modules whose weights are loaded by the hook of a module around them, and that module. See `note_loaders`.
_loaders: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]" = weakref.WeakKeyDictionary()


def note_loaders(model: nn.Module) -> None:
    """Note which modules of `model` have their weights loaded with those of a module around them.

    These are the modules below one of accelerate's `preload_module_classes`, whose hook places all weights in it.
    """
    for loader in model.modules():
        if any(hook.offload and hook.place_submodules for hook in _hooks_of(loader)):
            _loaders.update({module: weakref.ref(loader) for module in loader.modules() if module is not loader})


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate loads the weights of `module` when it or one around it is called, and drops them."""
    return any(hook.offload for hook in _hooks_of(_loader_of(module)))


def has_hooks(block: nn.Module) -> bool:
    """Return whether hooks of accelerate place the weights or the inputs of `block` or of a module in it."""
    return any(_hooks_of(module) for module in (_loader_of(block), *block.modules()))


def execution_device(model: nn.Module) -> torch.device:
    """Return the device on which `model` takes its inputs, also if all its weights are offloaded.

    Raises:
        ValueError: all weights are on the meta device, and no hook loads them.
    """
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    for module in model.modules():
        for hook in _hooks_of(module):
            if hook.offload and hook.execution_device is not None:
                return _as_device(hook.execution_device)
    raise ValueError("Expected a model with weights in memory or offloaded by accelerate, got one on the meta device.")


@contextlib.contextmanager
def resident_through_hooks(block: nn.Module, device: torch.device | str | None = None) -> Iterator[None]:
    """Hold all weights of `block` in memory within the context, although hooks of accelerate place them.

    Offloaded weights are loaded from where the hooks read them, and written back there if they were changed: into the
    tensors that are held in CPU memory, or into the folder of offloaded weights. A file of a checkpoint is not
    written: a weight that was read from one is written to the folder, or to a temporary one if there is none.

    Args:
        block: a module with hooks of accelerate.
        device: where the block is held and computes. None takes the device on which each of its layers computes.
    """
    # A module around this one may run now, and has loaded the weights then.
    around = [_loader_of(block)] if any(parameter.is_meta for parameter in block.parameters()) else []
    modules = dict.fromkeys((*around, *block.modules()))
    hooks = [(module, hook) for module in modules for hook in _hooks_of(module)]
    loaded = [_Loaded(module, hook) for module, hook in hooks if hook.offload]
    if device is None and not loaded:
        yield
        return
    computes = [(hook, hook.execution_device) for _, hook in hooks]
    homes = [] if device is None else _homes(block)
    try:
        if device is not None:
            for _, hook in hooks:
                hook.execution_device = device
            for module, name, _ in homes:
                set_module_tensor_to_device(module, name, device)
        for layer in loaded:
            layer.load()
        yield
    finally:
        # A layer that has two places in the model has a hook for each. Both read it before the first one drops it.
        for layer in loaded:
            layer.keep()
        for layer in loaded:
            layer.drop()
        for module, name, home in homes:
            set_module_tensor_to_device(module, name, home)
        for hook, before in computes:
            hook.execution_device = before


@contextlib.contextmanager
def loaded_layer(layer: nn.Module) -> Iterator[None]:
    """Hold the weights of one layer in memory within the context, if they are offloaded."""
    with resident_through_hooks(layer) if is_offloaded(layer) else contextlib.nullcontext():
        yield


@dataclass
class _Loaded:
    """A module whose weights are in memory although its hook offloads them."""

    module: nn.Module
    hook: AlignDevicesHook
    is_loaded: bool = False

    def load(self) -> None:
        self.hook.pre_forward(self.module)
        # The hook would load the weights again in each forward.
        self.hook.offload = False
        self.is_loaded = True

    def keep(self) -> None:
        """Write what was changed to the place where the hook reads it."""
        for name, tensor in self._tensors() if self.is_loaded else ():
            write_back(self.hook.weights_map, name, tensor.detach())

    def drop(self) -> None:
        if not self.is_loaded:
            return
        self.hook.offload = True
        self.hook.post_forward(self.module, None)
        self.is_loaded = False

    def _tensors(self) -> list[tuple[str, Tensor]]:
        found = named_module_tensors(
            self.module,
            include_buffers=self.hook.offload_buffers,
            recurse=self.hook.place_submodules,
            remove_non_persistent=True,
        )
        return list(found)


@torch.no_grad()
def write_back(weights: Mapping[str, Tensor], name: str, value: Tensor) -> None:
    """Replace the tensor `name` in what a hook of accelerate reads, if `value` is another."""
    while isinstance(weights, PrefixedDataset):
        name, weights = f"{weights.prefix}{name}", weights.dataset
    stored = weights[name]
    if stored.data_ptr() == value.data_ptr():
        return
    if not isinstance(weights, OffloadedWeightsLoader) or name in weights.state_dict:
        stored.copy_(value)
        return
    value = value.to(stored.dtype)
    # A block is often loaded only to be run.
    if torch.equal(stored.to(value.device), value):
        return
    folder = _folder_of(weights)
    offload_weight(value, name, folder, index=weights.index)
    if os.path.isfile(os.path.join(folder, "index.json")):
        save_offload_index({name: weights.index[name]}, folder)


def _folder_of(weights: OffloadedWeightsLoader) -> str:
    if weights.save_folder is None:
        weights.save_folder = tempfile.mkdtemp(prefix="peft_sparse_offloaded_")
        weakref.finalize(weights, shutil.rmtree, weights.save_folder, ignore_errors=True)
    return str(weights.save_folder)


def _loader_of(module: nn.Module) -> nn.Module:
    """Return the module whose hooks load the weights of `module`: itself, or one around it."""
    noted = _loaders.get(module)
    loader = None if noted is None else noted()
    return module if loader is None or not _hooks_of(loader) else loader


def _hooks_of(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def _homes(block: nn.Module) -> list[tuple[nn.Module, str, torch.device]]:
    """Return the tensors of `block` that are in memory: (module, name in the module, device)."""
    return [
        (module, name, tensor.device)
        for module in block.modules()
        for name, tensor in named_module_tensors(module, recurse=False)
        if not tensor.is_meta
    ]


def _as_device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
