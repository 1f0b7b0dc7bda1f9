"""The products of a linear layer with its effective weight on a CPU, so many rows of the weight at a time.

The effective weight c · W + s · H ⊙ (BA) is never there as a whole. Its rows are computed where the last ones were, so
that the next product finds them in the cache, and no memory has to be mapped for them. With W_q for the rows q of the
effective weight, y[:, q] = x W_q^T and dx = Σ_q D[:, q] W_q.

Numbers are rounded as in the products with the whole matrix: float32 and float64 alone are served, since sums in half
precision would be rounded for each q.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import fused


# Products of fewer rows are slower than one product: each of them arranges x or D for itself.
ROWS = 512


def serves(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> bool:
    """Return whether this module computes the products of x, or of D in its place, with the effective weight."""
    return (
        fused.computes_in_parts(weight, A, B)
        and type(x) is Tensor
        and weight.dtype in (torch.float32, torch.float64)
        and x.dtype == A.dtype == B.dtype == weight.dtype
        and x.device.type == "cpu"
        and x.numel() > 0
        and weight.is_contiguous()
    )


def output(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, mask: bool, c: float, s: float
) -> Tensor:
    """Return x (c · W + s · H ⊙ (BA))^T + bias.

    Args:
        x: (..., in).
        weight: W (out, in).
        A: (r, in).
        B: (out, r).
        bias: (out,) or None.
        mask: whether H is the mask of W. Otherwise it is W.
        c: factor of W.
        s: factor of H ⊙ (BA).
    """
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_empty(len(rows), len(weight))
    work = None
    for part in _parts(weight):
        work = torch.empty_like(weight[part]) if work is None else work
        W = fused.effective_weight(weight[part], A, B[part], mask, c, s, out=work[: part.stop - part.start])
        if bias is None:
            torch.mm(rows, W.T, out=y[:, part])
        else:
            torch.addmm(bias[part], rows, W.T, out=y[:, part])
    return y.view(*x.shape[:-1], len(weight))


def grad_input(
    grad: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: bool, c: float, s: float, work: Tensor
) -> Tensor:
    """Return dL/dx = D (c · W + s · H ⊙ (BA)).

    Args:
        grad: D = dL/dy, (..., out).
        weight: W (out, in).
        A: (r, in).
        B: (out, r).
        mask: whether H is the mask of W. Otherwise it is W.
        c: factor of W.
        s: factor of H ⊙ (BA).
        work: a tensor like W, which is overwritten.
    """
    rows = grad.reshape(-1, grad.shape[-1])
    result = rows.new_empty(len(rows), weight.shape[1])
    for part in _parts(weight):
        W = fused.effective_weight(weight[part], A, B[part], mask, c, s, out=work[: part.stop - part.start])
        torch.addmm(result, rows[:, part], W, beta=1 if part.start else 0, out=result)
    return result.view(*grad.shape[:-1], weight.shape[1])


def _parts(weight: Tensor) -> Iterator[slice]:
    return fused.parts(len(weight), len(weight) // ROWS)
