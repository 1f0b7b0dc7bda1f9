"""SparseGPT: which weights to prune, and how the kept ones make up for them.

Pure functions on tensors, on whatever device these are: no layers, no calibration.
"""

import functools

import torch
from torch import Tensor

from .patterns import Pattern, SemiStructured, Unstructured, keep_highest, lowest, number_to_prune


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
    """Return W with entries pruned and the kept ones updated to make up for them, and the mask (True = kept).

    With H = X^T X + λI and U upper triangular in H^-1 = U^T U, columns j go from left to right: M_j is 1 where
    w_j² / U_jj² is highest, and the error of the pruned entries is carried to all columns on their right,

        E_j = (1 - M_j) w_j / U_jj,    W_k -= E_j U_jk  for k > j.

    Entries that are zero already stay zero and count as pruned. Those of inputs that were never active (H_jj = 0) go
    first. Equal scores go by column, then by row.

    Args:
        weight: W, (out, in), of any floating dtype; float64 is computed in float64, all others in float32.
        hessian: X^T X over all calibration tokens, (in, in), on any scale. Neither tensor is modified; while it runs,
            one more of the size of `hessian` is held.
        pattern: `Unstructured` prunes floor(sparsity · numel) entries, compared within `block_size` columns over all
            rows; `SemiStructured` keeps n of every m, compared when the columns before them are done.
        mask: in place of `pattern`, the entries to keep, (out, in): only the update of the kept ones is computed.
        damping: λ over the mean of diag(X^T X) of the active inputs. Where H is not positive definite with it, ten
            times as much is tried, up to three times.
        block_size: columns among which `Unstructured` compares.

    Returns:
        The new weight, float32 (float64 if `weight` is), and the mask, both (out, in).

    Raises:
        ValueError: not exactly one of `pattern` and `mask`; H not positive definite; the result not finite.

    Frantar & Alistarh 2023, arXiv:2301.00774, section 3, algorithm 1.
    """
    if (pattern is None) == (mask is None):
        raise ValueError("Expected either a `pattern` to select by or a `mask` to keep, got both or neither.")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # Transposed, because the columns are what is worked on.
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


def _reversed_factor(hessian: Tensor, active: Tensor, damping: float) -> Tensor:
    """Return the lower triangular L in L L^T = J H J, where J reverses the columns."""
    mean = hessian.diagonal().sum() / active.sum()
    for attempt in range(4):
        factor = hessian.flip(0, 1)
        # An input that was never active is decoupled from the others: any diagonal does.
        factor.diagonal().add_((10**attempt * damping * mean + ~active).flip(0))
        # The transpose is what LAPACK works on: the factor takes the place of the matrix, nothing else is held.
        info = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor.mT, out=(factor.mT, info))
        if info == 0 and mean > 0:
            return factor.mT
    raise ValueError(
        f"Expected a positive definite Hessian, but X^T X is not one even with damping {10**attempt * damping:g}. "
        "Pass more calibration tokens, and look for NaN or infinity in the inputs of this layer."
    )


def _prune_columns(
    change: Tensor, kept: Tensor, factor: Tensor, active: Tensor, pattern: Pattern | None, block_size: int
) -> None:
    """Turn `change` (in, out) from W^T to (W - W')^T, and `kept` to the mask. In place.

    U is never formed as a whole, which would take two factorisations and an inverse. R = J L J, upper triangular in
    H = R R^T, is its inverse, and E U = W - W', so a block of columns starts from
    W_block + (W - W')_left R_left,block U_block, where U_block is the inverse of a diagonal block of R. Chee et al.
    2023, arXiv:2307.13304, feed errors back in this way when they quantise (LDLQ).
    """
    size = len(change)
    if isinstance(pattern, SemiStructured):
        block_size = max(1, block_size // pattern.m) * pattern.m
    budgets = _budgets(kept, pattern.sparsity, block_size) if isinstance(pattern, Unstructured) else []
    # Wider than a block, because thin products leave processors half idle.
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
    """How many entries each block of columns loses: its zeros at least, and in all what `sparsity` asks for."""
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
    """Select in a block of columns, and carry the errors of its pruned entries to those on their right. In place.

    `current` (columns, rows) goes from the weights as the columns left of the block made them to what kept entries
    end with. `kept` loses what `pattern` selects, `budget` entries if it is unstructured.
    """
    importance = (active / U.diagonal()).square()[:, None]
    # What is zero already goes before everything else.
    floor = torch.zeros_like(current).masked_fill_(~kept, -torch.inf)
    width, chunk = 16, 16
    if isinstance(pattern, Unstructured):
        scores = torch.addcmul(floor, current, current * importance)
        kept &= ~lowest(scores.view(1, -1), budget).view_as(kept)
    elif pattern:
        width = pattern.m
        chunk = max(1, chunk // width) * width
    errors = torch.empty_like(current)
    error_of_pruned = 1 / U.diagonal()[:, None]
    # Enough columns for one product to carry most of the errors, few enough to go on one by one.
    for start in range(0, len(current), chunk):
        own = slice(start, start + chunk)
        if start:
            current[own].addmm_(U[:start, own].T, errors[:start], alpha=-1)
        for left in range(start, min(start + chunk, len(current)), width):
            right = min(left + width, start + chunk, len(current))
            part, part_kept, carries = current[left:right], kept[left:right], U[left:right, left:right]
            if left > start:
                part.addmm_(U[start:left, left:right].T, errors[start:left], alpha=-1)
            if isinstance(pattern, SemiStructured):
                scores = torch.addcmul(floor[left:right], part, part * importance[left:right])
                part_kept &= _keep_highest(scores, min(pattern.n, right - left))
            factors = error_of_pruned[left:right] * ~part_kept
            for column, error, by, carry in zip(part, errors[left:right], factors, carries, strict=True):
                torch.mul(column, by, out=error)
                part.addr_(carry, error, alpha=-1)


def _keep_highest(scores: Tensor, n: int) -> Tensor:
    """True at the `n` highest entries of each column of `scores` (m, rows), ties by index."""
    m = len(scores)
    if m > 16:
        return keep_highest(scores.T, n).T
    # There is one call for every m columns, so it must be made of few kernels.
    first, second, sums, constant = _pairs(m, scores.dtype, scores.device)
    first_goes = scores.index_select(0, first) <= scores.index_select(0, second)
    return torch.addmm(constant, sums, first_goes.to(scores.dtype)) >= m - n


@functools.lru_cache(maxsize=8)
def _pairs(m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return i and j of all pairs i < j, and A and c such that A (s_i <= s_j) + c counts the entries below each."""
    first, second = torch.triu_indices(m, m, 1, device=device)
    pairs = torch.arange(len(first), device=device)
    sums = torch.zeros(m, len(pairs), dtype=dtype, device=device)
    sums[second, pairs] = 1
    sums[first, pairs] = -1
    return first, second, sums, torch.arange(m - 1, -1, -1, dtype=dtype, device=device)[:, None]
