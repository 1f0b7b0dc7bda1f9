"""Reconstruction of single matrices: each is a least-squares problem, which is solved without training."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..calibration.statistics import BlockStatistics, Statistics
from ..model.masks import mask_of
from ..model.weights import WeightView
from ..pruning.grouped import row_errors, updated
from ..pruning.least_squares import LeastSquares
from ..pruning.one_weight import prune_weights
from ..pruning.task import PruningTask
from .report import RegionReport


def solve_matrices(
    weights: dict[str, WeightView],
    task: PruningTask,
    measure: Callable[[dict[str, WeightView]], BlockStatistics],
    *,
    in_turn: bool,
    before: Mapping[str, WeightView] | None = None,
) -> list[RegionReport]:
    """Prune each of `weights`, and compute its kept entries by `masked_least_squares`. In place.

    A solution whose error is larger than that of the pruned weight is not written.

    Args:
        weights: the weights of one block, by name.
        task: how to prune them. Its `update` has the numbers of the solver; the default is `LeastSquares()`.
        measure: weights -> statistics of their inputs, including Hessians.
        in_turn: whether the inputs of a weight are measured after the weights before it have been solved. Otherwise
            all inputs are measured once, on the dense block.
        before: the same weights before they were pruned, if they have been pruned already: nothing more is pruned.

    Returns:
        One report for each weight. Its errors are ||(W - W')X|| / ||WX|| of the pruned W' and of the final W'.
    """
    solver = task.update or LeastSquares()
    selecting = replace(task, update=None)
    measured = measure(weights)
    if before is None:
        unreached = {name: weight for name, weight in weights.items() if name not in measured.inputs}
        prune_weights(unreached, selecting, measured)
    reports = []
    for position, names in enumerate(_sharing_inputs(measured)):
        group = {name: weights[name] for name in names}
        if position and in_turn:
            measured = measure(group)
        dense = _dense_of(group, before)
        if before is None:
            prune_weights(group, selecting, measured)
        for name, weight in group.items():
            statistics = task.statistics(name, measured)
            pruned = weight.matrix()
            solution = updated(solver, dense[name], mask_of(pruned), statistics, start=pruned)
            first, after = (_matrix_error(dense[name], w, statistics) for w in (pruned, solution))
            if after <= first:
                weight.write(solution)
            reports.append(RegionReport(name, first, min(first, after), 0, 0.0, not after <= first))
    task.warned = selecting.warned
    return reports


def _dense_of(group: dict[str, WeightView], before: Mapping[str, WeightView] | None) -> dict[str, Tensor]:
    """Return the dense W of each weight of a group: its own before it is pruned, or that of the dense model."""
    if before is None:
        return {name: weight.matrix().clone() for name, weight in group.items()}
    return {name: before[name].matrix().to(weight.matrix()) for name, weight in group.items()}


def _sharing_inputs(measured: BlockStatistics) -> list[list[str]]:
    """Return the names of the weights, grouped by the inputs that they share, in the order of `measured`."""
    groups: dict[int, list[str]] = {}
    for name, statistics in measured.inputs.items():
        groups.setdefault(id(statistics), []).append(name)
    return list(groups.values())


def _matrix_error(dense: Tensor, weight: Tensor, statistics: Statistics) -> float:
    """Return ||(W' - W)X|| / ||WX||, computed from XᵀX."""
    nothing = torch.zeros_like(dense, dtype=torch.bool)
    error, size = (float(row_errors(dense, other, statistics).sum()) for other in (weight, nothing))
    return math.sqrt(max(error / size, 0.0)) if size else 0.0
