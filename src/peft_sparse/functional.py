"""The mathematics of the adapters, on plain tensors: no PEFT, no modules.

Letters: W (out, in) frozen weight, M its mask (out, in), A (r, in), B (out, r), s scaling, x (..., in), y (..., out).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .masks import numeric_mask


def masked_weight(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return W + s · M ⊙ (BA), M = the nonzero entries of W; computed in A's dtype, rounded once to W's.

    Forward and merge share this line, so a merged model computes what was trained, in any dtype.
    """
    weight_in_dtype = weight.to(A.dtype)
    return torch.addcmul(weight_in_dtype, B @ A, numeric_mask(weight_in_dtype), value=scaling).to(weight.dtype)


def mask_lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Return y = x (W + s · M ⊙ (BA))^T + b. PERP, Zimmer et al. 2023, arXiv:2312.15230v3, MaskLoRA.

    Keeps only references to x, W, A, B until backward and builds the effective weight anew there, so no second copy
    of W outlives a call. Works in any dtype without autocast: A and B may be float32 beside a half-precision W. Under
    autocast x and the effective weight take autocast's dtype, as they would in `F.linear`.

    Gradients, with D = dL/dy and G = D^T x: dA = s B^T (M ⊙ G), dB = s (M ⊙ G) A^T, dx = D (W + s · M ⊙ (BA)).

    Args:
        x: (..., in).
        weight: W, (out, in); gets no gradient.
        A: (r, in).
        B: (out, r).
        bias: (out,) or None.
        scaling: s.

    Returns:
        (..., out).
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _MaskLoraLinear.apply(x, weight, A, B, bias, scaling, weight.dtype)
    dtype = torch.get_autocast_dtype(device)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _MaskLoraLinear.apply(x.to(dtype), weight, A, B, bias, scaling, dtype)


class _MaskLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        return F.linear(x, masked_weight(weight, A, B, scaling).to(dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, A, B, _, ctx.scaling, _ = inputs
        ctx.save_for_backward(x, weight, A, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, needs_bias, _, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = grad_bias = None
        if needs_x:
            grad_x = grad @ masked_weight(weight, A, B, ctx.scaling).to(grad.dtype)
        rows = grad.flatten(0, -2)
        if needs_A or needs_B:
            masked = (rows.T @ x.flatten(0, -2)).mul_(numeric_mask(weight)).to(A.dtype)
            grad_A = (B.T @ masked).mul_(ctx.scaling)
            grad_B = (masked @ A.T).mul_(ctx.scaling)
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, None, grad_A, grad_B, grad_bias, None, None
