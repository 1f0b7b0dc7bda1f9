"""The formulas of the adapters and their gradients, on plain tensors. The layers of this folder call them.

W (out, in) is the frozen weight, and M (out, in) is its mask. A (r, in) and B (out, r) are trained. s is the scaling.
x (..., in) is the input, and y (..., out) is the output. The effective weight of both adapters is
c · W + s · H ⊙ (BA). The fixed matrix H differs between them, and `Factor` names it:

| adapter    | H | c     | effective weight           |
| ---------- | - | ----- | -------------------------- |
| MaskLoRA   | M | 1     | W + s · M ⊙ (BA)           |
| ScaledLoRA | W | 1     | W ⊙ (1 + s · BA)           |
| ScaledLoRA | W | 1 - s | W ⊙ (1 + s · (BA - 1))     |

The field `residual` of a ScaledLoRA configuration chooses between its two rows. One autograd function serves all. With
D = dL/dy and G = D^T x its gradients are dA = s B^T (H ⊙ G), dB = s (H ⊙ G) A^T and dx = D (c · W + s · H ⊙ (BA)).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import by_rows, eight_bit, fused
from .eight_bit import GradientDtype


Factor = Literal["mask", "weight"]

# W, or a function that returns W where W is costly to keep, such as a dequantised weight. The function runs once in
# forward and once in backward.
Weight = Tensor | Callable[[], Tensor]


@torch.no_grad()
def effective_weight(weight: Tensor, A: Tensor, B: Tensor, factor: Factor, c: float, s: float) -> Tensor:
    """Return the effective weight c · W + s · H ⊙ (BA), computed in A's dtype and rounded once to W's dtype.

    This holds under autocast too. Zeros of W stay zeros. `sparse_lora` and merging both call this function, so both
    use the same weight.

    Args:
        weight: W (out, in), or one W for each expert (experts, out, in).
        A: (r, in), or (experts, r, in).
        B: (out, r), or (experts, out, r).
        factor: what H is: "mask" for the mask of W, "weight" for W.
        c: factor of W.
        s: factor of H ⊙ (BA).

    Returns:
        A tensor of the shape and dtype of W.
    """
    return fused.effective_weight(weight, A, B, factor == "mask", c, s)


@dataclass(frozen=True)
class Convolution:
    """A 2-D convolution whose kernel, seen as a matrix, is the weight of `sparse_lora`.

    Args:
        kernel: shape of the kernel, (out, in / groups, height, width).
        stride, padding, dilation: by (height, width), as in `torch.nn.functional.conv2d`.
        groups: number of groups of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of x with `weight` (out, in / groups · height · width), plus the bias (out,)."""
        kernel = weight.view(self.kernel)
        return F.conv2d(x, kernel, bias, self.stride, self.padding, self.dilation, self.groups)

    def grad_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return dL/dx for grad = dL/dy."""
        return self._backward(grad, x, weight, (True, False, False))[0]

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return dL/dweight for grad = dL/dy, in the shape of `weight`."""
        return self._backward(grad, x, weight, (False, True, False))[1].flatten(1)

    def grad_bias(self, grad: Tensor) -> Tensor:
        """Return dL/dbias (out,) for grad = dL/dy."""
        return grad.sum((0, 2, 3)) if grad.dim() == 4 else grad.sum((1, 2))

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight.to(grad.dtype).reshape(self.kernel),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0, 0),
            self.groups,
            wanted,
        )


class _Linear:
    """The four operations of `Convolution` for the linear layer y = x W^T + b."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def grad_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return _rows(grad).T @ _rows(x)

    def grad_bias(self, grad: Tensor) -> Tensor:
        return _rows(grad).sum(0)


def _rows(x: Tensor) -> Tensor:
    # Not `flatten(0, -2)`, which refuses a tensor of one dimension.
    return x.reshape(-1, x.shape[-1])


LINEAR = _Linear()
Operation = Convolution | _Linear


def sparse_lora(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    *,
    factor: Factor,
    c: float,
    s: float,
    operation: Operation = LINEAR,
    gradient_dtype: GradientDtype | None = None,
    effective: Tensor | None = None,
) -> Tensor:
    """Return x (c · W + s · H ⊙ (BA))^T + bias, the output of MaskLoRA and ScaledLoRA, or the same for a convolution.

    Until backward only x, A, B and `weight` are kept. Backward computes the effective weight again. If `weight` is a
    tensor that requires a gradient, it gets dW = G for MaskLoRA and dW = (c + s · BA) ⊙ G for ScaledLoRA.

    A and B may be float32 beside a W in half precision, without autocast: the effective weight is rounded to W's
    dtype. Under autocast x and the effective weight are cast to autocast's dtype. If `weight` is a function, the
    effective weight is cast to the dtype of x.

    Zimmer et al. 2023 (PERP), arXiv:2312.15230v3.

    Args:
        x: (..., in), or for a convolution (batch, channels, height, width).
        weight: W as a matrix (out, in), or a function that returns it, which gives it no gradient.
        A: (r, in).
        B: (out, r).
        bias: (out,) or None.
        factor: what H is: "mask" for the mask of W, "weight" for W.
        c: factor of W.
        s: factor of H ⊙ (BA).
        operation: the linear product or the convolution.
        gradient_dtype: numbers of eight bits for G: "int8" or "fp8". Until backward x is kept in eight bits too. None
            computes G in the dtype of x. Convolutions, and weights that require a gradient, compute G as with None.
        effective: the effective weight of these arguments, if the caller has it, in the dtype of W. It is kept until
            backward, which then does not compute it again.

    Returns:
        (..., out), or for a convolution (batch, out, height, width).
    """
    exact = operation is LINEAR and gradient_dtype is None and effective is None
    if exact and isinstance(weight, Tensor) and by_rows.serves(x, weight, A, B):
        return by_rows.ByRows.apply(x, weight, A, B, bias, factor == "mask", c, s)
    trains = torch.is_grad_enabled() and (A.requires_grad or B.requires_grad)
    frozen = not (isinstance(weight, Tensor) and weight.requires_grad)
    reduced = gradient_dtype is not None and trains and frozen and operation is LINEAR
    kept = eight_bit.quantised(x, gradient_dtype) if reduced and gradient_dtype else (None, None)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif not isinstance(weight, Tensor):
        # Quantisation schemes dequantise to dtypes of their own, which may differ from that of the activations.
        dtype = x.dtype
    else:
        return _SparseLora.apply(x, weight, A, B, bias, factor, c, s, operation, None, *kept, effective)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _SparseLora.apply(x, weight, A, B, bias, factor, c, s, operation, dtype, *kept, effective)


def scale_rows_and_columns(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Return ((x ⊙ a) W^T) ⊙ b + bias, which is ScaledLoRA of rank 1, without allocating a matrix of W's size.

    In exact arithmetic this is x (W ⊙ (b a^T))^T + bias. The two are rounded at different places.

    Args:
        x: (..., in).
        weight: W (out, in).
        a: (in,).
        b: (out,).
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    y = F.linear(x * a.to(x.dtype), weight)
    y = y * b.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def stacked_effective_weight(weight: Tensor, A: Tensor, B: Tensor, factor: Factor, c: float, s: float) -> Tensor:
    """Return the effective weight c · W + s · H ⊙ (BA), with gradients for A, B, and W if it requires one.

    It serves weights that another module uses, such as fused experts. With G = dL/d(result) the gradients are
    dA = s B^T (H ⊙ G) and dB = s (H ⊙ G) A^T. The function keeps W, A and B until backward.

    Args:
        weight: W (out, in), or one W for each expert (experts, out, in).
        A: (r, in), or (experts, r, in).
        B: (out, r), or (experts, out, r).
        factor: what H is: "mask" for the mask of W, "weight" for W.
        c: factor of W.
        s: factor of H ⊙ (BA).

    Returns:
        A tensor of the shape and dtype of W.
    """
    return _EffectiveWeight.apply(weight, A, B, factor, c, s)


def _weight_gradient(G: Tensor, weight: Tensor, A: Tensor, B: Tensor, factor: Factor, c: float, s: float) -> Tensor:
    """Return dW. The mask of W counts as a constant."""
    if factor == "mask":
        return (G * c).to(weight.dtype)
    return (torch.matmul(B, A).mul_(s).add_(c) * G).to(weight.dtype)


class _EffectiveWeight(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, A: Tensor, B: Tensor, factor: Factor, c: float, s: float) -> Tensor:
        return effective_weight(weight, A, B, factor, c, s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, A, B, ctx.factor, ctx.c, ctx.s = inputs
        ctx.save_for_backward(weight, A, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[0]
        grad_weight = _weight_gradient(grad, weight, A, B, ctx.factor, ctx.c, ctx.s) if needs_weight else None
        grad_A, grad_B = fused.masked_gradients(grad.clone(), weight, A, B, ctx.factor == "mask", ctx.s)
        return grad_weight, grad_A, grad_B, None, None, None


class _SparseLora(torch.autograd.Function):
    # PyTorch inspects the signature in every call, which takes half as long without a parameter for each input.
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        _, weight, A, B, bias, factor, c, s, operation, dtype, _, _, effective = inputs
        if effective is None:
            effective = effective_weight(weight if isinstance(weight, Tensor) else weight(), A, B, factor, c, s)
        return operation.apply(inputs[0], effective.to(dtype or effective.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, A, B, _, ctx.factor, ctx.c, ctx.s, ctx.operation, _, values, scale, effective = inputs
        ctx.effective = effective
        ctx.weight = None if isinstance(weight, Tensor) else weight
        ctx.save_for_backward(
            x if values is None else values, scale, A, B, *([weight] if isinstance(weight, Tensor) else [])
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, A, B, *kept = ctx.saved_tensors
        W = ctx.weight() if ctx.weight else kept[0]
        needs_x, needs_W, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:5]
        operation, mask = ctx.operation, ctx.factor == "mask"
        grad_x = grad_W = grad_A = grad_B = None
        if needs_x:
            effective = ctx.effective
            if effective is None:
                effective = effective_weight(W, A, B, ctx.factor, ctx.c, ctx.s)
            grad_x = operation.grad_input(grad, x, effective.to(grad.dtype))
            del effective
        if scale is not None:
            grad_A, grad_B = eight_bit.factor_gradients(grad, x, scale, W, A, B, mask, ctx.s)
        elif needs_W or needs_A or needs_B:
            G = operation.grad_weight(grad, x, W)
            grad_W = _weight_gradient(G, W, A, B, ctx.factor, ctx.c, ctx.s) if needs_W else None
            grad_A, grad_B = fused.masked_gradients(G, W, A, B, mask, ctx.s)
        grad_bias = operation.grad_bias(grad) if needs_bias else None
        return grad_x, grad_W, grad_A, grad_B, grad_bias, *[None] * 8
