"""Walks the tree of modules, and sees through what wraps a module: PEFT's layers, DDP and `torch.compile`."""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from accelerate.utils import extract_model_from_parallel, is_compiled_module
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .weights import PRUNABLE_LAYERS


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of PEFT, DDP and `torch.compile`."""
    # Accelerate asks the installed packages each time, which takes as long as a small block runs.
    if hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    while isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        model = model.model if isinstance(model, BaseTuner) else model.base_model
    return model


def has_adapters(model: nn.Module) -> bool:
    """Return whether `model` has adapters, however they were attached.

    `get_peft_model`, transformers' `add_adapter` and `peft.inject_adapter_in_model` all put tuner layers into the tree
    of modules. Prompt learning puts none there: its adapters are found by the class of the model.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper, PeftModel, PeftMixedModel)
    return any(isinstance(module, kinds) for module in model.modules())


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch all adapters of `model` off within the context, however they were attached.

    After the context, every `requires_grad`, every active adapter and every adapter that was off before is as it was.
    """
    layers = _with_switches(model)
    put_back = adapter_switches(model)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_model: Any = next((m for m in model.modules() if isinstance(m, (PeftModel, PeftMixedModel))), None)
    try:
        with contextlib.ExitStack() as stack:
            if peft_model is not None:
                with warnings.catch_warnings():
                    # Who switches adapters off wants the base weights. Trained biases and irregular states are kept.
                    warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
                    warnings.filterwarnings("ignore", message="The model contains some adapter layers")
                    # PEFT's own switch also knows prompt learning.
                    stack.enter_context(peft_model.disable_adapter())
            for layer in layers:
                layer.enable_adapters(False)
            yield
    finally:
        # PEFT's switch turns on all adapters, and trains them.
        put_back()
        for parameter, flag in trained:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def adapter_switches(model: nn.Module) -> Callable[[], None]:
    """Return a function that makes those adapters active, and switches those off, that are so now."""
    before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in _with_switches(model)]

    def put_back() -> None:
        for layer, disabled, active in before:
            layer._disable_adapters, layer._active_adapter = disabled, active

    return put_back


def _with_switches(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def loaded_from(model: nn.Module) -> str | None:
    """Return the name or folder from which the base model was loaded, as its configuration tells it."""
    return getattr(getattr(base_model(model), "config", None), "_name_or_path", None)


def is_hub_name(name: str | None) -> bool:
    """Return whether `name` can be that of a model on the Hub. A folder that exists is none."""
    return bool(name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)) and not os.path.isdir(str(name))


def without_adapters(model: nn.Module) -> nn.Module:
    """Take all adapters out of `model`, without merging them, and return the base model. In place."""
    base: Any = base_model(model)
    for module in base.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            module.unmerge()
    base = _take_out(base)
    if hasattr(base, "peft_config"):
        del base.peft_config
    # Transformers notes here that `add_adapter` was called.
    if getattr(base, "_hf_peft_config_loaded", False):
        base._hf_peft_config_loaded = False
    return base


def _take_out(module: nn.Module) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = cast(nn.Module, module.original_module)
    for name, child in list(module.named_children()):
        plain = _take_out(child)
        if plain is not child:
            setattr(module, name, plain)
    return module


def base_layer(module: nn.Module) -> nn.Module:
    """Return the layer that holds the weight: the base layer of a PEFT tuner layer, or `module` itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def active_copy(wrapper: ModulesToSaveWrapper) -> nn.Module:
    """Return the copy of a module in `modules_to_save` that the active adapter trains, or the original module."""
    copies = [wrapper.modules_to_save[name] for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return copies[0] if copies else wrapper.original_module


def called_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the module that is called to run each layer, by the layer's id: its PEFT wrapper, or the layer itself."""
    called: dict[int, nn.Module] = {}
    for module in base_model(model).modules():
        called.setdefault(id(base_layer(module)), module)
    return called


def layers_of_weights(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the layers that have a parameter as their weight, by the parameter's id: several if they share it."""
    layers: dict[int, list[nn.Module]] = {}
    for module in base_model(model).modules():
        stored = module._parameters.get("weight")
        if stored is not None and isinstance(module, PRUNABLE_LAYERS):
            layers.setdefault(id(stored), []).append(module)
    return layers


def holders(blocks: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Return the names of the blocks that hold a module or a parameter, by its id. Those that share it are several."""
    names: dict[int, list[str]] = {}
    for name, block in blocks.items():
        for held in {id(part) for part in (*block.modules(), *block.parameters())}:
            names.setdefault(held, []).append(name)
    return names


def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield `module` and all modules below it, with the names they have without adapters and `torch.compile`.

    Modules that adapters add are left out, and so are parametrisations. Of a module in `modules_to_save`, the copy
    that runs is yielded.
    """
    module = unwrapped(module)
    yield name, module
    for child_name, child in children_of(name, module):
        yield from walk(child_name, child)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that runs inside a wrapper of `torch.compile` or of PEFT's `modules_to_save`."""
    if is_compiled_module(module):
        module = cast(nn.Module, module._orig_mod)
    if isinstance(module, ModulesToSaveWrapper) and not module.disable_adapters:
        return active_copy(module)
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def children_of(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children of `module`, unwrapped, with their full names; `name` is that of `module`."""
    layer = base_layer(module)
    # `torch.nn.utils.parametrize` keeps the modules that compute a weight under this name.
    skipped = "parametrizations" if nn.utils.parametrize.is_parametrized(layer) else None
    return [
        (f"{name}.{key}" if name else key, unwrapped(child)) for key, child in layer.named_children() if key != skipped
    ]


def is_prunable(module: nn.Module) -> bool:
    """Return whether `module` is a layer of a kind that is pruned, or a PEFT layer around one."""
    return isinstance(base_layer(module), PRUNABLE_LAYERS)


def holds_prunable(module: nn.Module) -> bool:
    """Return whether `module` is or contains a layer of a kind that is pruned."""
    return any(is_prunable(below) for _, below in walk("", module))


def is_norm(module: nn.Module) -> bool:
    """Return whether `module` is a normalisation layer.

    It is one if its class has "norm" in its name or is a batch normalisation of torch, if it has no children, and if
    it has a weight and no parameter of two or more dimensions.
    """
    if next(module.children(), None) is not None:
        return False
    parameters = dict(module.named_parameters(recurse=False))
    named_so = "norm" in type(module).__name__.lower() or isinstance(module, nn.modules.batchnorm._NormBase)
    return named_so and "weight" in parameters and all(p.dim() <= 1 for p in parameters.values())
