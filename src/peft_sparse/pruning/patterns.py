"""Patterns, and the step from scores to a mask: True = kept. Pure functions on tensors, no layers, no criteria."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np
import torch
from torch import Tensor


Group = Literal["row", "matrix", "model"]
GROUPS: tuple[Group, ...] = ("row", "matrix", "model")


@dataclass(frozen=True)
class Unstructured:
    """Unstructured sparsity: any entry may be pruned.

    Args:
        sparsity: the fraction of entries that is pruned, in [0, 1). Of k entries of a matrix or a model,
            floor(sparsity · k) are pruned.
        exact: matters only for comparison per row. True prunes floor(sparsity · out · in) entries of the matrix (out,
            in). Some rows may then lose one entry more than the others. They are the rows whose next score is lowest.
            False prunes floor(sparsity · in) entries of each row, as the code of the Wanda paper does. The total is
            then often lower than asked: 0.6 of 72 inputs gives 0.597.

    Raises:
        ValueError: `sparsity` is outside [0, 1).
    """

    sparsity: float
    exact: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real) or not 0 <= self.sparsity < 1:
            raise ValueError(f"`sparsity` must be in [0, 1), got {self.sparsity!r}. Use 0.5 to prune half.")

    def __str__(self) -> str:
        return f"{self.sparsity:g}"


@dataclass(frozen=True)
class SemiStructured:
    """N:M sparsity: n entries are kept of every m consecutive entries along the inputs.

    `SemiStructured(2, 4)` is the pattern that NVIDIA's sparse tensor cores support.

    Args:
        n: how many entries are kept, from 1 to m.
        m: the length of a group.
        allow_ragged: accept matrices whose number of inputs is not a multiple of m. The last, shorter group then keeps
            min(n, its length) entries. No N:M kernel runs such a matrix.

    Raises:
        ValueError: n and m are no whole numbers, or n is not between 1 and m.
    """

    n: int
    m: int
    allow_ragged: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int)) or not 1 <= self.n <= self.m:
            raise ValueError(
                f"`n:m` keeps n of every m inputs and needs 1 <= n <= m, got {self.n}:{self.m}. Use 2:4 to keep half."
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | SemiStructured


def parse_pattern(pattern: float | str | Pattern) -> Pattern:
    """Return the pattern that a sparsity (0.5 or "0.5"), an "n:m", or a pattern itself stands for.

    Raises:
        TypeError: `pattern` is of another type, such as calibration data in its place.
        ValueError: `pattern` is neither a number in [0, 1) nor n:m with 1 <= n <= m.
    """
    if isinstance(pattern, (Unstructured, SemiStructured)):
        return pattern
    if not isinstance(pattern, (Real, str)):
        raise TypeError(
            'A pattern is a sparsity such as 0.5 or an "n:m" such as "2:4", got a value of type '
            f"{type(pattern).__name__}. The order of the first arguments is model, pattern, calibration."
        )
    if isinstance(pattern, str) and (match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", pattern)):
        return SemiStructured(int(match[1]), int(match[2]))
    try:
        return Unstructured(float(pattern))
    except ValueError as error:
        if "`sparsity` must be" in str(error):
            raise
        raise ValueError(f'A pattern is a sparsity such as 0.5 or an "n:m" such as "2:4", got {pattern!r}.') from None


def select(scores: Tensor, pattern: Pattern, group: Group) -> Tensor:
    """Return the mask that keeps the highest of `scores` (out, in) under `pattern`.

    The number of pruned entries is exact, also if scores are equal: of equal scores, those of lower index are pruned
    first.

    Args:
        scores: finite, or -inf for entries that must be pruned first.
        pattern: `SemiStructured` compares within each m entries and ignores `group`.
        group: "row" or "matrix". For "model", which needs all scores at once, see `select_across`.
    """
    if isinstance(pattern, SemiStructured):
        return _select_semi_structured(scores, pattern)
    if group == "row" and pattern.exact:
        return ~_lowest_by_rows(scores, number_to_prune(pattern.sparsity, scores.numel()))
    if group == "row":
        return ~lowest(scores, number_to_prune(pattern.sparsity, scores.shape[1]))
    flat = scores.reshape(1, -1)
    return ~lowest(flat, number_to_prune(pattern.sparsity, flat.shape[1])).view(scores.shape)


def select_across(scores: Sequence[Callable[[], Tensor]], sparsity: float) -> list[Tensor]:
    """Return one mask per matrix of scores, which together keep the highest scores of all matrices.

    Only one matrix of scores is held at a time. float32 numbers are mapped to integers of the same order. A first pass
    counts their 16 high bits, and a second pass their 16 low bits. This gives the k-th lowest score exactly. A third
    pass selects. Of equal scores, those of earlier matrices and of lower index are pruned first.

    Args:
        scores: one function per matrix, which computes its scores. It is called three times and must return the same
            scores each time.
        sparsity: the fraction of all entries that is pruned, in [0, 1).
    """
    high, total = _histogram(scores, _high_bits)
    count = number_to_prune(sparsity, total)
    if count == 0:
        return [torch.ones_like(score(), dtype=torch.bool) for score in scores]
    threshold, ties_left = _threshold(scores, high, count)
    masks = []
    for score in scores:
        key = _sortable_bits(score())
        prune = key < threshold
        ties = (key == threshold).flatten()
        of_ties = ties & (ties.cumsum(0) <= ties_left)
        ties_left -= int(of_ties.sum())
        masks.append(~(prune | of_ties.view_as(prune)))
    return masks


def count_across(scores: Sequence[Callable[[], Tensor]], count: int) -> list[int]:
    """Return how many entries of each matrix are among the `count` lowest of all matrices.

    These are the entries that `select_across` would prune, counted without masks. Scores may have any shape, and may
    be infinite.
    """
    if count == 0:
        return [0] * len(scores)
    high, _ = _histogram(scores, _high_bits)
    threshold, ties_left = _threshold(scores, high, count)
    counts = []
    for score in scores:
        key = _sortable_bits(score())
        below, ties = torch.stack([(key < threshold).sum(), (key == threshold).sum()]).tolist()
        counts.append(below + min(ties, ties_left))
        ties_left -= min(ties, ties_left)
    return counts


def number_to_prune(sparsity: float, size: int) -> int:
    """Return floor(sparsity · size)."""
    # The product is rounded first: 0.29 * 100 is 28.999999999999996, and 29 is meant.
    return math.floor(round(sparsity * size, 6))


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return True at the `count` lowest entries of each row. Of equal scores, those of lower index come first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_lowest(scores, count)
    chosen = scores <= threshold
    surplus = _count_by_row(chosen) - count
    if scores.device.type != "cpu" and scores.numel() <= _FEW:
        # To ask whether there are ties, the host would wait for the device, which takes longer than these operations.
        return chosen.logical_and_(_without_surplus(scores == threshold, surplus))
    rows = surplus.nonzero().squeeze(1)
    if len(rows):
        chosen[rows] &= _without_surplus(scores[rows] == threshold[rows], surplus[rows])
    return chosen


def _without_surplus(ties: Tensor, surplus: Tensor) -> Tensor:
    """Return False at the last `surplus` entries of each row of `ties`, and True everywhere else."""
    wanted = _count_by_row(ties) - surplus
    return ~ties | (ties.cumsum(1, dtype=torch.int32) <= wanted[:, None])


def _lowest_by_rows(scores: Tensor, count: int) -> Tensor:
    """Return True at `count` entries of the matrix: the lowest of each row, and rows differ by at most one entry."""
    each, extra = divmod(count, len(scores))
    chosen = lowest(scores, each)
    if extra:
        following, column = scores.masked_fill(chosen, torch.inf).min(dim=1)
        chosen[torch.arange(len(scores), device=scores.device), column] |= lowest(following[None], extra)[0]
    return chosen


# Ties among this many scores are always looked for on accelerators, with 4 bytes for each of them.
_FEW = 1 << 24
# On CPUs, numpy with one thread selects and counts faster than torch with several threads.


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    if scores.device.type != "cpu":
        return scores.kthvalue(k, dim=1, keepdim=True).values
    numbers = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).numpy()
    return torch.from_numpy(np.partition(numbers, k - 1, axis=1)[:, k - 1 : k]).to(scores.dtype)


def _count_by_row(mask: Tensor) -> Tensor:
    if mask.device.type != "cpu":
        return mask.count_nonzero(1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))


def _select_semi_structured(scores: Tensor, pattern: SemiStructured) -> Tensor:
    rows, columns = scores.shape
    whole = columns - columns % pattern.m
    groups = scores[:, :whole].reshape(-1, pattern.m)
    # Parts are small enough to stay in the cache.
    mask = torch.cat([keep_highest(part, pattern.n) for part in groups.split(1 << 18)]).view(rows, whole)
    if whole == columns:
        return mask
    return torch.cat([mask, keep_highest(scores[:, whole:], min(pattern.n, columns - whole))], dim=1)


def keep_highest(groups: Tensor, n: int) -> Tensor:
    """Return True at the `n` highest entries of each row of `groups` (groups, m). Of equal scores the last stay."""
    m = groups.shape[1]
    if m > 16:
        kept = groups.argsort(dim=1, stable=True)[:, m - n :]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True)
    # For short groups, comparing every pair of entries in all groups at once is faster than sorting.
    entries = groups.unbind(1)
    lower = [torch.full_like(entry, m - 1 - i, dtype=torch.int8) for i, entry in enumerate(entries)]
    for j in range(1, m):
        for i in range(j):
            i_first = (entries[i] <= entries[j]).view(torch.int8)
            lower[j] += i_first
            lower[i] -= i_first
    mask = torch.empty_like(groups, dtype=torch.bool)
    for before, kept in zip(lower, mask.unbind(1), strict=True):
        torch.ge(before, m - n, out=kept)
    return mask


def _sortable_bits(scores: Tensor) -> Tensor:
    """Return integers in the same order as the float32 `scores`. -0.0 equals 0.0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _high_bits(key: Tensor) -> Tensor:
    return (key >> 16) + 0x8000


def _histogram(scores: Sequence[Callable[[], Tensor]], bucket_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
    counts, total = torch.zeros(1 << 16, dtype=torch.int64), 0
    for score in scores:
        key = _sortable_bits(score())
        total += key.numel()
        counts += torch.bincount(bucket_of(key).flatten(), minlength=1 << 16).cpu()
    return counts, total


def _locate(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the number of entries below the bucket of the k-th lowest entry (k from 1), and that bucket."""
    upto = counts.cumsum(0)
    bucket = int(torch.searchsorted(upto, torch.tensor(k)))
    return int(upto[bucket] - counts[bucket]), bucket


def _threshold(scores: Sequence[Callable[[], Tensor]], high: Tensor, count: int) -> tuple[int, int]:
    """Return the `count`-th lowest of all scores as sortable bits, and how many scores equal to it are pruned."""
    below_bucket, bucket = _locate(high, count)
    low, _ = _histogram(scores, lambda key: (key & 0xFFFF)[_high_bits(key) == bucket])
    below_value, value = _locate(low, count - below_bucket)
    return ((bucket - 0x8000) << 16) | value, count - below_bucket - below_value
