"""The product G = D^T x of backward in eight bits, for dA and dB alone.

Both operands are divided by a scale for each column and rounded to eight bits: D (tokens, out) and x (tokens, in). G
is the sum over tokens, so the scales factor out of it, G = diag(d) D'^T x' diag(e). They go into A and B instead:

    dA = s B^T (H ⊙ G) = s (diag(d) B)^T (H ⊙ D'^T x') diag(e),    dB = s diag(d) (H ⊙ D'^T x') (A diag(e))^T

x' takes the place of x until backward. Each row holds the tokens of one column, because the hardware multiplies
eight-bit numbers along rows.
"""

from typing import Literal

import torch
from torch import Tensor

from . import fused


GradientDtype = Literal["int8", "fp8"]

DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# A column of zeros is divided by this scale.
LEAST_SCALE = 1e-30
# Sums of products of numbers up to 127 fit into 32 bits.
MOST_TOKENS = (2**31 - 1) // 127**2
MULTIPLE = 16

# Read once, because `torch.compile` does not trace the question.
_ONEDNN = torch.backends.mkldnn.is_available()


def quantised(x: Tensor, name: GradientDtype) -> tuple[Tensor, Tensor]:
    """Return x in eight bits, transposed and padded to a multiple of 16 tokens, and its scales.

    Layers that receive the same tensor share the result.

    Args:
        x: (..., columns).
        name: "int8" for integers up to 127, or "fp8" for `torch.float8_e4m3fn`.

    Returns:
        x' (columns, padded tokens) and the scales (columns,) in float32: x is about x'^T times the scales.
    """
    key = None if torch.compiler.is_compiling() else (name, x._version)
    if key is not None and (known := getattr(x, "_peft_sparse_eight_bits", None)) and known[0] == key:
        values, scale = known[1]
        return values, scale
    dtype = DTYPES[name]
    rows = x.detach().reshape(-1, x.shape[-1])
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    # Infinity and NaN reach the scale, and with it the gradient.
    # Not `torch.linalg.vector_norm` or `torch.aminmax`, which take 10 times as long on CPUs.
    scale = torch.maximum(-rows.amin(0), rows.amax(0)).float().div_(largest).clamp_min_(LEAST_SCALE)
    result = fused.eight_bits(rows, scale, dtype, -(-len(rows) // MULTIPLE) * MULTIPLE), scale
    if key is not None:
        x._peft_sparse_eight_bits = key, result  # type: ignore[attr-defined]
    return result


def factor_gradients(
    grad: Tensor, values: Tensor, scale: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: bool, s: float
) -> tuple[Tensor, Tensor]:
    """Return dA and dB from the input x in eight bits.

    Where the hardware multiplies numbers of eight bits, D = `grad` is rounded to eight bits too. Elsewhere x is
    multiplied in the dtype of `grad`.

    Args:
        grad: D = dL/dy, (..., out).
        values, scale: what `quantised` returned for x.
        weight: W (out, in).
        A: (r, in).
        B: (out, r).
        mask: whether H is the mask of W.
        s: factor of H ⊙ (BA).
    """
    D = grad.reshape(-1, grad.shape[-1])
    if not _multiplies(values, D):
        x = values[:, : len(D)].T.to(D.dtype) * scale.to(D.dtype)
        return fused.masked_gradients(D.T @ x, weight, A, B, mask, s)
    rows, row_scale = quantised(D, "int8" if values.dtype == torch.int8 else "fp8")
    G = _product(rows, values)
    # float32, because scales of gradients underflow in float16.
    grad_A, grad_B = fused.masked_gradients(G, weight, A.float() * scale, B.float() * row_scale[:, None], mask, s)
    return (grad_A * scale).to(A.dtype), (grad_B * row_scale[:, None]).to(B.dtype)


def _multiplies(values: Tensor, D: Tensor) -> bool:
    """Return whether the hardware multiplies these matrices in eight bits."""
    rows, columns = D.shape[1], len(values)
    if rows % MULTIPLE or columns % MULTIPLE or rows <= MULTIPLE:
        return False
    cuda = D.device.type == "cuda" and torch.version.hip is None
    if values.dtype != torch.int8:
        return cuda and torch.cuda.get_device_capability(D.device) >= (8, 9)
    fast = cuda or (D.device.type == "cpu" and _ONEDNN)
    return fast and values.shape[1] <= MOST_TOKENS


def _product(rows: Tensor, values: Tensor) -> Tensor:
    if values.dtype == torch.int8:
        return torch._int_mm(rows, values.T)
    one = torch.ones((), device=rows.device)
    return torch._scaled_mm(rows, values.T, one, one, out_dtype=torch.bfloat16)
