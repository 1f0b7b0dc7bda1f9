"""The best low-rank correction of a pruned weight, in closed form on the Hessian of its inputs."""

import torch
from torch import Tensor

from ..pruning.rows import row_error


@torch.no_grad()
def low_rank_residual(difference: Tensor, hessian: Tensor, r: int, damping: float) -> tuple[Tensor, Tensor]:
    """Return B (out, r) and A (r, in) whose product L minimises ‖(D - L)X‖² + λ‖D - L‖² among matrices of rank r.

    With H + λI = C Cᵀ and the singular value decomposition U S Vᵀ of D C, the minimiser is L = U_r S_r V_rᵀ C⁻¹. It
    equals U_r U_rᵀ D. The columns of U_r are the r leading eigenvectors of D (H + λI) Dᵀ, so that H is neither
    factorised nor inverted, and may be singular.

    L projects the error D x of the outputs. No correction makes this error larger, whatever x is. Component i of L is
    the product of column i of B and row i of A. Both have the same norm, and the largest component is the first.

    Args:
        difference: D, the dense weight minus the pruned one, (out, in).
        hessian: H = XᵀX, (in, in). Everything is computed in its dtype.
        r: the rank, at most min(out, in).
        damping: λ, as a fraction of the mean of the diagonal of H.
    """
    inner = difference.to(hessian.dtype)
    outer = None
    if inner.shape[0] > inner.shape[1]:
        # There are as many eigenvalues other than zero as columns, so the smaller matrix has them all.
        outer, inner = torch.linalg.qr(inner)
    ridge = damping * hessian.diagonal().mean()
    weighted = torch.addmm(inner * ridge, inner, hessian)
    # In ascending order.
    U = torch.linalg.eigh(weighted @ inner.T).eigenvectors[:, -r:].flip(1)
    A = U.T @ inner
    B = U if outer is None else outer @ U
    size = A.norm(dim=1).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return B * size, A / size[:, None]


def squares(dense: Tensor, others: list[Tensor], hessian: Tensor) -> Tensor:
    """Return ‖WX‖², and ‖(W - W')X‖² for each W' of `others`, from H = XᵀX."""
    nothing = torch.zeros((), dtype=torch.bool, device=dense.device)
    return torch.stack([row_error(dense, other, hessian).sum() for other in (nothing, *others)])
