"""One view of every prunable weight: a 2-D matrix whose rows are outputs and whose columns are inputs.

First link of the chain: no other module asks how a layer stores its weight.

| layer                 | stored as            | matrix              |
| --------------------- | -------------------- | ------------------- |
| `nn.Linear`           | (out, in)            | (out, in)           |
| transformers `Conv1D` | (in, out)            | (out, in)           |
| `nn.Conv2d`           | (out, in/groups, k, k) | (out, in/groups·k·k) |
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


PRUNABLE_LAYERS = (nn.Linear, Conv1D, nn.Conv2d)


def as_matrix(layer: nn.Module, stored: Tensor) -> Tensor:
    """Return `stored`, a tensor laid out as `layer.weight`, as a matrix (out, in).

    A view wherever the memory allows one: write through `as_stored`, never into the result.

    Raises:
        TypeError: the layer has no matrix view.
    """
    if isinstance(layer, Conv1D):
        return stored.T
    if isinstance(layer, nn.Conv2d):
        return stored.flatten(1)
    if isinstance(layer, nn.Linear):
        return stored
    raise TypeError(f"Expected one of {_names()}, got {type(layer).__name__}, whose weight has no matrix view.")


def as_stored(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Return `matrix` (out, in), be it a weight, a mask or an update, laid out as `layer.weight`.

    Inverse of `as_matrix`.
    """
    if isinstance(layer, Conv1D):
        return matrix.T
    if isinstance(layer, nn.Conv2d):
        return matrix.view(stored_weight(layer).shape)
    return matrix


def stored_weight(layer: nn.Module) -> Tensor:
    """Return the weight parameter of `layer`, as it is stored."""
    return cast(Tensor, layer.weight)


def weight_matrix(layer: nn.Module) -> Tensor:
    """Return the weight of `layer` as a detached matrix (out, in)."""
    return as_matrix(layer, stored_weight(layer).detach())


def write_zeros(layer: nn.Module, mask: Tensor) -> None:
    """Set the weight of `layer` to zero wherever `mask` (out, in) is False. In place."""
    with torch.no_grad():
        stored_weight(layer).masked_fill_(as_stored(layer, ~mask), 0)


def undo_cpu_packing(layer: nn.Module) -> None:
    """Keep a bitsandbytes 4-bit layer in the layout that can be dequantised.

    On CPUs with AVX512-BF16 it repacks its weight when it first runs without gradients, and what it repacked
    dequantises to noise.
    """
    if not getattr(layer, "support_avx512bf16_for_cpu", False):
        return
    packed: Any = layer
    packed.support_avx512bf16_for_cpu = False
    weight = packed.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
        if not state.nested:
            # The inverse leaves single scales transposed.
            state.absmax = state.absmax.T.reshape(-1).float()
        weight.quant_state = state


def _names() -> str:
    return ", ".join(f"`{cls.__name__}`" for cls in PRUNABLE_LAYERS)
