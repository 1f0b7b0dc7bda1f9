"""Single matrices, whose reconstruction is a least-squares problem: solved, not trained."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..calibration.statistics import BlockStatistics
from ..model.masks import mask_of
from ..model.weights import WeightView
from ..pruning.least_squares import masked_least_squares
from ..pruning.one_weight import prune_weights
from ..pruning.refinement import row_error
from ..pruning.task import PruningTask
from .report import RegionReport


def solve_matrices(
    weights: dict[str, WeightView],
    task: PruningTask,
    measure: Callable[[dict[str, WeightView]], BlockStatistics],
    *,
    in_turn: bool,
) -> list[RegionReport]:
    """Prune each of `weights`, and solve for its kept entries by `masked_least_squares`.

    Args:
        measure: weights -> statistics of their inputs, Hessians included.
        in_turn: measure each on inputs that those solved before it made; else all at once, on the dense ones'.
    """
    measured = measure(weights)
    sharing: dict[int, list[str]] = {}
    for name, statistics in measured.inputs.items():
        sharing.setdefault(id(statistics), []).append(name)
    reports = []
    for position, names in enumerate(sharing.values()):
        group = {name: weights[name] for name in names}
        if position and in_turn:
            measured = measure(group)
        dense = {name: weight.matrix().clone() for name, weight in group.items()}
        prune_weights(group, task, measured)
        for name, weight in group.items():
            hessian = measured.inputs[name].hessian
            assert hessian is not None
            pruned = weight.matrix()
            solution = masked_least_squares(dense[name], mask_of(pruned), hessian, start=pruned)
            before, after = (_matrix_error(dense[name], w, hessian) for w in (pruned, solution))
            if after <= before:
                weight.write(solution)
            reports.append(RegionReport(name, before, min(before, after), 0, 0.0, not after <= before))
    return reports


def _matrix_error(dense: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Return ||(W' - W)X|| / ||WX|| from XᵀX."""
    nothing = torch.zeros_like(dense, dtype=torch.bool)
    error, size = (float(row_error(dense, other, hessian).sum()) for other in (weight, nothing))
    return math.sqrt(max(error / size, 0.0)) if size else 0.0
