"""Swaps: exchanges a kept and a pruned entry of a row as long as that lowers the output error of the row."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.statistics import Need, Statistics
from ..model.masks import mask_of
from .choices import check_numbers
from .patterns import Pattern, SemiStructured
from .rows import computed_in, rows_of_chunk


# The host asks only after this many turns which rows go on.
_TURNS = 8


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
        candidates: how many kept and how many pruned entries are tried, each with its best partner, before a row is
            finished; at least 1. Under n:m all pairs are compared.

    Raises:
        ValueError: a number is outside its range.
    """

    max_swaps: int = 1000
    tolerance: float = 1e-4
    candidates: int = 16

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
    tolerance: float = 1e-4,
    candidates: int = 16,
) -> tuple[Tensor, Tensor]:
    """Swap entries of each row to lower its error. Return the new mask (out, in) and the number of swaps (out,).

    Let H = XᵀX, d = w ⊙ (1 - m) and G = H d. The error of a row is E = ‖X d‖² = dᵀ H d. Pruning the kept entry p and
    restoring the pruned entry g changes E by

        ΔE = 2 w_p G_p + w_p² H_pp - 2 w_g G_g + w_g² H_gg - 2 w_p w_g H_pg.

    After every swap, G is updated by two rows of H. A row is finished when no pair that is searched lowers E.

    Under n:m, p and g are among the same m entries. Each swap is the one with the lowest ΔE of all.

    Without n:m there are too many pairs to search all of them for every swap. A turn takes the g whose restoration
    alone gives the lowest E, and the best p of the whole row for it. The next turn takes the p that is best alone, and
    the best g for it. The pair of a turn is swapped if it lowers E. If two turns swapped nothing, more pairs are
    searched: those of the `candidates` entries p and the `candidates` entries g that are best alone, each with its
    best partner of the whole row. The best of these pairs is swapped. The first swap of a row is found in this way
    too. If `candidates` >= in, every swap is the one with the lowest ΔE of all.

    Entries of weight zero are neither pruned nor restored. Rows and n:m groups keep as many entries as before.

    Args:
        weight: W, (out, in). float64 is computed in float64, every other dtype in float32.
        mask: True = kept, (out, in). It is not modified.
        hessian: XᵀX, (in, in), of any scale.
        pattern: `SemiStructured` swaps within each m entries.
        max_swaps: how many swaps a row may make.
        tolerance: a swap must lower E by at least this fraction of E. In float32 it must be larger than the rounding
            error of ΔE, so that E falls with every swap.
        candidates: how many entries p, and how many g, are tried with all partners. Not used under n:m.

    The exact 1-swap on XᵀX: Zimmer et al. 2025, arXiv:2512.10922 (SparseSwaps).
    """
    dtype, columns = computed_in(weight), weight.shape[1]
    m = pattern.m if isinstance(pattern, SemiStructured) else columns if candidates >= columns else None
    by_position = _by_position(columns, m or 1, weight.device)
    hessian = hessian.to(dtype)
    if m is not None:
        hessian = _columns(_columns(hessian, by_position).T, by_position)
    # Rows that are searched together share the cache of the processor, so their tensors are smaller than a chunk.
    rows = rows_of_chunk(weight, 8 * columns if m is None else columns * max(8, m))
    refined, swaps = torch.empty_like(mask), torch.empty(len(mask), dtype=torch.long, device=mask.device)
    for start in range(0, len(weight), rows):
        own = slice(start, start + rows)
        part, kept = weight[own].to(dtype), mask[own]
        if m is None:
            step, swaps[own] = _OfRow(part, kept, hessian, candidates).run(max_swaps, tolerance)
        else:
            search = _OfGroups(_columns(part, by_position), _columns(kept, by_position), hessian, m)
            steps, swaps[own] = search.run(max_swaps, tolerance)
            step = torch.empty_like(steps).index_copy_(1, by_position, steps)[:, :columns]
        # The step of a kept entry is w_j, that of a pruned one -w_j.
        refined[own] = torch.where(mask_of(part), step == part, kept)
    return refined, swaps


class _Search(ABC):
    """The swaps of several rows at once. A turn finds a pair of entries for each row, and swaps it if E falls.

    Attributes:
        step: the change of d_j if entry j changes its place, (rows, in): w_j if it is kept, otherwise -w_j.
        slope: 2 G, (rows, in). Entry j alone changes E by step_j slope_j + own_j.
        own: step_j² H_jj, (rows, in), inf for entries of weight zero.
        error: E, (rows,).
        swaps: how many swaps each row made, (rows,).
    """

    by_row: tuple[str, ...] = ("weight", "step", "slope", "error", "swaps")

    def __init__(self, weight: Tensor, mask: Tensor, hessian: Tensor) -> None:
        self.weight, self.hessian = weight, hessian
        self.step = torch.where(mask, weight, -weight)
        self.swaps = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
        self.own = (weight.square() * hessian.diagonal()).masked_fill_(~mask_of(weight), torch.inf)
        self.measure()

    def measure(self) -> None:
        """Compute G and E."""
        pruned = (self.weight - self.step).mul_(0.5)
        self.slope = (2 * pruned) @ self.hessian
        self.error = (pruned * self.slope).sum(1).mul_(0.5)

    def run(self, max_swaps: int, tolerance: float) -> tuple[Tensor, Tensor]:
        """Return the steps at the end, (rows, in), and the number of swaps, (rows,)."""
        self.max_swaps, self.tolerance = max_swaps, tolerance
        steps, swaps = self.step.clone(), self.swaps.clone()
        live = torch.arange(len(steps), device=steps.device)
        rounds = 0
        while len(live):
            going = self.round(rounds) & (self.swaps < max_swaps)
            # The host waits for the device here, once in a round.
            count, order = int(going.sum()), going.logical_not_().byte().sort(stable=True).indices
            stay, done = order[:count], order[count:]
            if len(done):
                steps[live[done]], swaps[live[done]] = self.step[done], self.swaps[done]
                live = live[stay]
                for name in self.by_row:
                    setattr(self, name, getattr(self, name).index_select(0, stay))
            rounds += 1
            # Rounding errors of the updates of G add up.
            if rounds % 16 == 0:
                self.measure()
        return steps, swaps

    @abstractmethod
    def round(self, before: int) -> Tensor:
        """Make some swaps in each row, after `before` rounds. Return which rows are not finished, (rows,)."""

    def lowers(self, change: Tensor) -> Tensor:
        """Return which rows make a swap that changes E by `change` (rows,), as (rows, 1), and note it."""
        take = (change < -self.tolerance * self.error) & (change < 0) & (self.swaps < self.max_swaps)
        self.error += change.masked_fill(~take, 0)
        self.swaps += take
        return take[:, None]

    def flip(self, entries: Tensor, take: Tensor) -> None:
        """Let `entries` (rows, 2) change their places in the rows that `take` (rows, 1) names."""
        steps = self.step.gather(1, entries)
        self.step.scatter_(1, entries, torch.where(take, -steps, steps))

    def exchange(self, change: Tensor, entries: Tensor) -> Tensor:
        """Swap `entries` (rows, 2) where E falls by their `change` of it (rows,). Return where, (rows, 1)."""
        take = self.lowers(change)
        steps = self.step.gather(1, entries) * take
        self.move(entries[:, 0], steps[:, :1])
        self.move(entries[:, 1], steps[:, 1:])
        self.flip(entries, take)
        return take

    def move(self, entry: Tensor, step: Tensor) -> None:
        """Update G for a change of d by `step` (rows, 1) at `entry` (rows,)."""
        self.slope.addcmul_(self.hessian.index_select(0, entry), 2 * step)


class _OfRow(_Search):
    """Pairs of any entries of a row: an entry that is good alone, and the best partner of it.

    Attributes:
        prune, restore: `own` of the entries that can be pruned or restored, inf for the others, (rows, in).
    """

    by_row = (*_Search.by_row, "prune", "restore")

    def __init__(self, weight: Tensor, mask: Tensor, hessian: Tensor, candidates: int) -> None:
        super().__init__(weight, mask, hessian)
        self.prune, self.restore = self.own.masked_fill(~mask, torch.inf), self.own.masked_fill(mask, torch.inf)
        self.candidates = candidates

    def round(self, before: int) -> Tensor:
        if not before:
            # If one input dominates H, a row makes few swaps, so the first has to be a good one.
            everything = torch.arange(len(self.step), device=self.step.device)
            self.exchange(*self.best_of_candidates(everything))
        for turn in range(_TURNS):
            if turn == _TURNS - 2:
                swaps = self.swaps.clone()
            self.turn(*((self.prune, self.restore) if turn % 2 else (self.restore, self.prune)))
        stuck = (self.swaps == swaps).nonzero().squeeze(1)
        if len(stuck):
            change, pair = torch.full_like(self.error, torch.inf), torch.zeros_like(self.swaps)[:, None].repeat(1, 2)
            change[stuck], pair[stuck] = self.best_of_candidates(stuck)
            self.exchange(change, pair)
        return self.swaps > swaps

    def turn(self, here: Tensor, there: Tensor) -> None:
        """Swap the entry that is best alone with its best partner on the other side, if that lowers E."""
        alone, first = _lowest(torch.addcmul(here, self.step, self.slope))
        step = self.step.gather(1, first[:, None])
        self.move(first, step)
        together, second = _lowest(torch.addcmul(there, self.step, self.slope))
        take = self.lowers(alone + together)
        # Where E does not fall, the first entry goes back to its place.
        other = torch.where(take[:, 0], second, first)
        self.move(other, torch.where(take, self.step.gather(1, second[:, None]), -step))
        self.flip(torch.stack([first, second], 1), take)

    def best_of_candidates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return ΔE (rows,) and entries (rows, 2) of the best pair that has one of the candidates, for some rows."""
        step, slope = self.step[rows], self.slope[rows]
        restore, prune = (torch.addcmul(own[rows], step, slope) for own in (self.restore, self.prune))
        found = []
        for here, there in ((restore, prune), (prune, restore)):
            alone, listed = here.topk(self.candidates, largest=False)
            change = torch.stack([self.beside(entry, step, there).amin(1) for entry in listed.unbind(1)], 1)
            lowest, best = change.add_(alone).min(1)
            first = listed.gather(1, best[:, None])
            second = _lowest(self.beside(first[:, 0], step, there))[1]
            found.append((lowest, torch.cat([first, second[:, None]], 1)))
        (change, pair), (other, other_pair) = found
        return torch.minimum(change, other), torch.where((other < change)[:, None], other_pair, pair)

    def beside(self, entry: Tensor, step: Tensor, alone: Tensor) -> Tensor:
        """Return what each entry adds to E if `entry` (rows,) changes its place too, (rows, in)."""
        joint = self.hessian.index_select(0, entry).mul_(step).mul_(2 * step.gather(1, entry[:, None]))
        return joint.add_(alone)

    def flip(self, entries: Tensor, take: Tensor) -> None:
        super().flip(entries, take)
        prune, restore = self.prune.gather(1, entries), self.restore.gather(1, entries)
        self.prune.scatter_(1, entries, torch.where(take, restore, prune))
        self.restore.scatter_(1, entries, torch.where(take, prune, restore))


class _OfGroups(_Search):
    """Pairs within each m entries, the best of all. Column i * groups + j is the i-th entry of group j.

    In this order of columns, what is done to each group is done to whole runs of columns.

    Attributes:
        joint: what the two entries of a pair add to ΔE together, (rows, pairs, groups), inf if they are on one side.
    """

    by_row = (*_Search.by_row, "own", "joint")

    def __init__(self, weight: Tensor, mask: Tensor, hessian: Tensor, m: int) -> None:
        super().__init__(weight, mask, hessian)
        self.m, self.groups = m, weight.shape[1] // m
        self.pairs = torch.triu_indices(m, m, 1, device=weight.device)
        first, second = self.pairs
        blocks = hessian.view(m, self.groups, m, self.groups).diagonal(dim1=1, dim2=3)
        self.between = 2 * blocks[first, second]
        shape = (len(weight), m, self.groups)
        self.joint = self._joint(self.step.view(shape), mask.view(shape), self.between)

    def _joint(self, step: Tensor, mask: Tensor, between: Tensor) -> Tensor:
        """Return `joint` of groups from `step` and `mask` (rows, m, groups) and 2 H_pg (..., pairs, groups)."""
        first, second = self.pairs
        joint = step.index_select(1, first).mul_(step.index_select(1, second)).mul_(between)
        return joint.masked_fill_(mask.index_select(1, first) == mask.index_select(1, second), torch.inf)

    def round(self, before: int) -> Tensor:
        for _ in range(_TURNS):
            take = self.turn()
        return take

    def turn(self) -> Tensor:
        """Swap the best pair of each row if that lowers E. Return where, (rows,)."""
        first, second = self.pairs
        alone = torch.addcmul(self.own, self.step, self.slope).view(len(self.step), self.m, self.groups)
        change = alone.index_select(1, first).add_(alone.index_select(1, second)).add_(self.joint)
        lowest, best = _lowest(change.flatten(1))
        pair, group = best // self.groups, best % self.groups
        take = self.exchange(lowest, self.pairs[:, pair].T * self.groups + group[:, None])
        inside = torch.arange(self.m, device=group.device) * self.groups + group[:, None]
        step = self.step.gather(1, inside)[..., None]
        mask = step == self.weight.gather(1, inside)[..., None]
        joint = self._joint(step, mask, self.between.T[group][..., None])
        self.joint.scatter_(2, group[:, None, None].expand_as(joint), joint)
        return take[:, 0]


def _lowest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest value of each row and its column, (rows,). The values are overwritten."""
    columns = values.shape[1]
    if values.device.type != "cpu" or columns >= 1 << 24:
        lowest, column = values.min(1)
        return lowest, column
    # On CPUs `min` with indices takes three times as long as these steps. Columns up to 2²⁴ are exact in float32.
    lowest = values.amin(1)
    column = values.le_(lowest[:, None]).mul_(torch.arange(columns, dtype=values.dtype)).amax(1)
    return lowest, column.long()


def _by_position(columns: int, m: int, device: torch.device) -> Tensor:
    """Return the columns in the order of `_OfGroups`. What the last group lacks are columns beyond the end."""
    return torch.arange(columns + -columns % m, device=device).view(-1, m).T.flatten()


def _columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the columns of `matrix` in another order. Those beyond the end are zero."""
    return torch.nn.functional.pad(matrix, (0, len(order) - matrix.shape[1])).index_select(1, order)
