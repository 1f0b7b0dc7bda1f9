"""The task of one pruning run: what is pruned and how, what is measured on the way, and its report."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ..calibration.measure import BlockStatistics
from ..calibration.statistics import Need, Statistics
from ..model.environment import peak_memory
from ..model.weights import WeightView, share, to_host, zero_counts
from .allocation import Allocation, find_allocation
from .criteria import ScoringCriterion
from .least_squares import LeastSquares
from .patterns import Group, Pattern, SemiStructured, Unstructured, number_to_prune
from .refinement import Refinement
from .report import PruningReport, WeightReport
from .sparsegpt import SparseGPT


OnUnreached = Literal["magnitude", "error"]


@dataclass
class PruningTask:
    """What is to be pruned and how, and what is measured on the way.

    Args:
        criterion, pattern: their names in reports.
        rule: the criterion.
        patterns: the pattern of each weight, by name.
        group: the entries that are compared with each other.
        weights: the weights to prune, by name.
        blocks: all blocks of the model, by name.
        by_block: the names of the weights in each block; None for those outside of all blocks.
        allocation: how the sparsity is divided among the weights: a value, a dict by layer, or None.
        refinement: how the mask is refined: (its name in reports, its value), or None.
        update: how the kept weights are updated, or None.
        left_out: the matrices inside the blocks that are not pruned, by name, each with its reason.
        gradients: the sums of gradients, by weight name.
        sequences: the number of calibration sequences.
        counts: (zeros, entries) of each finished weight.
        errors: the relative output error of each finished weight.
        errors_selected: the same before refinement and update.
        warned: whether a warning about few calibration tokens was given.
        on_unreached: what happens to experts that no calibration token reaches.
        unreached: the names of weights of experts that no calibration token reached.
    """

    criterion: str
    rule: ScoringCriterion | SparseGPT
    pattern: str
    patterns: dict[str, Pattern]
    group: Group
    weights: dict[str, WeightView]
    blocks: dict[str, nn.Module]
    by_block: dict[str | None, list[str]]
    allocation: Allocation | Mapping[str, float] | None = None
    refinement: tuple[str, Refinement] | None = None
    update: LeastSquares | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    sequences: int = 0
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    errors_selected: dict[str, Tensor] = field(default_factory=dict)
    warned: bool = False
    on_unreached: OnUnreached = "magnitude"
    unreached: list[str] = field(default_factory=list)

    @property
    def needs(self) -> tuple[Need, ...]:
        """The statistics that criterion, refinement and update need of each weight."""
        steps = (self.rule, self.refinement and self.refinement[1], self.update)
        return tuple(dict.fromkeys(need for step in steps if step is not None for need in step.needs))

    def inside(self, block: str | None) -> dict[str, WeightView]:
        """Return the weights in the block called `block`, by name; None stands for those outside of all blocks."""
        return {name: self.weights[name] for name in self.by_block.get(block, ())}

    def statistics(self, name: str, measured: BlockStatistics | None) -> Statistics:
        """Return what is known of the weight called `name`."""
        gradient = self.gradients.get(name)
        if measured is None:
            return Statistics(gradient=gradient, sequences=self.sequences)
        return measured.of(name, gradient, self.sequences)

    def report(self, seconds: float) -> PruningReport:
        """Return the report, and warn if the weights have more zeros than were asked for."""
        counts = self.counts or zero_counts(self.weights)
        self._warn_of_more_zeros(counts)
        self._warn_of_unreached()
        errors, selected = (
            dict(zip(measured, to_host(list(measured.values())), strict=True))
            for measured in (self.errors, self.errors_selected)
        )
        own_group = isinstance(self.rule, SparseGPT) or any(
            isinstance(pattern, SemiStructured) for pattern in self.patterns.values()
        )
        return PruningReport(
            criterion=self.criterion,
            pattern=self.pattern,
            group=None if own_group else self.group,
            allocation=self.spelled_allocation(),
            refinement=None if self.refinement is None else self.refinement[0],
            update=self.update is not None,
            sparsity=share(counts.values()),
            seconds=seconds,
            peak_memory=peak_memory(),
            weights=tuple(
                WeightReport(
                    name, weight.shape, counts[name][0] / counts[name][1], errors.get(name), selected.get(name)
                )
                for name, weight in self.weights.items()
            ),
            left_out=dict(self.left_out),
        )

    def spelled_allocation(self) -> str | None:
        """Return what reports call the allocation, None without one."""
        if self.allocation is None:
            return None
        return "given" if isinstance(self.allocation, Mapping) else find_allocation(self.allocation)[0]

    def _warn_of_unreached(self) -> None:
        if self.unreached:
            names = ", ".join(self.unreached[:8]) + (", ..." if len(self.unreached) > 8 else "")
            warnings.warn(
                f"No calibration token reached {len(self.unreached)} weights of experts, which were pruned by "
                f'magnitude instead: {names}. Use more calibration sequences, or `on_unreached="error"` to be told '
                "beforehand.",
                stacklevel=3,
            )

    def _warn_of_more_zeros(self, counts: dict[str, tuple[int, int]]) -> None:
        """Warn if zeros that were there before make the result sparser than asked.

        An allocation that divides a sparsity has refused fewer zeros than there are, so there is nothing to warn of.
        """
        if self.allocation is not None and isinstance(next(iter(self.patterns.values())), Unstructured):
            return
        zeros, entries = map(sum, zip(*counts.values(), strict=True))
        asked = sum(
            number_to_prune(pattern.sparsity, counts[name][1]) + _rounding(self.weights[name], pattern)
            for name, pattern in self.patterns.items()
        )
        if zeros > asked:
            wanted = sum(pattern.sparsity * counts[name][1] for name, pattern in self.patterns.items()) / entries
            warnings.warn(
                f"A sparsity of {wanted:.4f} was requested, and the weights now have {zeros / entries:.4f}: entries "
                "that were zero before stay zero. Load the dense model to get a lower sparsity.",
                stacklevel=3,
            )


def _rounding(weight: WeightView, pattern: Pattern) -> int:
    """Return by how many entries the pattern's count may differ from sparsity · entries."""
    rows, columns = weight.shape
    # The last, shorter group of each row loses a fraction of its own.
    return rows * pattern.m if isinstance(pattern, SemiStructured) and columns % pattern.m else 1
