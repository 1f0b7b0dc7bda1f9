"""Shows every prunable weight as a matrix (out, in): its rows are outputs and its columns are inputs.

Other modules do not depend on how a layer stores its weight.

| layer                 | stored as            | matrix              |
| --------------------- | -------------------- | ------------------- |
| `nn.Linear`           | (out, in)            | (out, in)           |
| transformers `Conv1D` | (in, out)            | (out, in)           |
| `nn.Conv2d`           | (out, in/groups, k, k) | (out, in/groups·k·k) |
| fused experts         | (experts, out, in), or (experts, in, out) if `transposed` | (out, in) for each expert |
| stacked experts       | (experts · out, in), or (experts · in, out) if `transposed` | (out, in) for each expert |
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .masks import count_kept
from .offload import is_offloaded, loaded_layer


PRUNABLE_LAYERS = (nn.Linear, Conv1D, nn.Conv2d)
# The fraction of zeros up to which a model counts as dense. A dense model may have a few zeros by chance.
DENSE = 0.01


def as_matrix(layer: nn.Module, stored: Tensor) -> Tensor:
    """Return `stored` as a matrix (out, in).

    The result may be a view of `stored` or a copy, so do not write into it. `as_stored` is the way back.

    Args:
        layer: the layer that the tensor belongs to.
        stored: a tensor laid out as `layer.weight`.

    Raises:
        TypeError: `layer` is not one of `PRUNABLE_LAYERS`.
    """
    if isinstance(layer, Conv1D):
        return stored.T
    if isinstance(layer, nn.Conv2d):
        return stored.flatten(1)
    if isinstance(layer, nn.Linear):
        return stored
    raise TypeError(f"Expected one of {_names()}, got {type(layer).__name__}, whose weight has no matrix view.")


def as_stored(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Return `matrix` (out, in) laid out as `layer.weight`: the inverse of `as_matrix`.

    Args:
        layer: the layer that the matrix belongs to.
        matrix: a weight, a mask or an update, (out, in).
    """
    if isinstance(layer, Conv1D):
        return matrix.T
    if isinstance(layer, nn.Conv2d):
        return matrix.view(stored_weight(layer).shape)
    return matrix


def stored_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a layer as it is stored, which for transformers' `Conv1D` is (in, out)."""
    return cast(Tensor, layer.weight)


@dataclass(frozen=True)
class WeightView:
    """One prunable weight as a matrix (out, in): the weight of a layer, or of one fused expert.

    Args:
        layer: a layer of `PRUNABLE_LAYERS`, or the module that holds fused experts.
        parameter: name of the parameter in `layer`.
        expert: index of the expert in the parameter. None for a layer, whose parameter is one matrix.
        transposed: whether experts are stored as (experts, in, out). None asks the attribute `is_transposed` of
            `layer`; without one they are (experts, out, in).
        stacked: number of experts in a parameter (experts · ., .) of two dimensions. None if it has three.
    """

    layer: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool | None = None
    stacked: int | None = None

    @property
    def storage(self) -> Tensor:
        """The parameter that stores the weight. That of an expert also stores the weights of the other experts."""
        return cast(Tensor, getattr(self.layer, self.parameter))

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix().shape
        return rows, columns

    def matrix(self) -> Tensor:
        """Return the weight as a detached matrix (out, in). It may be a view or a copy: write with `write`."""
        return self.matrix_of(self.storage.detach())

    def matrix_of(self, stored: Tensor) -> Tensor:
        """Return this weight's part of `stored`, a tensor laid out as the parameter, as a matrix (out, in)."""
        if self.expert is None:
            return as_matrix(self.layer, stored)
        matrices = stored if self.stacked is None else stored.unflatten(0, (self.stacked, -1))
        transposed = getattr(self.layer, "is_transposed", False) if self.transposed is None else self.transposed
        return matrices[self.expert].T if transposed else matrices[self.expert]

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Replace the weight by `matrix` (out, in), which is cast to the dtype of the weight. In place."""
        if self.expert is None:
            self.storage.copy_(as_stored(self.layer, matrix))
        else:
            self.matrix().copy_(matrix)

    @torch.no_grad()
    def write_zeros(self, mask: Tensor) -> None:
        """Set the weight to zero wherever `mask` (out, in) is False. In place."""
        if self.expert is None:
            self.storage.masked_fill_(as_stored(self.layer, ~mask), 0)
        else:
            self.matrix().masked_fill_(~mask, 0)


def input_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the rows that the weight matrix of `layer` is multiplied with, (tokens, in).

    The rows of a linear layer are its inputs. The rows of a convolution are the patches of its inputs. If it has
    groups, each group of outputs has rows of its own: the result is then (groups, tokens, in).

    Args:
        layer: the layer.
        inputs: the inputs of its forward, (..., in), or (images, channels, height, width) of a convolution.
    """
    if not isinstance(layer, nn.Conv2d):
        return inputs.flatten(0, -2)
    inputs = inputs.reshape(-1, *inputs.shape[-3:])
    left, right, top, bottom = added = _padding(layer)
    is_plain = layer.padding_mode == "zeros" and (left, top) == (right, bottom)
    if not is_plain:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = nn.functional.pad(inputs, added, mode)
    padding = (top, left) if is_plain else 0
    return patches_of(inputs, layer.kernel_size, layer.dilation, padding, layer.stride, layer.groups)


def patches_of(
    inputs: Tensor,
    kernel_size: tuple[int, ...],
    dilation: Sequence[int],
    padding: int | tuple[int, ...],
    stride: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the patches of `inputs` that a convolution multiplies its kernel with, as `input_rows` returns them."""
    patches = nn.functional.unfold(inputs, kernel_size, tuple(dilation), padding, tuple(stride))
    if groups == 1:
        return patches.mT.flatten(0, 1)
    return patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _padding(layer: nn.Conv2d) -> list[int]:
    """Return how much a convolution pads its inputs: at the left, right, top and bottom."""
    added: list[int] = []
    for axis in (1, 0):
        if isinstance(layer.padding, str):
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1) if layer.padding == "same" else 0
            added += [total // 2, total - total // 2]
        else:
            added += [int(layer.padding[axis])] * 2
    return added


def input_view(layer: nn.Module) -> tuple[Any, ...]:
    """Return the settings of `layer` that `input_rows` depends on: equal settings and inputs give equal rows."""
    if not isinstance(layer, nn.Conv2d):
        return ()
    return layer.kernel_size, layer.dilation, tuple(_padding(layer)), layer.padding_mode, layer.stride, layer.groups


def to_host(scalars: list[Tensor]) -> list[Any]:
    """Return the values of `scalars`, with a single wait for their device."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist() if scalars else []


def check_finite(weights: dict[str, WeightView]) -> None:
    """Check that all weights are finite. Those on the meta device are left out: they are checked when they are read.

    Raises:
        ValueError: a weight holds NaN or infinity.
    """
    weights = {name: weight for name, weight in weights.items() if not weight.storage.is_meta}
    finite = to_host([weight.matrix().isfinite().all() for weight in weights.values()])
    if not all(finite):
        name = list(weights)[finite.index(False)]
        raise ValueError(f"The weight of {name!r} holds NaN or infinity. Correct the checkpoint before pruning it.")


def zero_counts(weights: dict[str, WeightView]) -> dict[str, tuple[int, int]]:
    """Return (number of zeros, number of entries) of each weight, with a single wait for the device.

    Offloaded weights are loaded layer by layer.
    """
    counts = _counts_in_memory({name: weight for name, weight in weights.items() if not is_offloaded(weight.layer)})
    offloaded = {name: weight for name, weight in weights.items() if name not in counts}
    for _, names in groupby(offloaded, lambda name: id(offloaded[name].layer)):
        of_layer = {name: offloaded[name] for name in names}
        with loaded_layer(next(iter(of_layer.values())).layer):
            counts |= _counts_in_memory(of_layer)
    return {name: counts[name] for name in weights}


def _counts_in_memory(weights: dict[str, WeightView]) -> dict[str, tuple[int, int]]:
    matrices = [weight.matrix() for weight in weights.values()]
    kept = to_host([count_kept(matrix) for matrix in matrices])
    return {
        name: (matrix.numel() - nonzero, matrix.numel())
        for name, matrix, nonzero in zip(weights, matrices, kept, strict=True)
    }


def share(counts: Iterable[tuple[int, int]]) -> float:
    """Return the fraction of zeros, from pairs (number of zeros, number of entries)."""
    zeros, sizes = zip(*counts, strict=True)
    return sum(zeros) / sum(sizes)


def _names() -> str:
    return ", ".join(f"`{cls.__name__}`" for cls in PRUNABLE_LAYERS)
