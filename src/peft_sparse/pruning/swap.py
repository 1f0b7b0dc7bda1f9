"""Swaps: exchanges a kept and a pruned entry of a row as long as that lowers the output error of the row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.statistics import Need, Statistics
from ..model.masks import mask_of
from .choices import check_numbers
from .patterns import Pattern, SemiStructured
from .rows import computed_in, rows_of_chunk


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
    dtype = computed_in(weight)
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
