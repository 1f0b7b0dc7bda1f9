"""The adapted linear layer on a CPU, in float32 and float64: the same as `functional` computes, in less time.

Three large products take most of the time of a step. Everything else is kept small:

- The effective weight c · W + s · H ⊙ (BA) is never there as a whole if W is large. Its rows are computed where the
  last ones were, and multiplied while they are in the cache. With W_q for the rows q of the effective weight,
  y[:, q] = x W_q^T and dx = Σ_q D[:, q] W_q.
- G is written where the effective weight was. Memory that is freed and allocated again may have to be mapped again.
- There is little Python code. After a large product the caches hold none of it, and each function that is called takes
  several times as long as by itself. A small layer would spend a twentieth of its step there.

Half precision is not served, since dx would be rounded after each q.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import fused
from .fused import PLAIN


# Products with fewer rows are slower than one product, because each of them arranges x or D for itself. Weights with
# less than twice as many rows stay whole.
ROWS = 512


def serves(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> bool:
    """Return whether `ByRows` computes with these tensors.

    It does not within `torch.compile`, functional transforms and autocast, nor for a weight that requires a gradient.
    """
    return (
        x.is_cpu
        and (x.dtype == torch.float32 or x.dtype == torch.float64)
        and x.dtype == weight.dtype == A.dtype == B.dtype
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and type(A) in PLAIN
        and type(B) in PLAIN
        and weight.is_cpu
        and weight.is_contiguous()
        and not weight.requires_grad
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        # They need a `setup_context`, which makes each call slower.
        and not torch._C._are_functorch_transforms_active()
    )


class ByRows(torch.autograd.Function):
    """The function (x, W, A, B, bias, mask, c, s) -> x (c · W + s · H ⊙ (BA))^T + bias.

    `mask` tells whether H is the mask of W. Otherwise it is W. The shapes are those of `sparse_lora`. Until backward
    x, W, A and B are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, mask: bool, c: float, s: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.formula = mask, c, s
        if len(weight) < 2 * ROWS:
            return F.linear(x, fused.plain_effective_weight(weight, A, B, mask, c, s), bias)
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(weight))
        work = torch.empty_like(weight[: next(_parts(weight)).stop])
        for part in _parts(weight):
            W = work[: part.stop - part.start]
            fused.plain_effective_weight(weight[part], A, B[part], mask, c, s, W)
            if bias is None:
                torch.mm(rows, W.T, out=y[:, part])
            else:
                torch.addmm(bias[part], rows, W.T, out=y[:, part])
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        mask, c, s = ctx.formula
        needs_x, _, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:5]
        D = grad.reshape(-1, grad.shape[-1])
        work = torch.empty_like(weight)
        grad_x = grad_A = grad_B = None
        if needs_x and len(weight) < 2 * ROWS:
            grad_x = grad @ fused.plain_effective_weight(weight, A, B, mask, c, s, work)
        elif needs_x:
            rows = D.new_empty(len(D), weight.shape[1])
            for part in _parts(weight):
                W = work[: part.stop - part.start]
                fused.plain_effective_weight(weight[part], A, B[part], mask, c, s, W)
                torch.addmm(rows, D[:, part], W, beta=1 if part.start else 0, out=rows)
            grad_x = rows.view(x.shape)
        if needs_A or needs_B:
            G = torch.mm(D.T, x.reshape(-1, x.shape[-1]), out=work)
            grad_A, grad_B = fused.plain_masked_gradients(G, weight, A, B, mask, s)
        return grad_x, None, grad_A, grad_B, D.sum(0) if needs_bias else None, None, None, None


def _parts(weight: Tensor) -> Iterator[slice]:
    return fused.parts(len(weight), len(weight) // ROWS)
