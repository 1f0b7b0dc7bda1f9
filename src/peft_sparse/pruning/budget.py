"""The entries that an allocation divides among the weights, and how whole numbers of them add up."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import Tensor

from ..model.masks import count_kept
from ..model.weights import WeightView, to_host
from .patterns import number_to_prune


Reading = Callable[[str], AbstractContextManager[Any]]


def in_memory(name: str) -> AbstractContextManager[Any]:
    """Return the context within which the weight called `name` can be read, if all weights are in memory."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Budget:
    """What an allocation divides. Lists are in the order of `weights`.

    Args:
        weights: the weights by name.
        sparsity: the fraction of all entries that is to be zero.
        blocks: the name of the block that each weight lies in, None outside of blocks.
        input_norms: ‖X_j‖₂ of each weight's inputs, (in,), if they were measured.
        reading: weight name -> a context within which the weight is in memory.
    """

    weights: Mapping[str, WeightView]
    sparsity: float
    blocks: Mapping[str, str | None]
    input_norms: Mapping[str, Tensor] | None = None
    reading: Reading = field(default=in_memory)

    @cached_property
    def sizes(self) -> list[int]:
        """The number of entries of each weight."""
        return [math.prod(weight.shape) for weight in self.weights.values()]

    @property
    def total(self) -> int:
        """How many entries of all weights together are to be zero."""
        return number_to_prune(self.sparsity, sum(self.sizes))

    @cached_property
    def zeros(self) -> list[int]:
        """How many entries of each weight are zero already. Each weight is read once."""
        kept = [self.of_matrix(name, count_kept) for name in self.weights]
        return [size - nonzero for size, nonzero in zip(self.sizes, to_host(kept), strict=True)]

    @property
    def most(self) -> list[int]:
        """The largest number of zeros of each weight that leaves it one entry."""
        return [max(size - 1, zeros) for size, zeros in zip(self.sizes, self.zeros, strict=True)]

    def apportion(self, wishes: Sequence[float], most: Sequence[int] | None = None) -> dict[str, int]:
        """Return whole numbers of zeros near `wishes`, between `zeros` and `most`; see the function `apportion`."""
        counts = apportion(wishes, self.total, self.zeros, self.most if most is None else most)
        return dict(zip(self.weights, counts, strict=True))

    def of_matrix(self, name: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `compute` of the weight called `name` as a matrix (out, in), which is in memory during the call."""
        with self.reading(name):
            return compute(self.weights[name].matrix())


def apportion(wishes: Sequence[float], total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Return whole numbers near `wishes` that add up to `total`, each between its `least` and its `most`.

    Wishes are limited to their bounds. The difference to the total is then divided in proportion to the distance of
    each number from its bound. The results are rounded by largest remainder; of equal remainders the first is larger.

    Raises:
        ValueError: the bounds exclude `total`.
    """
    check_reachable(total, least, most)
    # Fractions are exact. Rounding errors of large floats could violate the bounds or the total.
    near = [
        min(max(Fraction(wish), Fraction(low)), Fraction(high))
        for wish, low, high in zip(wishes, least, most, strict=True)
    ]
    missing = total - sum(near)
    if missing:
        room = [bound - x for bound, x in zip(most if missing > 0 else least, near, strict=True)]
        share = Fraction(missing, sum(room))
        near = [x + own * share for x, own in zip(near, room, strict=True)]
    counts = [math.floor(x) for x in near]
    remainders = [x - count for x, count in zip(near, counts, strict=True)]
    # Remainders are rounded, so that those that differ by the rounding errors of the wishes count as equal.
    order = sorted((i for i, rest in enumerate(remainders) if rest), key=lambda i: -round(remainders[i], 6))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def check_reachable(total: int, least: Sequence[int], most: Sequence[int]) -> None:
    if not sum(least) <= total <= sum(most):
        raise ValueError(
            f"Expected a sparsity that gives between {sum(least)} and {sum(most)} zeros in total, because entries "
            f"that are zero stay zero and the allocation keeps others; got one that gives {total}. Choose another "
            "sparsity, or another allocation."
        )
