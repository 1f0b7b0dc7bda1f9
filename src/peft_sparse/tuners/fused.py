"""Decides how effective weights and masked gradients are computed: by Triton kernels, or by PyTorch's operations.

Both compute the same up to rounding, in training and in merging alike:

| where | how |
| --- | --- |
| an NVIDIA GPU of compute capability 8.0 or higher, with Triton | the kernels of `triton_kernels` |
| elsewhere, and for tensors that the kernels do not serve       | PyTorch's operations            |

The environment variable `PEFT_SPARSE_FUSED=0` leaves everything to PyTorch's operations. The kernels are operators of
PyTorch, so `torch.compile` puts them into its graphs, and profilers and fake tensors know them.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.masks import mask_


# Kernels hold operands of this rank in registers and shared memory.
LARGEST_RANK = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Not DTensor, nor another class whose values are elsewhere or packed.
PLAIN = (Tensor, nn.Parameter)
# On a CPU, matrices of more than twice these bytes are worked on in parts of as many. Several operations read each
# part, which stays in the cache meanwhile. Smaller matrices gain less than the further calls take.
PART_BYTES = 2**21

_TRITON = importlib.util.find_spec("triton") is not None and torch.version.hip is None
# It must live as long as its operators are called.
_LIBRARY = torch.library.Library("peft_sparse", "DEF")
_LIBRARY.define("effective_weight(Tensor weight, Tensor A, Tensor B, bool mask, float c, float s) -> Tensor")
_LIBRARY.define(
    "masked_gradients(Tensor G, Tensor weight, Tensor A, Tensor B, bool mask, float s) -> (Tensor, Tensor)"
)
_LIBRARY.define("eight_bits(Tensor x, Tensor scale, ScalarType dtype, int padded) -> Tensor")


def has_kernels(device: torch.device) -> bool:
    """Return whether Triton kernels run on `device`, and are not switched off."""
    return (
        _TRITON
        and device.type == "cuda"
        and os.environ.get("PEFT_SPARSE_FUSED", "1") != "0"
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def effective_weight(weight: Tensor, A: Tensor, B: Tensor, mask: bool, c: float, s: float) -> Tensor:
    """Return c · W + s · H ⊙ (BA), computed in A's dtype and rounded once to W's dtype. H is the mask of W, or W.

    Args:
        weight: W (out, in), or (experts, out, in).
        A: (r, in), or (experts, r, in).
        B: (out, r), or (experts, out, r).
        mask: whether H is the mask of W.
        c: factor of W.
        s: factor of H ⊙ (BA).
    """
    if not _serves(weight, A, B):
        device = weight.device.type
        # Autocast would round the product to its own dtype. Some devices, such as "meta", have no autocast.
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return plain_effective_weight(weight, A, B, mask, c, s)
        return plain_effective_weight(weight, A, B, mask, c, s)
    if weight.is_contiguous():
        return torch.ops.peft_sparse.effective_weight(weight, A.contiguous(), B.contiguous(), mask, c, s)
    left, right = A.mT.contiguous(), B.mT.contiguous()
    return torch.ops.peft_sparse.effective_weight(weight.mT, right, left, mask, c, s).mT


def masked_gradients(G: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: bool, s: float) -> tuple[Tensor, Tensor]:
    """Return dA = s B^T (H ⊙ G) and dB = s (H ⊙ G) A^T. H is the mask of W, or W. G may be overwritten.

    Args:
        G: (out, in), or (experts, out, in): floating-point numbers, or integers of 32 bits.
        weight: W, of the same shape.
        A: (r, in), or (experts, r, in).
        B: (out, r), or (experts, out, r).
        mask: whether H is the mask of W.
        s: the factor.
    """
    if not _serves(weight, A, B) or G.dtype not in (*DTYPES, torch.int32):
        return plain_masked_gradients(G, weight, A, B, mask, s)
    if weight.is_contiguous():
        return torch.ops.peft_sparse.masked_gradients(G.contiguous(), weight, A.contiguous(), B.contiguous(), mask, s)
    left, right = A.mT.contiguous(), B.mT.contiguous()
    grad_B, grad_A = torch.ops.peft_sparse.masked_gradients(G.mT.contiguous(), weight.mT, right, left, mask, s)
    return grad_A.mT, grad_B.mT


def eight_bits(x: Tensor, scale: Tensor, dtype: torch.dtype, padded: int) -> Tensor:
    """Return x / scale in eight bits, transposed to (columns, padded). Tokens that x does not have are zeros.

    Args:
        x: (tokens, columns).
        scale: (columns,), float32.
        dtype: `torch.int8`, to which numbers are rounded, or a floating-point dtype of eight bits.
        padded: number of tokens in the result, not less than those of x.
    """
    if has_kernels(x.device) and type(x) in PLAIN and x.dtype in DTYPES and x.is_contiguous():
        return torch.ops.peft_sparse.eight_bits(x, scale, dtype, padded)
    scaled = x / scale
    result = (scaled.round_() if dtype == torch.int8 else scaled).to(dtype).T
    missing = padded - len(x)
    if not missing:
        return result.contiguous()
    return torch.cat([result, torch.zeros(len(result), missing, device=x.device).to(dtype)], 1)


def _serves(weight: Tensor, A: Tensor, B: Tensor) -> bool:
    """Return whether the kernels compute with these tensors."""
    return (
        has_kernels(weight.device)
        and all(type(tensor) in PLAIN for tensor in (weight, A, B))
        and A.device == B.device == weight.device
        and weight.dtype in DTYPES
        and A.dtype == B.dtype
        and A.dtype in (torch.float32, weight.dtype)
        and A.shape[-2] <= LARGEST_RANK
        and 0 not in (*weight.shape, *A.shape)
        and (weight.is_contiguous() or weight.mT.is_contiguous())
    )


def parts(rows: int, count: int) -> Iterator[slice]:
    """Yield slices of `rows` rows: `count` or fewer, whose lengths are multiples of 16 but for the last one."""
    # Products take longer with other numbers of rows.
    length = -(-rows // (max(1, count) * 16)) * 16
    for start in range(0, rows, length):
        yield slice(start, min(start + length, rows))


def _parts(matrix: Tensor, *others: Tensor) -> list[slice]:
    """Return the parts in which `matrix` is worked on together with others, as slices of its rows. [] for no parts."""
    count = matrix.numel() * matrix.element_size() // PART_BYTES
    if count < 2 or not matrix.is_cpu or not matrix.is_contiguous() or torch.compiler.is_compiling():
        return []
    if not all(type(tensor) in PLAIN and tensor.dim() == 2 for tensor in (matrix, *others)):
        return []
    return list(parts(len(matrix), count))


def plain_effective_weight(
    weight: Tensor, A: Tensor, B: Tensor, mask: bool, c: float, s: float, out: Tensor | None = None
) -> Tensor:
    """Compute `effective_weight` by PyTorch's operations. `out` is a tensor like W to which the result is written."""
    if rows := _parts(weight, A, B):
        out = torch.empty_like(weight) if out is None else out
        for part in rows:
            _effective_part(weight[part], A, B[part], mask, c, s, out[part])
        return out
    return _effective_part(weight, A, B, mask, c, s, out)


def _effective_part(
    weight: Tensor, A: Tensor, B: Tensor, mask: bool, c: float, s: float, out: Tensor | None
) -> Tensor:
    exact = weight.to(A.dtype)
    add_product = torch.addmm if exact.dim() == 2 else torch.baddbmm
    result = add_product(exact, B, A, beta=c if mask else 0, alpha=s, out=out if exact is weight else None)
    if mask:
        mask_(result, exact)
    elif c == 1:
        # One pass over the matrix, where adding c and multiplying takes two.
        torch.addcmul(exact, exact, result, out=result)
    else:
        if c:
            result.add_(c)
        result.mul_(exact)
    if exact is weight:
        return result
    return result.to(weight.dtype) if out is None else out.copy_(result)


def plain_masked_gradients(
    G: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: bool, s: float
) -> tuple[Tensor, Tensor]:
    """Compute `masked_gradients` by PyTorch's operations."""
    if not (rows := _parts(G, weight, A, B)):
        G = _masked(G, weight, A, mask)
        product = torch.addmm if G.dim() == 2 else torch.baddbmm
        # With a factor beta of 0 the first argument gives its shape alone. alpha spares a pass that multiplies by s.
        return product(A, B.mT, G, beta=0, alpha=s), product(B, G, A.mT, beta=0, alpha=s)
    grad_A, grad_B = torch.empty_like(A), torch.empty_like(B)
    for part in rows:
        masked = _masked(G[part], weight[part], A, mask)
        torch.addmm(grad_A, B[part].mT, masked, beta=1 if part.start else 0, alpha=s, out=grad_A)
        torch.addmm(grad_B[part], masked, A.mT, beta=0, alpha=s, out=grad_B[part])
    return grad_A, grad_B


def _masked(G: Tensor, weight: Tensor, A: Tensor, mask: bool) -> Tensor:
    """Return H ⊙ G in A's dtype. G may be overwritten."""
    G = G if G.is_floating_point() else G.to(A.dtype)
    return (mask_(G, weight) if mask else G.mul_(weight)).to(A.dtype)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Let Triton launch on `device`. Entering a context takes time, and it is rarely another device."""
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@torch.library.impl(_LIBRARY, "effective_weight", "CUDA")
def _(weight: Tensor, A: Tensor, B: Tensor, mask: bool, c: float, s: float) -> Tensor:
    from . import triton_kernels

    with _on(weight.device):
        return triton_kernels.effective_weight(weight, A, B, mask, c, s)


@torch.library.impl(_LIBRARY, "masked_gradients", "CUDA")
def _(G: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: bool, s: float) -> tuple[Tensor, Tensor]:
    from . import triton_kernels

    with _on(weight.device):
        return triton_kernels.masked_gradients(G, weight, A, B, mask, s)


@torch.library.impl(_LIBRARY, "eight_bits", "CUDA")
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, padded: int) -> Tensor:
    from . import triton_kernels

    with _on(x.device):
        return triton_kernels.eight_bits(x, scale, dtype, padded)


@torch.library.register_fake("peft_sparse::effective_weight", lib=_LIBRARY)
def _(weight: Tensor, A: Tensor, B: Tensor, mask: bool, c: float, s: float) -> Tensor:
    return torch.empty_like(weight)


@torch.library.register_fake("peft_sparse::masked_gradients", lib=_LIBRARY)
def _(G: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: bool, s: float) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), B.new_empty(B.shape)


@torch.library.register_fake("peft_sparse::eight_bits", lib=_LIBRARY)
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, padded: int) -> Tensor:
    return x.new_empty((x.shape[1], padded), dtype=dtype)
