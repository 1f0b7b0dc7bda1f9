"""Merge the adapters of a model into a new state dict, for models whose weights are sharded over processes.

`SparseTrainer` saves merged models with it.
"""

from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..model.blocks import active_copy, base_model
from ..model.sharding import whole
from .layer import SparseLoraLayer


@torch.no_grad()
def merged_state_dict(model: nn.Module, *, merge: bool = True, keep: bool = True) -> dict[str, Tensor]:
    """Return the state dict of the base model with the active adapters merged. The model stays as it is.

    Sharded weights are gathered one layer at a time, so all processes must call the function together. Every zero of
    the base weights stays zero.

    Args:
        model: the model with MaskLoRA or ScaledLoRA adapters.
        merge: True merges the active adapters. False returns the base weights as the model holds them, so adapters
            that are merged already stay in them.
        keep: whether this process receives the tensors. Every process must call the function. A process that passes
            False takes part in the gathering and receives an empty dictionary.

    Returns:
        The tensors on the CPU, by the names they have in the base model. Tied weights are one tensor.

    Raises:
        TypeError: an adapted layer is quantised, has an adapter of another method, or has two wrappers around the same
            parameter.
        ValueError: a saved mask contradicts the zeros of the base weight.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, module in _layers(base_model(model)):
        layer, adapters = _unwrapped(name, module)
        known = {key: id(tensor) for key, tensor in _saved(layer)}
        with whole(module, recurse=bool(adapters)):
            for key, tensor in _saved(layer) if keep else ():
                value = adapters[key].merged_stored() if merge and key in adapters else tensor
                # One copy for tied weights, because `save_pretrained` recognises ties by their memory.
                state[f"{name}.{key}" if name else key] = copies.setdefault(known[key], value.detach().cpu().clone())
    return state


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that holds weights, with its name in the base model. Tuner layers are not unwrapped."""
    if isinstance(module, ModulesToSaveWrapper):
        module = active_copy(module)
    yield name, module
    inside = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    for key, child in inside.named_children():
        yield from _layers(child, f"{name}.{key}" if name else key)


def _unwrapped(name: str, module: nn.Module) -> tuple[nn.Module, dict[str, SparseLoraLayer]]:
    """Return the layer inside `module`, and the adapted layers around it by name of the parameter they adapt."""
    adapters: dict[str, SparseLoraLayer] = {}
    while isinstance(module, BaseTunerLayer):
        key = getattr(module, "parameter_name", "weight")
        if not isinstance(module, SparseLoraLayer) or module.quantization_backend is not None or key in adapters:
            raise TypeError(
                f"Expected one MaskLoRA or ScaledLoRA layer around a layer that is not quantised, got "
                f"{type(module).__name__} at {name!r}. Call `merge_and_unload()` in one process."
            )
        adapters[key] = module
        module = module.base_layer
    return module, adapters


def _saved(layer: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = [(key, value) for key, value in layer._buffers.items() if key not in layer._non_persistent_buffers_set]
    return [(key, value) for key, value in [*layer._parameters.items(), *buffers] if value is not None]
