"""Merging adapters of a model that several processes hold in parts, one layer at a time."""

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
    """Return the state of the base model with the active adapters folded in, on the CPU, by the base model's names.

    The model stays as it is. One layer's weights at a time are gathered, which all processes must do together.

    Args:
        merge: fold the adapters in, or leave them away.
        keep: whether this process wants the state, or only takes part in gathering.

    Raises:
        TypeError: a quantised base, or adapters of another package.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, module in _layers(base_model(model)):
        layer, adapters = _unwrapped(name, module)
        known = {key: id(tensor) for key, tensor in _saved(layer)}
        with whole(module, recurse=bool(adapters)):
            for key, tensor in _saved(layer) if keep else ():
                value = adapters[key].merged_stored() if merge and key in adapters else tensor
                # Tied weights stay one tensor, which saving recognises.
                state[f"{name}.{key}" if name else key] = copies.setdefault(known[key], value.detach().cpu().clone())
    return state


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with the name it has without adapters: tuner layers whole, of wrappers what they use."""
    if isinstance(module, ModulesToSaveWrapper):
        module = active_copy(module)
    yield name, module
    inside = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    for key, child in inside.named_children():
        yield from _layers(child, f"{name}.{key}" if name else key)


def _unwrapped(name: str, module: nn.Module) -> tuple[nn.Module, dict[str, SparseLoraLayer]]:
    """Return the layer inside `module`, and the adapters around it by the parameter they change."""
    adapters: dict[str, SparseLoraLayer] = {}
    while isinstance(module, BaseTunerLayer):
        key = getattr(module, "parameter_name", "weight")
        if not isinstance(module, SparseLoraLayer) or module.quantization_backend is not None or key in adapters:
            raise TypeError(
                f"Expected one MaskLoRA or ScaledLoRA adapter on a plain layer, got {type(module).__name__} at "
                f"{name!r}. Call `merge_and_unload()` in one process."
            )
        adapters[key] = module
        module = module.base_layer
    return module, adapters


def _saved(layer: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = [(key, value) for key, value in layer._buffers.items() if key not in layer._non_persistent_buffers_set]
    return [(key, value) for key, value in [*layer._parameters.items(), *buffers] if value is not None]
