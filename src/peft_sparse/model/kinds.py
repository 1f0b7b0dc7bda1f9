"""How weights are stored, and why some of them cannot be pruned as they are.

A weight can be pruned if it is a floating-point parameter of its layer, in memory and whole. Others are computed from
other parameters, packed by a quantiser, split among processes, or not there. `obstacle` says which, and what to do.
`count_zeros` counts the zeros that the next forward pass would use, for every kind that can be read.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .cpu_packing import undo_cpu_packing
from .masks import count_kept
from .offload import is_offloaded, loaded_layer
from .own_forward import use_of_weight
from .sharding import is_partitioned, own_part, totals, whole_shape
from .tree import base_layer, is_prunable, walk
from .weights import PRUNABLE_LAYERS, WeightView, zero_counts


QUANTISED = "Prune the model before it is quantised: load it in floating point, prune and save it, then quantise."


def obstacle(weight: WeightView, loaded: bool = True) -> str | None:
    """Return why `weight` cannot be pruned as it is and what to do, as the rest of a sentence; None if it can be.

    Args:
        weight: the weight.
        loaded: whether it must be in memory. False is for a model on the meta device.
    """
    layer, name = weight.layer, weight.parameter
    stored = layer._parameters.get(name)
    if stored is None:
        return f"is computed from other parameters, so that pruning it would not last. {_undoing(layer, name)}"
    if _is_split(stored):
        return (
            "is split among processes. Prune the model before it is sharded, or with a `PruningCallback`, which "
            "gathers the weights."
        )
    if is_quantised(stored):
        return f"is quantised ({_kind_of(stored)}). {QUANTISED}"
    if stored.dtype.itemsize == 1 or not stored.is_floating_point():
        return (
            f"is {stored.dtype}, but pruning needs a floating-point type of 16 bits or more. Load or cast the weights "
            f"to bfloat16. {QUANTISED}"
        )
    if isinstance(stored, UninitializedParameter):
        return "has no entries yet. Run the model on a batch first, which makes them."
    if 0 in stored.shape:
        return f"has no entries: its shape is {tuple(stored.shape)}. Add it to `exclude_modules`."
    if stored.is_inference():
        return "was made within `torch.inference_mode`, and cannot be written. Load the model outside of it."
    if weight.expert is None and isinstance(layer, PRUNABLE_LAYERS) and use_of_weight(layer) == "lost":
        return (
            f"is changed by the forward of its layer, a {type(layer).__name__}, and its zeros with it. Add it to "
            "`exclude_modules`, or write what the layer computes into the weight of a plain layer."
        )
    if loaded and stored.is_meta and not is_offloaded(layer):
        return "is on the meta device, which holds no values. Load the model first, or use `prune_checkpoint`."
    return None


def _is_split(stored: Tensor) -> bool:
    """Return whether this process holds only a part of `stored` now. ZeRO-3 marks what it has gathered as well."""
    return isinstance(stored, DTensor) or (is_partitioned(stored) and whole_shape(stored) != stored.shape)


def computation(layer: nn.Module, parameter: str = "weight") -> str | None:
    """Return how to make a computed weight a parameter of its layer, as a sentence; None if it is one.

    Args:
        layer: the layer.
        parameter: the name of the weight.
    """
    computed = isinstance(getattr(layer, parameter, None), Tensor) and layer._parameters.get(parameter) is None
    return _undoing(layer, parameter) if computed and parameter not in layer._buffers else None


def is_quantised(stored: Tensor) -> bool:
    """Return whether a quantiser holds `stored` in a form of its own: packed, with scales, or as a tensor subclass."""
    if type(stored).__name__ == "Params4bit":
        return bool(getattr(stored, "bnb_quantized", True))
    packed = type(stored).__name__ == "Int8Params" and not stored.is_floating_point()
    return packed or type(stored).__module__.startswith("torchao.") or is_traceable_wrapper_subclass(stored)


def packed_layers(name: str, module: nn.Module) -> Iterator[str]:
    """Yield the names of layers below `module`, called `name`, whose weight is packed in tensors of integers.

    They are no layers of a kind that is pruned, and have parameters of integers, or buffers of integers and say how
    many inputs and outputs they have: those of GPTQ, AWQ and HQQ, for example.
    """
    for key, below in walk(name, module):
        layer: Any = base_layer(below)
        sizes = [getattr(layer, size, None) for size in ("in_features", "out_features")]
        buffers = layer.buffers(recurse=False) if all(type(size) is int for size in sizes) else ()
        passed_over = is_prunable(below) or isinstance(layer, nn.Embedding)
        if not passed_over and any(map(_is_packed, (*layer.parameters(recurse=False), *buffers))):
            yield key


def _is_packed(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and not tensor.is_floating_point() and tensor.dtype is not torch.bool


def count_zeros(weights: dict[str, WeightView]) -> tuple[int, int]:
    """Return (number of zeros, number of entries) of `weights`, as the next forward pass would compute them.

    If weights are split among processes, all processes must call this together.

    Raises:
        ValueError: a weight cannot be read: it is on the meta device, or packed in a way that PEFT cannot undo.
    """
    plain, sharded, apart = _by_kind(weights)
    counts = list(zero_counts(plain).values())
    parameters = list({id(weight.storage): weight.storage for weight in sharded.values()}.values())
    zeros = totals([(own_part(parameter) == 0).sum() for parameter in parameters], parameters) if parameters else []
    counts += [(count, whole_shape(parameter).numel()) for count, parameter in zip(zeros, parameters, strict=True)]
    by_layer: dict[int, dict[str, WeightView]] = {}
    for name, weight in apart.items():
        by_layer.setdefault(id(weight.layer), {})[name] = weight
    for views in by_layer.values():
        counts += _counts_of_layer(views)
    return sum(count for count, _ in counts), sum(entries for _, entries in counts)


def _by_kind(weights: dict[str, WeightView]) -> Iterable[dict[str, WeightView]]:
    """Return the weights that are plain, those that are split among processes, and all others."""
    kinds: tuple[dict[str, WeightView], ...] = ({}, {}, {})
    for name, weight in weights.items():
        stored = weight.layer._parameters.get(weight.parameter)
        if stored is not None and _is_split(stored):
            kinds[1][name] = weight
        elif obstacle(weight) is None:
            kinds[0][name] = weight
        else:
            kinds[2][name] = weight
    return kinds


@torch.no_grad()
def _counts_of_layer(views: dict[str, WeightView]) -> list[tuple[int, int]]:
    """Return (zeros, entries) of the weights of one layer, read through whatever holds them."""
    layer = next(iter(views.values())).layer
    counts = []
    with loaded_layer(layer):
        for name, weight in views.items():
            matrix = weight.matrix_of(_as_computed(name, layer, weight.parameter))
            counts.append((matrix.numel() - int(count_kept(matrix)), matrix.numel()))
    return counts


def _as_computed(name: str, layer: nn.Module, parameter: str) -> Tensor:
    """Return the weight as the next forward pass would compute it."""
    stored = layer._parameters.get(parameter)
    if stored is None:
        return _from_hooks(layer, parameter)
    if stored.is_meta:
        raise ValueError(f"The weight of {name!r} is on the meta device, which holds no values. Load the model first.")
    if is_quantised(stored):
        undo_cpu_packing(layer)
        values = dequantize_module_weight(layer)
        # Tensor subclasses that PEFT does not know have a method of this name; the one of torch is for other tensors.
        if values is stored and type(stored).dequantize is not Tensor.dequantize:
            values = stored.dequantize()
        if type(values) in (Tensor, nn.Parameter):
            return values
    elif stored.is_floating_point() and (stored.dtype.itemsize > 1 or torch.finfo(stored.dtype).bits == 8):
        return stored.float() if stored.dtype.itemsize == 1 else stored
    raise ValueError(
        f"The weight of {name!r} is packed as {_kind_of(stored)}, which cannot be read, so its zeros are unknown. "
        "Count the zeros before the model is quantised, or add it to `exclude_modules`."
    )


def _from_hooks(layer: nn.Module, parameter: str) -> Tensor:
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == parameter:
            return hook.apply_mask(layer)
        if getattr(hook, "name", None) == parameter and hasattr(hook, "compute_weight"):
            # Only spectral_norm has power iterations, which would change its state.
            still = (False,) if hasattr(hook, "n_power_iterations") else ()
            return hook.compute_weight(layer, *still)
    return getattr(layer, parameter)


def _undoing(layer: nn.Module, parameter: str) -> str:
    """Return the call that makes a computed weight a parameter again, as a sentence."""
    if parametrize.is_parametrized(layer, parameter):
        steps: Any = layer.parametrizations
        if any(type(step).__module__.startswith("torch.ao.pruning") for step in steps[parameter]):
            return "Call the sparsifier's `squash_mask()` first, which writes its zeros into the weight."
        return f'Call `torch.nn.utils.parametrize.remove_parametrizations(layer, "{parameter}")` first.'
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == parameter:
            return f'Call `torch.nn.utils.prune.remove(layer, "{parameter}")` first, which writes its zeros.'
        if getattr(hook, "name", None) == parameter and hasattr(hook, "compute_weight"):
            spectral = hasattr(hook, "n_power_iterations")
            return f"Call `torch.nn.utils.remove_{'spectral' if spectral else 'weight'}_norm(layer)` first."
    return f"Make `{parameter}` an `nn.Parameter` of the layer, or add the layer to `exclude_modules`."


def _kind_of(stored: Tensor) -> str:
    named = type(stored).__name__
    return str(stored.dtype) if named in ("Tensor", "Parameter") else f"{named} of {stored.dtype}"
