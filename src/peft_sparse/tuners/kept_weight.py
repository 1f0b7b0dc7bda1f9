"""The effective weight that a layer keeps between calls while nothing needs a gradient.

Without it, every token that is generated would compute the effective weight of every layer anew.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class KeptWeight:
    """An effective weight, and all that it was computed from. Copies and pickles of a layer do not contain it.

    Args:
        weight: the effective weight, as the layer computes with it.
        names: the adapters that it contains.
        scalings: their scalings s.
        sources: W, A and B.
        dtype: the dtype of autocast, or None.
    """

    weight: Tensor
    names: list[str]
    scalings: list[float]
    sources: list[Tensor]
    dtype: torch.dtype | None
    _states: list[tuple[int, int]] = field(init=False)
    _copies: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._states = [(tensor._version, tensor.data_ptr()) for tensor in self.sources]
        # A write through `.data` does not change the version of a tensor. On the CPU the small factors are compared.
        self._copies = [factor.detach().clone() for factor in self.sources[1:] if factor.device.type == "cpu"]

    def is_current(
        self, names: list[str], scalings: list[float], sources: list[Tensor], dtype: torch.dtype | None
    ) -> bool:
        """Return whether the weight would be computed from the same values again."""
        if names != self.names or scalings != self.scalings or dtype != self.dtype:
            return False
        for new, old, (version, pointer) in zip(sources, self.sources, self._states, strict=True):
            if new is not old or new._version != version or new.data_ptr() != pointer:
                return False
        return all(torch.equal(copy, factor) for copy, factor in zip(self._copies, sources[1:], strict=False))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class KeepsWeight:
    """What a layer that keeps its effective weight has."""

    # Set by `keep_effective_weights`.
    keeps_effective_weight: bool = True
    _kept: KeptWeight | None = None

    def drop_kept_weight(self) -> None:
        """Free the effective weight that the layer keeps between calls. The next call computes it anew."""
        self._kept = None


def can_keep(x: Tensor, sources: Iterable[Tensor], bias: Tensor | None) -> bool:
    """Return whether an effective weight of `sources` can be kept for the input `x`.

    It cannot while a gradient is needed, while code is compiled, and for tensors that are sharded, that functional
    transforms have wrapped, or that have no version by which a change is seen.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
        return False
    tensors = [*sources, *([] if bias is None else [bias])]
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors)):
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() for tensor in tensors)


def keep_effective_weights(model: nn.Module, keep: bool = True) -> None:
    """Choose whether the MaskLoRA and ScaledLoRA layers of `model` keep their effective weights between calls.

    By default they do. A layer in evaluation mode then computes its effective weight once, and again when W, A, B, the
    scaling, the active adapters, the device or the dtype change, as long as no gradient is needed. Generation with
    unmerged adapters takes about as long as with merged ones. The price is the memory of one copy of all adapted
    weights. Training drops the copies. Quantised weights and weights that are split among processes are not kept.

    A change of W through `.data`, and on a GPU a change of A or B through `.data`, is not seen. Write to the parameter
    within `torch.no_grad()` instead, or call this function again afterwards: it drops what was kept.

    Args:
        model: a model with adapters.
        keep: False computes the effective weight in every call.
    """
    for module in model.modules():
        if isinstance(module, KeepsWeight):
            module.keeps_effective_weight = keep
            module.drop_kept_weight()
