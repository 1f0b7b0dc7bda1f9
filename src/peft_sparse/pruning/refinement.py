"""Mask refinement: (weight, mask, statistics, pattern) -> mask. Pruned entries are exchanged for kept ones.

Pure functions on tensors of any device: no layers, no calibration, and no weight is changed. Refinement works row by
row, also on a mask that was selected by comparison per matrix. Every row keeps as many entries as before.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..calibration.statistics import Need, Statistics
from ..model.masks import mask_of
from .choices import check_numbers, chosen, spelled
from .criteria import Wanda
from .patterns import Pattern, SemiStructured


# Rows are processed in chunks, so that no temporary tensor has more elements than this. On CPUs small tensors stay in
# the cache; on accelerators large tensors need fewer kernel launches.
_CHUNK, _CHUNK_OF_ACCELERATORS = 1 << 22, 1 << 26


class Refinement(Protocol):
    """What every refinement has: `needs`, the statistics that calibration has to measure, and `refine`."""

    @property
    def needs(self) -> tuple[Need, ...]: ...

    def refine(self, weight: Tensor, mask: Tensor, statistics: Statistics, pattern: Pattern) -> Tensor:
        """Return a mask with as many kept entries in each row and each n:m group as `mask`, (out, in)."""


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


@dataclass(frozen=True)
class Swap:
    """Swaps of one kept and one pruned entry of a row. Each swap lowers the output error of the row.

    The error of a row w with mask m is

        E = ‖X d‖² = dᵀ XᵀX d    with d = w ⊙ (1 - m).

    The change of E by a swap is computed from XᵀX, exactly up to rounding. Under n:m both entries are among the same m
    entries. Zimmer et al. 2025, arXiv:2512.10922 (SparseSwaps).

    Args:
        max_swaps: how many swaps a row may make, at least 1.
        tolerance: a swap must lower E by at least this fraction of E; at least 0.
        candidates: how many kept and how many pruned entries are candidates in one round of swaps, at least 1. Under
            n:m, how many groups.

    Raises:
        ValueError: a number is outside its range.
    """

    max_swaps: int = 1000
    tolerance: float = 1e-5
    candidates: int = 32

    needs: ClassVar[tuple[Need, ...]] = ("hessian",)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            max_swaps=(self.max_swaps >= 1, "at least 1"),
            tolerance=(self.tolerance >= 0, "at least 0"),
            candidates=(self.candidates >= 1, "at least 1"),
        )

    def refine(self, weight: Tensor, mask: Tensor, statistics: Statistics, pattern: Pattern) -> Tensor:
        """Return the refined mask, (out, in)."""
        assert statistics.hessian is not None, "calibration measures what a refinement needs"
        refined, _ = swap(
            weight,
            mask,
            statistics.hessian,
            pattern,
            max_swaps=self.max_swaps,
            tolerance=self.tolerance,
            candidates=self.candidates,
        )
        return refined


REFINEMENTS: dict[str, type] = {"dsnot": DSnoT, "swap": Swap}


def find_refinement(refinement: str | Refinement) -> tuple[str, Refinement]:
    """Return what reports call a refinement, and its value.

    Args:
        refinement: a name of `REFINEMENTS`, or a value of one of its classes.

    Raises:
        ValueError: there is no such refinement.
    """
    value = chosen("refinement", REFINEMENTS, refinement)
    return spelled(REFINEMENTS, value), value


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
        statistics: uses `input_norm`, `input_mean`, `input_variance`, `tokens` and `sequences`.
        pattern: `SemiStructured` exchanges within each m entries.
        max_cycles: how many exchanges a row may make.
        threshold: a row is finished once |e_i| is at most this, in units of the output summed over a sequence.

    Zhang et al. 2023, arXiv:2310.08915, section 3 (DSnoT).
    """
    m = pattern.m if isinstance(pattern, SemiStructured) else None
    rows = rows_of_chunk(weight, weight.shape[1])
    parts = zip(weight.split(rows), mask.split(rows), strict=True)
    return torch.cat([_Cycles(part, kept, statistics, m, max_cycles).run(threshold) for part, kept in parts])


class _Cycles:
    """The cycles of DSnoT on several rows at once. Side 0 is for rows with e < 0, side 1 for rows with e > 0."""

    def __init__(self, weight: Tensor, kept: Tensor, statistics: Statistics, m: int | None, max_cycles: int) -> None:
        mean, variance = statistics.input_mean, statistics.input_variance
        assert mean is not None, "the calibration engine supplies what a refinement needs"
        assert variance is not None, "the calibration engine supplies what a refinement needs"
        dtype = _computed_in(weight)
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


@torch.no_grad()
def swap(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    *,
    max_swaps: int = 1000,
    tolerance: float = 1e-5,
    candidates: int = 32,
) -> tuple[Tensor, Tensor]:
    """Swap entries of each row to lower its error. Return the new mask (out, in) and the number of swaps (out,).

    Let H = XᵀX, d = w ⊙ (1 - m) and G = H d. The error of a row is E = ‖X d‖² = dᵀ H d. Pruning the kept entry p and
    restoring the pruned entry g changes E by

        ΔE = 2 w_p G_p + w_p² H_pp - 2 w_g G_g + w_g² H_gg - 2 w_p w_g H_pg.

    The pair with the lowest ΔE is swapped as long as ΔE is negative. Under n:m, p and g are among the same m entries.

    There are too many pairs to search all of them for every swap. Therefore the search runs in rounds. A round lists,
    for each row, the entries p and g that are best alone, and the best partner of each of these among all entries. It
    swaps the best listed pairs until no pair lowers E. Each entry is swapped at most once per round, and G is updated
    for the listed entries after every swap. Then G is computed again. A row is finished when a round swaps nothing.
    Under n:m a round lists the best pair of each of the best groups, so no swap lowers E when a row is finished.
    Without n:m this is true if `candidates` >= in; otherwise no listed swap lowers E.

    Entries of weight zero are neither pruned nor restored. Rows and n:m groups keep as many entries as before.

    Args:
        weight: W, (out, in). float64 is computed in float64, every other dtype in float32.
        mask: True = kept, (out, in). It is not modified.
        hessian: XᵀX, (in, in), of any scale.
        pattern: `SemiStructured` swaps within each m entries.
        max_swaps: how many swaps a row may make.
        tolerance: a swap must lower E by at least this fraction of E. In float32 it must be larger than the rounding
            error of ΔE, so that E falls with every swap.
        candidates: how many entries p, and how many g, a round lists; half of them are partners. Under n:m, how many
            groups a round lists.

    The exact 1-swap on XᵀX: Zimmer et al. 2025, arXiv:2512.10922 (SparseSwaps).
    """
    dtype = _computed_in(weight)
    hessian = hessian.to(dtype)
    m = pattern.m if isinstance(pattern, SemiStructured) else None
    candidates = min(candidates, weight.shape[1] if m is None else -(-weight.shape[1] // m))
    rows = rows_of_chunk(weight, max(4 * candidates**2, weight.shape[1] * (m or (candidates + 1) // 2)))
    refined, swaps = mask.clone(), torch.zeros(len(mask), dtype=torch.long, device=mask.device)
    for part, kept, taken in zip(weight.split(rows), refined.split(rows), swaps.split(rows), strict=True):
        live = torch.arange(len(part), device=part.device)
        while len(live):
            w, own, left = part[live].to(dtype), kept[live], max_swaps - taken[live]
            flipped, count = _swap_round(w, own, hessian, m, candidates, left, tolerance)
            kept[live] = own ^ flipped
            taken[live] += count
            # The host waits for the device here: once per round, that is for up to `candidates` swaps of every row.
            live = live[(count > 0) & (count < left)]
    return refined, swaps


def _swap_round(
    weight: Tensor, mask: Tensor, hessian: Tensor, m: int | None, candidates: int, left: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return which entries change places, (rows, in), and the number of swaps of each row."""
    gradient = weight.masked_fill(mask, 0) @ hessian
    error = (weight.masked_fill(mask, 0) * gradient).sum(1)
    # `step` is the change of d_j if entry j is pruned or restored, and `alone` the resulting change of E.
    step = torch.where(mask, weight, -weight)
    alone = step * (2 * gradient + step * hessian.diagonal())
    zero = ~mask_of(weight)
    prune, restore = alone.masked_fill(~mask | zero, torch.inf), alone.masked_fill(mask | zero, torch.inf)
    if m is None:
        p, g = _best_of_row(prune, restore, step, hessian, candidates)
    else:
        p, g = _best_of_groups(prune, restore, step, hessian, m, candidates)
    first = prune.gather(1, p).masked_fill_(_repeated(p), torch.inf)
    second = restore.gather(1, g).masked_fill_(_repeated(g), torch.inf)
    listed = torch.cat([p, g], dim=1)
    steps = step.gather(1, listed)
    # Two entries together change E by the sum of their own changes and `joint`. On CPUs, indexing by two tensors takes
    # six times as long as reading by one flat index.
    flat = listed[:, :, None] * len(hessian) + listed[:, None, :]
    joint = hessian.reshape(-1).index_select(0, flat.flatten()).view(flat.shape)
    joint.mul_(2 * steps[:, :, None]).mul_(steps[:, None, :])
    chosen = _swap_listed(torch.cat([first, second], dim=1), joint, error, left, tolerance, by_group=m is not None)
    # A short list is filled up with entries that cannot be swapped, so an entry may be listed twice. Adding, unlike
    # writing, is right for these.
    flipped = torch.zeros_like(weight).scatter_add_(1, listed, chosen.to(weight.dtype)).bool()
    return flipped, chosen.sum(1) // 2


def _swap_listed(
    alone: Tensor, joint: Tensor, error: Tensor, left: Tensor, tolerance: float, *, by_group: bool
) -> Tensor:
    """Return which of the listed entries are swapped, (rows, 2k). The first k entries are the ones to prune.

    Args:
        alone: ΔE of each entry by itself, (rows, 2k), inf for an entry that cannot be swapped. It is modified.
        joint: what two entries together add to ΔE, (rows, 2k, 2k).
        by_group: pair only the i-th entry of the first half with the i-th entry of the second half.
    """
    k = alone.shape[1] // 2
    rows = torch.arange(len(alone), device=alone.device)
    across = joint[:, :k, k:].diagonal(dim1=1, dim2=2) if by_group else joint[:, :k, k:].contiguous()
    chosen = torch.zeros_like(alone, dtype=torch.bool)
    for swap in range(k):
        if by_group:
            change, p = (alone[:, :k] + alone[:, k:] + across).min(1)
            g = p
        else:
            change, pair = (across + alone[:, :k, None]).add_(alone[:, None, k:]).flatten(1).min(1)
            p, g = pair // k, pair % k
        take = (change < -tolerance * error) & (change < 0) & (swap < left)
        # The host waits for the device here, so it asks only every eighth swap.
        if swap % 8 == 0 and not take.any():
            break
        error = error + change.masked_fill(~take, 0)
        alone += (joint[rows, p] + joint[rows, k + g]).masked_fill_(~take[:, None], 0)
        for slot in (p, k + g):
            alone[rows, slot] = alone[rows, slot].masked_fill(take, torch.inf)
            chosen[rows, slot] |= take
    return chosen


def _best_of_row(
    prune: Tensor, restore: Tensor, step: Tensor, hessian: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """Return entries p and entries g, both (rows, candidates): half are best alone, half are the partners of these.

    If a few inputs dominate H, entries that are best alone overshoot. Then pairs that cancel each other are needed.
    """
    if candidates == step.shape[1]:
        every = torch.arange(candidates, device=step.device).expand_as(step)
        return every, every
    half = candidates - candidates // 2
    p, g = prune.topk(half, largest=False).indices, restore.topk(half, largest=False).indices
    for_g, for_p = _partners(g, prune, step, hessian), _partners(p, restore, step, hessian)
    return torch.cat([p, for_g], dim=1), torch.cat([g, for_p], dim=1)


def _partners(listed: Tensor, alone: Tensor, step: Tensor, hessian: Tensor) -> Tensor:
    """Return for each of the `listed` entries the entry that has the lowest ΔE together with it, (rows, listed)."""
    joint = hessian[listed]
    joint.mul_(2 * step.gather(1, listed)[:, :, None]).mul_(step[:, None, :])
    return joint.add_(alone[:, None, :]).min(2).indices


def _repeated(listed: Tensor) -> Tensor:
    """Return True where an entry already appears earlier in the same row of `listed`."""
    return (listed[:, :, None] == listed[:, None, :]).tril(-1).any(2)


def _best_of_groups(
    prune: Tensor, restore: Tensor, step: Tensor, hessian: Tensor, m: int, candidates: int
) -> tuple[Tensor, Tensor]:
    """Return p and g of the best swap within each of the best groups, two of (rows, candidates)."""
    rows, columns = step.shape
    ragged = -columns % m
    inside = torch.arange(columns + ragged, device=step.device).clamp_max_(columns - 1).view(-1, m)
    blocks = hessian[inside[:, :, None], inside[:, None, :]]
    prune, restore = (
        torch.nn.functional.pad(alone, (0, ragged), value=torch.inf).view(rows, -1, m) for alone in (prune, restore)
    )
    steps = step[:, inside]
    change = (2 * steps[..., None] * steps[..., None, :]).mul_(blocks)
    change += prune[..., None]
    change += restore[..., None, :]
    best, pair = change.flatten(2).min(2)
    group = best.topk(candidates, largest=False).indices
    pair = pair.gather(1, group)
    # A group in which no swap is possible yields an arbitrary entry, whose index may be beyond the last column.
    return (group * m + pair // m).clamp_max_(columns - 1), (group * m + pair % m).clamp_max_(columns - 1)


@torch.no_grad()
def row_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """Return ‖X(w - w')‖² = (w - w')ᵀ H (w - w') of each row, (out,), float32 (float64 if `weight` is).

    Args:
        weight: W, (out, in).
        pruned: W', (out, in); or a mask M of dtype bool, (out, in), which stands for W' = W ⊙ M.
        hessian: H = XᵀX, (in, in).
    """
    dtype = _computed_in(weight)
    weight = weight.to(dtype)
    difference = weight.masked_fill(pruned, 0) if pruned.dtype == torch.bool else weight - pruned.to(dtype)
    return (difference @ hessian.to(dtype)).mul_(difference).sum(1)


def rows_of_chunk(weight: Tensor, elements_of_row: int) -> int:
    """Return how many rows of `weight` are refined at once if each row takes `elements_of_row` elements."""
    chunk = _CHUNK if weight.device.type == "cpu" else _CHUNK_OF_ACCELERATORS
    return max(1, chunk // elements_of_row)


def _computed_in(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
