"""Solvers and refinements on a weight whose groups of rows have inputs of their own, as in a convolution with groups.

Each function goes group by group, so solvers and refinements see one matrix (out, in) and its `Statistics`. A weight
without groups is one group.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..calibration.statistics import Statistics, by_group
from ..model.masks import mask_of
from ..model.weights import to_host
from .least_squares import LeastSquares
from .patterns import Pattern, Unstructured, number_to_prune
from .refinement import Refinement
from .rows import row_error, rows_of_chunk
from .sparsegpt import SparseGPT


def solved(rule: SparseGPT, matrix: Tensor, statistics: Statistics, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return the updated weight and the mask (True = kept) of `rule`, both (out, in).

    An unstructured pattern prunes as many entries of the whole matrix as it asks for. Each group gets an equal share.
    """
    parts = by_group(statistics, matrix)
    if len(parts) == 1:
        return rule.solve(matrix, statistics, pattern)
    parts = [(rows, _alike(own, seen)) for (rows, own), seen in zip(parts, _seen(statistics), strict=True)]
    by_share: dict[Pattern, list[int]] = {}
    for group, share in enumerate(_shares(parts, pattern)):
        by_share.setdefault(share, []).append(group)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for share, groups in by_share.items():
        weights = torch.stack([parts[group][0] for group in groups])
        hessians = torch.stack([_hessian(parts[group][1]) for group in groups])
        together = rule.solve_together(weights, hessians, share)
        each = zip(*together, strict=True) if together else (rule.solve(*parts[group], share) for group in groups)
        found |= dict(zip(groups, each, strict=True))
    in_order = [found[group] for group in range(len(parts))]
    return torch.cat([weight for weight, _ in in_order]), torch.cat([mask for _, mask in in_order])


def refined(refinement: Refinement, matrix: Tensor, mask: Tensor, statistics: Statistics, pattern: Pattern) -> Tensor:
    """Return the mask that `refinement` makes of `mask`, (out, in)."""
    parts = by_group(statistics, matrix)
    if len(parts) > 1 and "hessian" not in refinement.needs:
        # Norms and moments of the inputs of each row are all it takes to refine the rows of all groups together.
        return refinement.refine(matrix, mask, _by_row(statistics, len(matrix) // len(parts)), pattern)
    masks = [
        refinement.refine(rows, kept, own, pattern)
        for (rows, own), kept in zip(parts, mask.chunk(len(parts)), strict=True)
    ]
    return masks[0] if len(masks) == 1 else torch.cat(masks)


def updated(
    update: LeastSquares, matrix: Tensor, mask: Tensor, statistics: Statistics, start: Tensor | None
) -> Tensor:
    """Return the weight (out, in) whose kept entries `update` has computed."""
    parts = by_group(statistics, matrix)
    starts = [None] * len(parts) if start is None else start.chunk(len(parts))
    solutions = [
        update.solve(rows, kept, own, start=first)
        for (rows, own), kept, first in zip(parts, mask.chunk(len(parts)), starts, strict=True)
    ]
    return solutions[0] if len(solutions) == 1 else torch.cat(solutions)


def row_errors(matrix: Tensor, pruned: Tensor, statistics: Statistics) -> Tensor:
    """Return ‖X(w - w')‖² of each row, (out,). `pruned` is W', or a mask of dtype bool: see `row_error`."""
    parts = by_group(statistics, matrix)
    others = pruned.chunk(len(parts))
    return torch.cat([row_error(r, other, _hessian(own)) for (r, own), other in zip(parts, others, strict=True)])


def lost_square(matrix: Tensor, pruned: Tensor | None, sample: list[Tensor]) -> Tensor:
    """Return ‖X(W - W')ᵀ‖² as a tensor without dimensions, float32, computed in parts without a copy of W.

    Args:
        matrix: W, (out, in).
        pruned: W', (out, in); or a mask M of dtype bool, which stands for W' = W ⊙ M; or None for W' = 0.
        sample: rows of X as tensors (rows, in), or (groups, rows, in) if the rows of W have groups.
    """
    grouped = any(rows.dim() == 3 for rows in sample)
    count = len(matrix) if grouped else rows_of_chunk(matrix, max(matrix.shape[1], *map(len, sample), 1))
    total = torch.zeros((), device=matrix.device)
    for start in range(0, len(matrix), count):
        own = slice(start, start + count)
        lost = _difference(matrix[own], None if pruned is None else pruned[own])
        for rows in sample:
            of_groups = lost.unflatten(0, (len(rows), -1)) if grouped else lost
            total += (rows.float() @ of_groups.mT).square_().sum()
    return total


def _difference(matrix: Tensor, pruned: Tensor | None) -> Tensor:
    """Return W - W' in float32."""
    if pruned is None:
        return matrix.float()
    if pruned.dtype == torch.bool:
        return matrix.masked_fill(pruned, 0).float()
    return matrix.float() - pruned.float()


def _shares(parts: list[tuple[Tensor, Statistics]], pattern: Pattern) -> list[Pattern]:
    """Return a pattern for each group. Together they prune what `pattern` prunes of the whole matrix."""
    if not isinstance(pattern, Unstructured):
        return [pattern] * len(parts)
    size = parts[0][0].numel()
    zeros = to_host([(~mask_of(rows)).sum() for rows, _ in parts])
    total = max(number_to_prune(pattern.sparsity, size * len(parts)), sum(zeros))
    shares: list[Pattern] = []
    pruned, zeros_left = 0, sum(zeros)
    for index, own in enumerate(zeros):
        zeros_left -= own
        even = number_to_prune(pattern.sparsity, size * (index + 1)) if index + 1 < len(parts) else total
        count = min(max(own, min(even, total - zeros_left) - pruned), size)
        pruned += count
        # A sparsity of 1 is not allowed. The number just below it also prunes all entries of a group.
        shares.append(replace(pattern, sparsity=min(count / size, math.nextafter(1.0, 0.0))))
    return shares


def _by_row(statistics: Statistics, rows: int) -> Statistics:
    """Return statistics (out, in) of groups of `rows` rows, of which the statistics are (groups, in)."""
    names = ("input_norm", "input_mean", "input_variance")
    given = {name: value for name in names if (value := getattr(statistics, name)) is not None}
    return replace(statistics, **{name: value.repeat_interleave(rows, 0) for name, value in given.items()})


def _hessian(statistics: Statistics) -> Tensor:
    assert statistics.hessian is not None, "calibration measures what a solver needs"
    return statistics.hessian


def _seen(statistics: Statistics) -> list[bool]:
    """Return for each group whether it had an input other than zero."""
    assert statistics.input_norm is not None, "there are groups because there are norms of their inputs"
    return [bool(seen) for seen in statistics.input_norm.any(-1).tolist()]


def _alike(statistics: Statistics, seen: bool) -> Statistics:
    """Return the statistics of a group: as they are if it was seen, otherwise as if its inputs were all alike."""
    return (
        statistics
        if seen
        else replace(statistics, hessian=torch.eye(*_hessian(statistics).shape).to(_hessian(statistics)))
    )
