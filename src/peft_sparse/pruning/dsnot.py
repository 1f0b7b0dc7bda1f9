"""DSnoT: exchanges entries of each row until its expected error is near zero."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.statistics import Need, Statistics
from ..model.masks import mask_of
from .choices import check_numbers
from .criteria import Wanda
from .patterns import Pattern, SemiStructured
from .rows import computed_in, rows_of_chunk


@dataclass(frozen=True)
class DSnoT:
    """Dynamic sparse no training: exchanges entries of each row until its expected error is near zero.

    Let S_j be the sum of X_j over a sequence, averaged over the sequences. The expected error of row i of W is

        e_i = Σ_{j pruned} W_ij S_j.

    Each cycle restores the pruned entry with the highest |W_ij S_j| / Var(X_j) among those whose W_ij S_j has the sign
    of e_i. It prunes the kept entry with the lowest |W_ij| · ‖X_j‖₂ among those of the other sign, or under n:m among
    the same m entries. An exchange that would not lower |e_i| is skipped. Zhang et al. 2023, arXiv:2310.08915,
    section 3.

    Args:
        max_cycles: how many exchanges a row may make, at least 1.
        threshold: a row is finished once |e_i| is at most this, in units of the layer's output summed over one
            sequence; at least 0.

    Raises:
        ValueError: a number is outside its range.
    """

    max_cycles: int = 50
    threshold: float = 0.1

    needs: ClassVar[tuple[Need, ...]] = ("inputs", "moments")

    def __post_init__(self) -> None:
        check_numbers(
            self,
            max_cycles=(self.max_cycles >= 1, "at least 1"),
            threshold=(self.threshold >= 0, "at least 0"),
        )

    def refine(self, weight: Tensor, mask: Tensor, statistics: Statistics, pattern: Pattern) -> Tensor:
        """Return the refined mask, (out, in)."""
        return dsnot(weight, mask, statistics, pattern, max_cycles=self.max_cycles, threshold=self.threshold)


@torch.no_grad()
def dsnot(
    weight: Tensor,
    mask: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    *,
    max_cycles: int = 50,
    threshold: float = 0.1,
) -> Tensor:
    """Exchange entries of each row until its expected error is near zero, and return the new mask (out, in).

    Let S_j be the sum of X_j over a sequence, averaged over the sequences. The expected error of row i is

        e_i = Σ_{j pruned} W_ij S_j.

    Each cycle exchanges two entries of every row with |e_i| > threshold:

    - It restores one pruned entry whose W_ij S_j has the sign of e_i: the one with the highest |W_ij S_j| / v_j, where
      v_j is the variance of X_j.
    - It prunes one kept entry whose W_ij S_j has the other sign: the one with the lowest |W_ij| · ‖X_j‖₂. Under n:m it
      prunes the entry with the lowest |W_ij| · ‖X_j‖₂ of the same m entries, of either sign, and the row is finished
      before e_i would change sign.

    No entry is considered twice. One point differs from the paper: an exchange that would not lower |e_i| is skipped,
    so |e_i| never grows. Entries of weight zero are neither restored nor pruned. Rows and n:m groups keep as many
    entries as before.

    Args:
        weight: W, (out, in). float64 is computed in float64, every other dtype in float32.
        mask: True = kept, (out, in). It is not modified.
        statistics: uses `input_norm`, `input_mean`, `input_variance`, `tokens` and `sequences`. The first three may
            also be (out, in), for rows that have inputs of their own.
        pattern: `SemiStructured` exchanges within each m entries.
        max_cycles: how many exchanges a row may make.
        threshold: a row is finished once |e_i| is at most this, in units of the output summed over a sequence.

    Zhang et al. 2023, arXiv:2310.08915, section 3 (DSnoT).
    """
    m = pattern.m if isinstance(pattern, SemiStructured) else None
    rows = rows_of_chunk(weight, weight.shape[1])
    parts = zip(weight.split(rows), mask.split(rows), strict=True)
    own = (_of_rows(statistics, slice(start, start + rows)) for start in range(0, len(weight), rows))
    return torch.cat(
        [
            _Cycles(part, kept, stats, m, max_cycles).run(threshold)
            for (part, kept), stats in zip(parts, own, strict=True)
        ]
    )


def _of_rows(statistics: Statistics, rows: slice) -> Statistics:
    """Return the statistics of some rows of a weight, where they are (out, in)."""
    names = ("input_norm", "input_mean", "input_variance")
    by_row = {name: value for name in names if (value := getattr(statistics, name)) is not None and value.dim() == 2}
    return replace(statistics, **{name: value[rows] for name, value in by_row.items()})


class _Cycles:
    """The cycles of DSnoT on several rows at once. Side 0 is for rows with e < 0, side 1 for rows with e > 0."""

    def __init__(self, weight: Tensor, kept: Tensor, statistics: Statistics, m: int | None, max_cycles: int) -> None:
        mean, variance = statistics.input_mean, statistics.input_variance
        assert mean is not None, "the calibration engine supplies what a refinement needs"
        assert variance is not None, "the calibration engine supplies what a refinement needs"
        dtype = computed_in(weight)
        self.kept, self.m, self.max_cycles = kept, m, max_cycles
        self.rows = torch.arange(len(kept), device=kept.device)
        self.contribution = weight.to(dtype) * mean.to(dtype).mul(statistics.tokens / statistics.sequences)
        self.importance = Wanda().score(weight, statistics)
        # An input that never varies contributes to the mean alone, so its entries are restored first.
        growth = self.contribution.abs() / variance.to(dtype).clamp_min(torch.finfo(dtype).tiny)
        self.grow = self._lists(growth, ~kept, (-1, 1))
        if m is None:
            self.prune = self._lists(-self.importance, kept, (1, -1))
        else:
            self.free = kept & mask_of(weight)

    def _lists(self, scores: Tensor, allowed: Tensor, signs: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the highest scores and their columns, both (sides, rows, k), of the allowed entries of each side."""
        # A cycle takes one entry of a list, so a list is never longer than the number of cycles.
        length = min(self.max_cycles, scores.shape[1])
        best = []
        for sign in signs:
            excluded = ~allowed | (sign * self.contribution <= 0)
            best.append(scores.masked_fill(excluded, -torch.inf).topk(length))
        return torch.stack([top.values for top in best]), torch.stack([top.indices for top in best])

    def run(self, threshold: float) -> Tensor:
        """Return the refined mask."""
        mask = self.kept.clone()
        error = self.contribution.masked_fill(self.kept, 0).sum(1)
        first = error.sign()
        active = error.abs() > threshold
        for cycle in range(self.max_cycles):
            # The host waits for the device here, so it asks only every tenth cycle.
            if cycle % 10 == 0 and not active.any():
                break
            side = (error > 0).long()
            grown, found = self._next(*self.grow, side)
            pruned, fits = self._partner(grown) if self.m else self._next(*self.prune, side)
            after = error + self._at(self.contribution, pruned) - self._at(self.contribution, grown)
            take = active & found & fits & (after.abs() < error.abs())
            if self.m:
                flips = found & fits & (after * first < 0)
                active &= ~flips
                take &= ~flips
            mask[self.rows, grown] = take | self._at(mask, grown)
            mask[self.rows, pruned] = ~take & self._at(mask, pruned)
            error = torch.where(take, after, error)
            active &= error.abs() > threshold
        return mask

    def _next(self, scores: Tensor, columns: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best entry left in the list of each row's side, and whether there is one. Remove it."""
        score, slot = scores[side, self.rows].max(1)
        scores[side, self.rows, slot] = -torch.inf
        return columns[side, self.rows, slot], score > -torch.inf

    def _partner(self, grown: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least important entry of the group of `grown` that each row may prune, and if there is one."""
        assert self.m is not None
        columns = self.kept.shape[1]
        members = (grown // self.m * self.m)[:, None] + torch.arange(self.m, device=grown.device)
        outside = members >= columns
        members = members.clamp_max(columns - 1)
        blocked = outside | ~self.free.gather(1, members)
        score, slot = self.importance.gather(1, members).masked_fill(blocked, torch.inf).min(1)
        pruned = members[self.rows, slot]
        self.free[self.rows, pruned] = False
        return pruned, score < torch.inf

    def _at(self, matrix: Tensor, columns: Tensor) -> Tensor:
        return matrix[self.rows, columns]
