"""SparseGPT selects the entries to prune and updates the kept ones, column by column.

Pure functions on tensors of any device: no layers, no calibration.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.statistics import Need, Statistics
from .choices import check_numbers
from .patterns import Pattern, SemiStructured, Unstructured, keep_highest, lowest, number_to_prune


@dataclass(frozen=True)
class SparseGPT:
    """SparseGPT as a criterion: it selects entries and updates the kept ones in one pass.

    Let H = XᵀX + λI, and let U be upper triangular with H⁻¹ = UᵀU. The columns j of W (out, in) are processed from
    left to right. Entries with the lowest w_j² / U_jj² are pruned. Their error is moved to all columns on their right:

        W_k -= w_j / U_jj · U_jk    for k > j.

    Scores are compared within `block_size` columns of all rows, or under n:m within each m entries. SparseGPT
    therefore takes no `group`. Frantar & Alistarh 2023, arXiv:2301.00774, section 3.

    Args:
        damping: λ, as a fraction of the mean of the nonzero entries of diag(XᵀX), above 0. If H is not positive
            definite, λ is multiplied by ten, up to three times.
        block_size: how many columns are compared with each other, at least 1.

    Raises:
        ValueError: a number is outside its range; in `solve`, H is not positive definite or the result is not finite.
    """

    damping: float = 0.01
    block_size: int = 128

    needs: ClassVar[tuple[Need, ...]] = ("hessian",)

    def __post_init__(self) -> None:
        check_numbers(
            self, damping=(self.damping > 0, "above 0"), block_size=(self.block_size >= 1, "a whole number from 1 on")
        )

    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Return the updated weight and the mask (True = kept), both (out, in)."""
        assert statistics.hessian is not None, "calibration measures what a criterion needs"
        return sparsegpt(weight, statistics.hessian, pattern, damping=self.damping, block_size=self.block_size)

    def solve_together(self, weights: Tensor, hessians: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor] | None:
        """Return what `solve` does for each of many small matrices (matrices, out, in), computed together.

        Returns:
            The updated weights and the masks. None if they must be solved one by one, because the matrices have more
            columns than a block, or a Hessian is not positive definite.
        """
        return _solved_together(weights, hessians, pattern, self) if weights.shape[-1] <= self.block_size else None


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern | None = None,
    *,
    mask: Tensor | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune W and update the kept entries so that the outputs change little. Return the new weight and the mask.

    Let H = XᵀX + λI, and let U be upper triangular with H⁻¹ = UᵀU. The columns j are processed from left to right.
    M_j is 1 where w_j² / U_jj² is highest. The error of the pruned entries is moved to all columns on their right:

        E_j = (1 - M_j) w_j / U_jj,    W_k -= E_j U_jk  for k > j.

    Entries that are zero already stay zero and count as pruned. Entries of inputs that were never active (X_j = 0)
    are pruned next. Of equal scores, those of earlier columns, and within a column of earlier rows, are pruned first.

    Args:
        weight: W, (out, in), of any floating dtype. float64 is computed in float64, every other dtype in float32. It
            is not modified.
        hessian: XᵀX over all calibration tokens, (in, in), of any scale. It is not modified. The function allocates
            one more tensor of this size.
        pattern: `Unstructured` prunes floor(sparsity · numel) entries, which it compares within `block_size` columns
            over all rows. `SemiStructured` keeps n of every m entries, which it compares when the columns before
            them are finished.
        mask: the entries to keep, (out, in), in place of `pattern`. The function then only updates the kept entries.
        damping: λ as a fraction of the mean of the nonzero entries of diag(XᵀX). If H is not positive definite, λ is
            multiplied by ten, up to three times.
        block_size: how many columns `Unstructured` compares with each other.

    Returns:
        The new weight, float32 (float64 if `weight` is), and the mask (True = kept), both (out, in).

    Raises:
        ValueError: both or neither of `pattern` and `mask` are given, H is not positive definite, or the result is
            not finite.

    Frantar & Alistarh 2023, arXiv:2301.00774, section 3, algorithm 1.
    """
    if (pattern is None) == (mask is None):
        raise ValueError("Expected either a `pattern` to select by or a `mask` to keep, got both or neither.")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # The columns are processed one by one: in the transpose each is contiguous.
    change = weight.T.to(dtype, memory_format=torch.contiguous_format, copy=True)
    kept = change.bool() if mask is None else change.bool() & mask.T
    active = hessian.diagonal() != 0
    _prune_columns(change, kept, _reversed_factor(hessian.to(dtype), active, damping), active, pattern, block_size)
    updated = change.T.contiguous()
    torch.sub(weight, updated, out=updated)
    if not updated.isfinite().all():
        raise ValueError(
            "Expected finite weights from SparseGPT, got NaN or infinity. Look for them in the weight and in the "
            "calibration data, or raise `damping`."
        )
    return updated, kept.T.contiguous()


@torch.no_grad()
def _solved_together(
    weights: Tensor, hessians: Tensor, pattern: Pattern, rule: SparseGPT
) -> tuple[Tensor, Tensor] | None:
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    active = diagonal != 0
    factor = hessians.to(dtype).flip(-2, -1)
    mean = diagonal.sum(-1, keepdim=True) / active.sum(-1, keepdim=True)
    factor.diagonal(dim1=-2, dim2=-1).add_((rule.damping * mean + ~active).flip(-1))
    lower, info = torch.linalg.cholesky_ex(factor)
    identity = torch.eye(weights.shape[-1], dtype=dtype, device=weights.device)
    # There is one block of columns, so U is the inverse of the whole of R: see `_prune_columns`.
    U = torch.linalg.solve_triangular(lower.flip(-2, -1), identity, upper=True)
    current = weights.to(dtype).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
    kept = current.bool()
    budget = number_to_prune(pattern.sparsity, weights[0].numel()) if isinstance(pattern, Unstructured) else 0
    _prune_block(current, U.permute(1, 2, 0), kept, active.T, pattern, budget)
    updated = (current * kept).permute(1, 2, 0).contiguous()
    if bool(info.any()) or not updated.isfinite().all():
        return None
    return updated, kept.permute(1, 2, 0).contiguous()


def _reversed_factor(hessian: Tensor, active: Tensor, damping: float) -> Tensor:
    """Return the lower triangular L in L L^T = J H J, where J reverses the columns."""
    mean = hessian.diagonal().sum() / active.sum()
    for attempt in range(4):
        factor = hessian.flip(0, 1)
        # An input that was never active has a zero row and column: any positive diagonal makes H invertible.
        factor.diagonal().add_((10**attempt * damping * mean + ~active).flip(0))
        # LAPACK works on the transpose. The factor overwrites the matrix, so no second one is allocated.
        info = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor.mT, out=(factor.mT, info))
        # The host waits for the device here, once.
        if bool((info == 0) & (mean > 0)):
            return factor.mT
    raise ValueError(
        f"Expected a positive definite Hessian, but X^T X is not one even with damping {10**attempt * damping:g}. "
        "Pass more calibration tokens, and look for NaN or infinity in the inputs of this layer."
    )


def _prune_columns(
    change: Tensor, kept: Tensor, factor: Tensor, active: Tensor, pattern: Pattern | None, block_size: int
) -> None:
    """Turn `change` (in, out) from Wᵀ into (W - W')ᵀ, and `kept` into the mask. In place.

    The whole of U would take two factorisations and an inverse. Instead, R = J L J is used: it is upper triangular
    with H = R Rᵀ, so R is the inverse of U. Because E U = W - W', a block of columns starts from
    W_block + (W - W')_left R_left,block U_block, where U_block is the inverse of a diagonal block of R. Chee et al.
    2023, arXiv:2307.13304, use the same feedback of errors for quantisation (LDLQ).
    """
    size = len(change)
    if isinstance(pattern, SemiStructured):
        block_size = max(1, block_size // pattern.m) * pattern.m
    budgets = _budgets(kept, pattern.sparsity, block_size) if isinstance(pattern, Unstructured) else []
    # A panel is wider than a block, because a product with few columns does not use the processor fully.
    panel = max(1, 1024 // block_size) * block_size
    for left in range(0, size, panel):
        right = min(left + panel, size)
        R = factor[size - right :, size - right : size - left].flip(0, 1)
        carried = R[:left].T @ change[:left]
        for start in range(left, right, block_size):
            stop = min(start + block_size, right)
            own = slice(start - left, stop - left)
            carried[own].addmm_(R[left:start, own].T, change[left:start])
            identity = torch.eye(stop - start, dtype=R.dtype, device=R.device)
            U = torch.linalg.solve_triangular(R[start:stop, own], identity, upper=True)
            current = torch.addmm(change[start:stop], U.T, carried[own])
            budget = budgets[start // block_size] if budgets else 0
            _prune_block(current, U, kept[start:stop], active[start:stop], pattern, budget)
            change[start:stop] -= current.mul_(kept[start:stop])


def _budgets(kept: Tensor, sparsity: float, block_size: int) -> list[int]:
    """Return how many entries each block of columns loses: at least its zeros, and in total what `sparsity` asks."""
    columns, rows = kept.shape
    live = kept.sum(1).tolist()
    blocks = [live[start : start + block_size] for start in range(0, columns, block_size)]
    zeros = [rows * len(block) - sum(block) for block in blocks]
    total = max(number_to_prune(sparsity, kept.numel()), sum(zeros))
    budgets: list[int] = []
    for i, own in enumerate(zeros):
        even = number_to_prune(sparsity, min((i + 1) * block_size, columns) * rows)
        budgets.append(max(own, min(even, total - sum(zeros[i + 1 :])) - sum(budgets)))
    return budgets


def _prune_block(
    current: Tensor, U: Tensor, kept: Tensor, active: Tensor, pattern: Pattern | None, budget: int
) -> None:
    """Select entries of a block of columns, and move their errors to the columns on their right. In place.

    Args:
        current: the weights of the block after the columns on its left, (columns, rows). It ends as the values that
            kept entries have in the result. Of several matrices it is (columns, matrices, rows); U is then (columns,
            columns, matrices) and `active` (columns, matrices).
        kept: the mask so far. The entries that `pattern` selects become False.
        budget: how many entries an unstructured pattern selects here, in each matrix.
    """
    single = current.dim() == 2
    diagonal = U.diagonal() if single else U.diagonal().T
    importance = (active / diagonal).square()[..., None]
    # Entries that are zero already are selected first.
    floor = torch.zeros_like(current).masked_fill_(~kept, -torch.inf)
    width, chunk = 16, 16
    if isinstance(pattern, Unstructured):
        scores = torch.addcmul(floor, current, current * importance)
        kept &= ~_lowest_of_matrix(scores, budget)
    elif pattern:
        width = pattern.m
        chunk = max(1, chunk // width) * width
    errors = torch.empty_like(current)
    error_of_pruned = 1 / diagonal[..., None]
    # A chunk moves its errors by one product. Within a chunk, errors move column by column, so it must be narrow.
    for start in range(0, len(current), chunk):
        own = slice(start, start + chunk)
        if start:
            _subtract_product(current[own], U[:start, own], errors[:start])
        for left in range(start, min(start + chunk, len(current)), width):
            right = min(left + width, start + chunk, len(current))
            part, part_kept, carries = current[left:right], kept[left:right], U[left:right, left:right]
            if left > start:
                _subtract_product(part, U[start:left, left:right], errors[start:left])
            if isinstance(pattern, SemiStructured):
                scores = torch.addcmul(floor[left:right], part, part * importance[left:right])
                part_kept &= _keep_highest(scores, min(pattern.n, right - left))
            factors = error_of_pruned[left:right] * ~part_kept
            for column, error, by, carry in zip(part, errors[left:right], factors, carries, strict=True):
                torch.mul(column, by, out=error)
                if single:
                    part.addr_(carry, error, alpha=-1)
                else:
                    part.sub_(carry[..., None] * error)


def _subtract_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract leftᵀ right from `target`, in each matrix."""
    if target.dim() == 2:
        target.addmm_(left.T, right, alpha=-1)
    else:
        target.sub_(torch.einsum("jkm,jmr->kmr", left, right))


def _lowest_of_matrix(scores: Tensor, count: int) -> Tensor:
    """Return True at the `count` lowest entries of each matrix of `scores` (columns, rows)."""
    if scores.dim() == 2:
        return lowest(scores.view(1, -1), count).view_as(scores)
    by_matrix = scores.movedim(1, 0)
    return lowest(by_matrix.flatten(1), count).view(by_matrix.shape).movedim(0, 1)


def _keep_highest(scores: Tensor, n: int) -> Tensor:
    """Return True at the `n` highest entries of each column of `scores` (m, rows). Of equal scores the last stay."""
    if scores.dim() > 2:
        return _keep_highest(scores.flatten(1), n).view(scores.shape)
    m = len(scores)
    if m > 16:
        return keep_highest(scores.T, n).T
    # Unlike `keep_highest`, which is called once per matrix, this is called once for every m columns of it: on so few
    # entries the number of kernels decides.
    first, second, sums, constant = _pairs(m, scores.dtype, scores.device)
    first_goes = scores.index_select(0, first) <= scores.index_select(0, second)
    return torch.addmm(constant, sums, first_goes.to(scores.dtype)) >= m - n


@functools.lru_cache(maxsize=8)
def _pairs(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the indices of all pairs i < j, and A and c: A (s_i <= s_j) + c counts the entries below each entry."""
    first, second = torch.triu_indices(m, m, 1, device=device)
    pairs = torch.arange(len(first), device=device)
    sums = torch.zeros(m, len(pairs), dtype=dtype, device=device)
    sums[second, pairs] = 1
    sums[first, pairs] = -1
    return first, second, sums, torch.arange(m - 1, -1, -1, dtype=dtype, device=device)[:, None]
