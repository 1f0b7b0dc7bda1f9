"""Prunes one weight: computes scores, selects a mask, refines it, updates the kept weights and writes the result."""

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..calibration.measure import BlockStatistics, relative_error, warn_of_few_tokens
from ..calibration.recording import version_of
from ..calibration.statistics import Statistics, by_group
from ..model.masks import mask_of
from ..model.processes import add_up
from ..model.weights import WeightView, zero_counts
from .criteria import CRITERIA, Magnitude, ScoringCriterion
from .grouped import lost_square, refined, solved, updated
from .patterns import select
from .sparsegpt import SparseGPT
from .task import PruningTask


@torch.no_grad()
def prune_weights(weights: dict[str, WeightView], task: PruningTask, measured: BlockStatistics | None) -> None:
    """Prune `weights`, and note the relative output error of each in `task`.

    Args:
        weights: weights of one block, by name.
        task: the task, which says how they are pruned.
        measured: the statistics of their inputs, None without calibration.
    """
    if measured is not None:
        weights = _without_unreached(weights, task, measured)
    errors = None if measured is None else _OutputErrors(measured)
    for name, weight in weights.items():
        matrix, pattern, statistics = weight.matrix(), task.patterns[name], task.statistics(name, measured)
        if errors is not None:
            errors.before(name, matrix)
        with noting(f"At {name!r}: the weights before it are pruned."):
            if isinstance(task.rule, SparseGPT) or task.update:
                task.warned = task.warned or warn_of_few_tokens(name, statistics)
            solution, mask = _selected(name, matrix, task, statistics)
            if (task.refinement or task.update) and errors is not None:
                errors.selected(mask if solution is None else solution)
            if task.refinement is not None:
                mask = refined(task.refinement[1], matrix, mask, statistics, pattern)
            if task.update is not None:
                # A mask may keep entries that are zero already, if the weight has more zeros than the pattern needs.
                mask &= mask_of(matrix)
                solution = updated(task.update, matrix, mask, statistics, start=solution)
            if errors is not None:
                errors.final(mask if solution is None else solution.to(matrix.dtype))
            if solution is None:
                weight.write_zeros(mask)
            else:
                weight.write(solution)
    if errors is not None and weights:
        errors.note(task)
    # Counted here, because a streamed weight is in memory only now.
    task.counts |= zero_counts(weights)


def _without_unreached(
    weights: dict[str, WeightView], task: PruningTask, measured: BlockStatistics
) -> dict[str, WeightView]:
    """Prune experts that no calibration token reached by magnitude. Return the other weights."""
    unreached = {name: weight for name, weight in weights.items() if name not in measured.inputs}
    for name, weight in unreached.items():
        scores = scores_of(name, weight.matrix(), Magnitude(), Statistics())
        weight.write_zeros(select(scores, task.patterns[name], task.group))
    task.unreached += unreached
    task.counts |= zero_counts(unreached)
    return {name: weight for name, weight in weights.items() if name not in unreached}


class _OutputErrors:
    """Computes ‖W X‖² and ‖(W - W')X‖² of one weight after the other, on a sample of the rows of X."""

    def __init__(self, measured: BlockStatistics) -> None:
        self.measured = measured
        self.whole: dict[str, Tensor] = {}
        self.lost: dict[str, Tensor] = {}
        self.lost_selected: dict[str, Tensor] = {}

    def before(self, name: str, matrix: Tensor) -> None:
        """Start with the weight `name`, whose entries are still those of W."""
        self.name, self.dense = name, matrix
        known = self.measured.output_squares.get(name)
        self.whole[name] = self._square(None) if known is None else known.to(matrix.device)

    def selected(self, pruned: Tensor) -> None:
        """Note the error of what was selected: W', or a mask that stands for W' = W ⊙ M. W is not written yet."""
        self.lost_selected[self.name] = self._square(pruned)

    def final(self, pruned: Tensor) -> None:
        """Note the error of what will be written, in the form of `selected`."""
        self.lost[self.name] = self._square(pruned)

    def note(self, task: PruningTask) -> None:
        """Write the errors of all weights into `task`, over the rows of all processes."""
        parts = (self.whole, self.lost, self.lost_selected)
        squares = [torch.stack([s.to(self.dense.device) for s in part.values()]) for part in parts if part]
        if self.measured.shared:
            add_up(squares)
        whole = dict(zip(self.whole, squares[0], strict=True))
        for found, sums, errors in zip(parts[1:], squares[1:], (task.errors, task.errors_selected), strict=False):
            errors |= {name: relative_error(lost, whole[name]) for name, lost in zip(found, sums, strict=True)}

    def _square(self, pruned: Tensor | None) -> Tensor:
        return lost_square(self.dense, pruned, self.measured.sample(self.name))


def _selected(name: str, matrix: Tensor, task: PruningTask, statistics: Statistics) -> tuple[Tensor | None, Tensor]:
    """Return the weight that the criterion updated, None if it only selects, and its mask."""
    if isinstance(task.rule, SparseGPT):
        return solved(task.rule, matrix, statistics, task.patterns[name])
    return None, select(scores_of(name, matrix, task.rule, statistics), task.patterns[name], task.group)


def _scored(name: str, matrix: Tensor, rule: ScoringCriterion, statistics: Statistics) -> Tensor:
    if isinstance(rule, tuple(CRITERIA.values())):
        return rule.score(matrix, statistics)
    measured = [value for value in vars(statistics).values() if isinstance(value, Tensor)]
    versions = list(map(version_of, measured))
    try:
        # The model must stay as it is, also if the criterion writes into what it gets.
        scores = rule.score(matrix.clone(), statistics)
    except (TypeError, AttributeError) as error:
        missing = [field.name for field in fields(statistics) if getattr(statistics, field.name) is None]
        if not missing:
            raise
        raise ValueError(
            f"The criterion failed at {name!r}: {error}. These statistics were not measured and are None: "
            f"{', '.join(missing)}. If the criterion reads one of them, pass calibration data, and say so: "
            '`Criterion(score, needs=("inputs",))` measures `input_norm`.'
        ) from error
    if versions != list(map(version_of, measured)):
        raise ValueError(
            f"The criterion wrote into the statistics of {name!r}, which other weights share. Use operations that "
            "return a new tensor, such as `sqrt` for `sqrt_`."
        )
    return scores


def scores_of(name: str, matrix: Tensor, rule: ScoringCriterion, statistics: Statistics) -> Tensor:
    """Return the scores of the weight called `name`, -inf for entries that are zero already.

    Raises:
        ValueError: the scores have another shape, or are not finite, or the criterion reads what was not measured.
    """
    if statistics.gradient is not None:
        # Sums of gradients may be stored on another device.
        statistics = replace(statistics, gradient=statistics.gradient.to(matrix.device))
    parts = []
    for rows, own in by_group(statistics, matrix):
        parts.append(_scored(name, rows, rule, own))
        if not isinstance(parts[-1], Tensor) or parts[-1].shape != rows.shape or parts[-1].is_complex():
            is_tensor = isinstance(parts[-1], Tensor)
            found = f"{tuple(parts[-1].shape)} of {parts[-1].dtype}" if is_tensor else type(parts[-1]).__name__
            raise ValueError(
                f"Expected scores of shape {tuple(rows.shape)} for {name!r}, got {found}. A criterion returns a "
                "tensor with one real score per entry of the weight (out, in)."
            )
    scores = parts[0] if len(parts) == 1 else torch.cat(parts)
    del parts
    if isinstance(rule, tuple(CRITERIA.values())):
        # What the criteria of this package return is nowhere else.
        return scores.masked_fill_(mask_of(matrix).logical_not_(), -torch.inf)
    if not scores.isfinite().all():
        raise ValueError(
            f"Expected finite scores for {name!r}, got NaN or infinity. Correct the criterion, or clamp what it "
            "returns."
        )
    # Integers and bools have no -inf.
    scores = scores if scores.is_floating_point() else scores.double()
    return scores.masked_fill(~mask_of(matrix), -torch.inf)


@contextlib.contextmanager
def noting(note: str) -> Iterator[None]:
    """Add `note` to every error that leaves the context, and to Ctrl-C."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise
