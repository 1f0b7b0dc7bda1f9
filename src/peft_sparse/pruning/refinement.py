"""Mask refinement: (weight, mask, statistics, pattern) -> mask. Entries change places, nothing else changes.

Pure functions on tensors, on whatever device these are: no layers, no calibration, no weight is changed. A mask that
is compared per matrix is refined row by row as well, so every row keeps as many entries as it had.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Need, Statistics
from ..model.masks import mask_of
from .criteria import wanda
from .patterns import Pattern, SemiStructured


# Elements of the largest temporary tensor: rows are worked on in chunks that stay below. CPUs like what is small,
# accelerators wait for launches.
_CHUNK, _CHUNK_OF_ACCELERATORS = 1 << 22, 1 << 26

# Exchanges of a row at most, by `dsnot` and by `swap`; entries that `swap` lists in a round.
MAX_CYCLES, MAX_SWAPS, CANDIDATES = 50, 1000, 32


@torch.no_grad()
def dsnot(
    weight: Tensor,
    mask: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    *,
    max_cycles: int = MAX_CYCLES,
    threshold: float = 0.1,
) -> Tensor:
    """Return `mask` with entries of each row exchanged until its expected error is near zero.

    With S_j the sum of X_j over a sequence, averaged over sequences, the expected error of row i is

        e_i = Σ_{j pruned} W_ij S_j.

    Each cycle exchanges two entries of every row with |e_i| > threshold. Grown is, of the pruned entries whose
    W_ij S_j has the sign of e_i, the one of highest |W_ij S_j| / v_j, where v_j is the variance of X_j. Pruned is, of
    the kept entries of the other sign, the one of lowest |W_ij| · ||X_j||_2; under n:m it is the lowest of the same m
    entries, whatever its sign, and the row stops before e_i would change sign. No entry is considered twice.

    Deviation from the paper: an exchange that would not lower |e_i| is passed over, so |e_i| never grows. Entries of
    weight zero are neither grown nor pruned. Rows and groups keep as many entries as they had.

    Args:
        weight: W, (out, in); float64 is computed in float64, all others in float32.
        mask: (out, in), True = kept. Not modified.
        statistics: `input_norm`, `input_mean`, `input_variance`, `tokens` and `sequences`.
        pattern: `SemiStructured` exchanges within each m entries.
        max_cycles: exchanges per row at most.
        threshold: |e_i| at which a row is done, in units of the output summed over a sequence.

    Zhang et al. 2023, arXiv:2310.08915, section 3 (DSnoT).
    """
    m = pattern.m if isinstance(pattern, SemiStructured) else None
    rows = rows_of_chunk(weight, weight.shape[1])
    parts = zip(weight.split(rows), mask.split(rows), strict=True)
    return torch.cat([_Cycles(part, kept, statistics, m, max_cycles).run(threshold) for part, kept in parts])


class _Cycles:
    """DSnoT's cycles on some rows, all at once. Side 0 serves rows with e < 0, side 1 those with e > 0."""

    def __init__(self, weight: Tensor, kept: Tensor, statistics: Statistics, m: int | None, max_cycles: int) -> None:
        mean, variance = statistics.input_mean, statistics.input_variance
        assert mean is not None, "the calibration engine supplies what a refinement needs"
        assert variance is not None, "the calibration engine supplies what a refinement needs"
        dtype = _computed_in(weight)
        self.kept, self.m, self.max_cycles = kept, m, max_cycles
        self.rows = torch.arange(len(kept), device=kept.device)
        self.contribution = weight.to(dtype) * mean.to(dtype).mul(statistics.tokens / statistics.sequences)
        self.importance = wanda(weight, statistics)
        # What never varied has all its contribution in the mean: it grows first.
        growth = self.contribution.abs() / variance.to(dtype).clamp_min(torch.finfo(dtype).tiny)
        self.grow = self._lists(growth, ~kept, (-1, 1))
        if m is None:
            self.prune = self._lists(-self.importance, kept, (1, -1))
        else:
            self.free = kept & mask_of(weight)

    def _lists(self, scores: Tensor, allowed: Tensor, signs: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return highest scores and their columns, (sides, rows, k), of the allowed entries of each side's sign."""
        # No row gets further down a list than there are cycles.
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
            # Asked now and then only: the answer makes the host wait for the device.
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
        """Return the highest column in the list of each row's side, and whether there is one; cross it off."""
        score, slot = scores[side, self.rows].max(1)
        scores[side, self.rows, slot] = -torch.inf
        return columns[side, self.rows, slot], score > -torch.inf

    def _partner(self, grown: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least important entry that each row may still prune beside `grown`, and whether there is one."""
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
    max_swaps: int = MAX_SWAPS,
    tolerance: float = 1e-5,
    candidates: int = CANDIDATES,
) -> tuple[Tensor, Tensor]:
    """Return `mask` with entries swapped to lower each row's error, and the number of swaps of each row (out,).

    With H = XᵀX, d = w ⊙ (1 - m) and G = H d, the error of a row is E = ||(w - w ⊙ m) X||² = dᵀ H d. Pruning the kept
    entry p and restoring the pruned entry g changes it by exactly

        ΔE = 2 w_p G_p + w_p² H_pp - 2 w_g G_g + w_g² H_gg - 2 w_p w_g H_pg,

    and the pair of lowest ΔE is swapped as long as that is negative. Under n:m both are of the same m entries.

    All pairs are too many to search for every swap. A round lists for each row the entries p and g that are best alone
    and the best partner of each, among all entries. It swaps the best pairs of these until none lowers E, each entry
    once, with G of the listed entries following every swap; then G is computed anew. A row is done when a round swaps
    nothing. Under n:m a round lists the best pair of each of the best groups, so that then no swap at all lowers E;
    without n:m this holds if `candidates` >= in, and else for the listed pairs.

    Entries of weight zero are neither pruned nor restored. Rows and groups keep as many entries as they had.

    Args:
        weight: W, (out, in); float64 is computed in float64, all others in float32.
        mask: (out, in), True = kept. Not modified.
        hessian: XᵀX, (in, in), on any scale.
        pattern: `SemiStructured` swaps within each m entries.
        max_swaps: swaps of one row at most.
        tolerance: swaps that lower E by less than this fraction of it are not taken. In float32 this must stay above
            the rounding of ΔE for E to fall with every swap.
        candidates: entries p, and as many g, listed per round, half of them as partners; under n:m, groups.

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
            # The host waits for the device here, once for up to `candidates` swaps of every row.
            live = live[(count > 0) & (count < left)]
    return refined, swaps


def _swap_round(
    weight: Tensor, mask: Tensor, hessian: Tensor, m: int | None, candidates: int, left: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return which entries change places, (rows, in), and the number of swaps of each row."""
    gradient = weight.masked_fill(mask, 0) @ hessian
    error = (weight.masked_fill(mask, 0) * gradient).sum(1)
    # What d_j changes by if entry j changes sides, and what E then changes by.
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
    # The change by i and j together is that by i, that by j, and `joint`. Read by flat index, because indexing by two
    # tensors takes six times as long on CPUs.
    flat = listed[:, :, None] * len(hessian) + listed[:, None, :]
    joint = hessian.reshape(-1).index_select(0, flat.flatten()).view(flat.shape)
    joint.mul_(2 * steps[:, :, None]).mul_(steps[:, None, :])
    chosen = _swap_listed(torch.cat([first, second], dim=1), joint, error, left, tolerance, by_group=m is not None)
    # An entry without a role fills up short lists and may be listed twice: what was chosen is added, not written.
    flipped = torch.zeros_like(weight).scatter_add_(1, listed, chosen.to(weight.dtype)).bool()
    return flipped, chosen.sum(1) // 2


def _swap_listed(
    alone: Tensor, joint: Tensor, error: Tensor, left: Tensor, tolerance: float, *, by_group: bool
) -> Tensor:
    """Return which of the listed entries change places, (rows, 2k): the first k are those to prune.

    `alone` (rows, 2k) is ΔE of each by itself, inf where it cannot; `joint` (rows, 2k, 2k) what pairs add. `by_group`
    pairs the i-th of the first half with the i-th of the second only. `alone` is modified.
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
        # Asked now and then only: the answer makes the host wait for the device.
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
    """Return entries p and g, two of (rows, candidates): half are the best alone, half the best partners of these.

    Partners, because where few inputs dominate H what is good alone goes too far, and pairs that cancel are needed.
    """
    if candidates == step.shape[1]:
        every = torch.arange(candidates, device=step.device).expand_as(step)
        return every, every
    half = candidates - candidates // 2
    p, g = prune.topk(half, largest=False).indices, restore.topk(half, largest=False).indices
    for_g, for_p = _partners(g, prune, step, hessian), _partners(p, restore, step, hessian)
    return torch.cat([p, for_g], dim=1), torch.cat([g, for_p], dim=1)


def _partners(listed: Tensor, alone: Tensor, step: Tensor, hessian: Tensor) -> Tensor:
    """Return the entry of lowest ΔE together with each of the `listed`, (rows, listed)."""
    joint = hessian[listed]
    joint.mul_(2 * step.gather(1, listed)[:, :, None]).mul_(step[:, None, :])
    return joint.add_(alone[:, None, :]).min(2).indices


def _repeated(listed: Tensor) -> Tensor:
    """Return True where an entry stands in the same row of `listed` before."""
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
    # A group without a swap names any of its entries, which may lie outside.
    return (group * m + pair // m).clamp_max_(columns - 1), (group * m + pair % m).clamp_max_(columns - 1)


@torch.no_grad()
def row_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """Return ||(w - w')X||² = (w - w')ᵀ H (w - w') of each row, (out,), float32 (float64 if `weight` is).

    Args:
        weight: W, (out, in).
        pruned: W', (out, in), or as bool the mask that makes it W ⊙ M.
        hessian: H = XᵀX, (in, in).
    """
    dtype = _computed_in(weight)
    weight = weight.to(dtype)
    difference = weight.masked_fill(pruned, 0) if pruned.dtype == torch.bool else weight - pruned.to(dtype)
    return (difference @ hessian.to(dtype)).mul_(difference).sum(1)


def rows_of_chunk(weight: Tensor, elements_of_row: int) -> int:
    """Return how many rows of `weight` are refined at once, if each takes so many elements."""
    chunk = _CHUNK if weight.device.type == "cpu" else _CHUNK_OF_ACCELERATORS
    return max(1, chunk // elements_of_row)


def _computed_in(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


Refine = Callable[[Tensor, Tensor, Statistics, Pattern], Tensor]


@dataclass(frozen=True)
class Refinement:
    """How a refinement is used.

    Args:
        function: (weight (out, in), mask (out, in), `Statistics`, pattern) -> mask with the same counts.
        needs: which statistics calibration has to measure: "inputs", "moments", "hessian", "gradients".
    """

    function: Refine
    needs: tuple[Need, ...]


def _swap_by_statistics(weight: Tensor, mask: Tensor, statistics: Statistics, pattern: Pattern) -> Tensor:
    assert statistics.hessian is not None, "the calibration engine supplies what a refinement needs"
    return swap(weight, mask, statistics.hessian, pattern)[0]


REFINEMENTS = {
    "dsnot": Refinement(dsnot, needs=("inputs", "moments")),
    "swap": Refinement(_swap_by_statistics, needs=("hessian",)),
}


def find_refinement(name: str) -> Refinement:
    """Return the refinement of that name.

    Raises:
        ValueError: no such refinement.
    """
    if name not in REFINEMENTS:
        raise ValueError(f"Unknown refinement {name!r}. Choose one of {', '.join(map(repr, REFINEMENTS))}.")
    return REFINEMENTS[name]
