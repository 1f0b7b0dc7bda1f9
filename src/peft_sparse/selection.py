"""What becomes of one weight: scores, mask, refinement, update, and the zeros written."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .criteria import CRITERIA, Criterion, Statistics
from .least_squares import masked_least_squares
from .masks import mask_of, select
from .refinement import find_refinement
from .sparsegpt import sparsegpt
from .statistics import BlockStatistics, relative_error, warn_of_few_tokens
from .tasks import PruningTask, zero_counts
from .weights import WeightView


@torch.no_grad()
def prune_weights(weights: dict[str, WeightView], task: PruningTask, measured: BlockStatistics | None) -> None:
    """Prune `weights`, of whose inputs `measured` tells; note the relative output error of each."""
    for name, weight in weights.items():
        matrix, pattern, statistics = weight.matrix(), task.patterns[name], task.statistics(name, measured)
        rows = None if measured is None else measured.sample(name).float()
        before = None if rows is None else rows @ matrix.T.float()
        with noting(f"At {name!r}: the weights before it are pruned."):
            if task.rule.score is None or task.update:
                task.warned = task.warned or warn_of_few_tokens(name, statistics)
            solution, mask = _selected(name, matrix, task, statistics)
            if (task.refinement or task.update) and rows is not None and before is not None:
                chosen = matrix * mask if solution is None else solution
                task.errors_selected[name] = relative_error(before, rows @ chosen.T.float())
            if task.refinement is not None:
                mask = find_refinement(task.refinement).function(matrix, mask, statistics, pattern)
            if task.update:
                assert statistics.hessian is not None
                solution = masked_least_squares(matrix, mask, statistics.hessian, start=solution)
            if solution is None:
                weight.write_zeros(mask)
            else:
                weight.write(solution)
        if rows is not None and before is not None:
            task.errors[name] = relative_error(before, rows @ weight.matrix().T.float())
    # Counted here, while they are where they can be read.
    task.counts |= zero_counts(weights)


def _selected(name: str, matrix: Tensor, task: PruningTask, statistics: Statistics) -> tuple[Tensor | None, Tensor]:
    """Return the mask of what the criterion keeps, and the updated weight where the criterion updates it."""
    if task.rule.score is None:
        assert statistics.hessian is not None
        return sparsegpt(matrix, statistics.hessian, task.patterns[name])
    return None, select(scores_of(name, matrix, task.rule, statistics), task.patterns[name], task.group)


def scores_of(name: str, matrix: Tensor, rule: Criterion, statistics: Statistics) -> Tensor:
    """Return the scores of the weight called `name`, -inf where it is zero already.

    Raises:
        ValueError: scores of another shape, or that are not finite.
    """
    assert rule.score is not None
    if statistics.gradient is not None:
        # It may wait elsewhere.
        statistics = replace(statistics, gradient=statistics.gradient.to(matrix.device))
    scores = rule.score(matrix, statistics)
    if scores.shape != matrix.shape:
        raise ValueError(
            f"Expected scores of shape {tuple(matrix.shape)} for {name!r}, got {tuple(scores.shape)}. A criterion "
            "returns one score per entry of the weight (out, in)."
        )
    if rule not in CRITERIA.values() and not scores.isfinite().all():
        raise ValueError(
            f"Expected finite scores for {name!r}, got NaN or infinity. Mend the criterion, or clamp what it returns."
        )
    return scores.masked_fill(~mask_of(matrix), -torch.inf)


@contextlib.contextmanager
def noting(note: str) -> Iterator[None]:
    """Add `note` to whatever error leaves the context."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise
