"""Triton kernels: the effective weight, the masked gradients and eight-bit columns, each in one pass over its matrix.

`fused` decides where they run, and imports this module only there, because it needs Triton. Products of rank r are
computed from float32 operands in three steps of TF32, which loses about 2^-21 of a product.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, import-not-found"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


# Tiles of the matrix (rows, columns) and warps for each of them, as they were fastest on an H200
# (docs/numbers/speed.md).
TILE, WARPS = (32, 128), 4
GRADIENT_TILE, GRADIENT_WARPS = (64, 64), 4
# Whether the gradients' products split float32 operands into two summands in bfloat16.
SPLIT = True
# Tensor cores multiply no fewer components than these.
LEAST_RANK = 16


@triton.jit
def _split_dot(left, right):
    """Multiply `left` in bfloat16 by `right` in float32, which is split into two summands in bfloat16."""
    high = right.to(tl.bfloat16)
    return tl.dot(left, (right - high.to(tl.float32)).to(tl.bfloat16), tl.dot(left, high))


@triton.jit(do_not_specialize=["rows"])
def _effective_weight_kernel(
    W, A, B, OUT, rows, columns, c, s,
    rank: tl.constexpr, MASK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    strips = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // strips * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, RANK)
    a = tl.load(
        A + (expert * rank + k[:, None]) * columns + column[None, :],
        (k < rank)[:, None] & (column < columns)[None, :], 0.0,
    )  # fmt: skip
    b = tl.load(
        B + (expert * rows + row[:, None]) * rank + k[None, :], (row < rows)[:, None] & (k < rank)[None, :], 0.0
    )
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = (expert * rows + row[:, None]) * columns + column[None, :]
    w = tl.load(W + place, inside, 0.0)
    product = s * tl.dot(b, a, input_precision=PRECISION)
    wide = w.to(tl.float32)
    # The mask of a NaN is 1, as `wide != 0` says it.
    result = tl.where(wide != 0, c * wide + product, 0.0) if MASK else wide * (c + product)
    tl.store(OUT + place, result.to(OUT.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _masked_gradients_kernel(
    G, W, A, B, DA, DB, rows, columns, s,
    rank: tl.constexpr, MASK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    strip, part, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    experts = tl.num_programs(2)
    column = strip * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, RANK)
    known = (column < columns)[:, None] & (k < rank)[None, :]
    a = tl.load(A + (expert * rank + k[None, :]) * columns + column[:, None], known, 0.0)
    grad_a = tl.zeros((COLUMNS, RANK), tl.float32)
    for tile in range(TILES):
        row = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = (expert * rows + row[:, None]) * columns + column[None, :]
        g = tl.load(G + place, inside, 0.0)
        w = tl.load(W + place, inside, 0.0)
        some = (row < rows)[:, None] & (k < rank)[None, :]
        b = tl.load(B + (expert * rows + row[:, None]) * rank + k[None, :], some, 0.0)
        # Integers are the sums of an eight-bit product.
        TYPE: tl.constexpr = tl.float32 if G.dtype.element_ty == tl.int32 else G.dtype.element_ty
        g = g.to(TYPE)
        g = tl.where(w.to(tl.float32) != 0, g, 0.0) if MASK else (g.to(tl.float32) * w.to(tl.float32)).to(TYPE)
        if PRECISION == "split":
            g = g.to(tl.bfloat16)
            grad_b = _split_dot(g, a)
            grad_a += _split_dot(tl.trans(g), b)
        else:
            g = g.to(A.dtype.element_ty)
            grad_b = tl.dot(g, a, input_precision=PRECISION)
            grad_a = tl.dot(tl.trans(g), b, grad_a, input_precision=PRECISION)
        to = ((strip * experts + expert) * rows + row[:, None]) * rank + k[None, :]
        tl.store(DB + to, s * grad_b, some)
    to = ((part * experts + expert) * rank + k[None, :]) * columns + column[:, None]
    tl.store(DA + to, s * grad_a, known)


@triton.jit(do_not_specialize=["tokens"])
def _eight_bits_kernel(X, SCALE, OUT, tokens, columns, padded, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    x = tl.load(X + token[:, None].to(tl.int64) * columns + column[None, :], inside, 0.0).to(tl.float32)
    x = x / tl.load(SCALE + column, column < columns, 1.0)[None, :]
    if OUT.dtype.element_ty == tl.int8:
        # Adding and subtracting 1.5 · 2^23 rounds to the nearest integer, halves to even ones.
        x = (x + 12582912.0) - 12582912.0
    to = column[:, None].to(tl.int64) * padded + token[None, :]
    tl.store(OUT + to, tl.trans(x).to(OUT.dtype.element_ty), (column < columns)[:, None] & (token < padded)[None, :])


def _rank(A: Tensor) -> int:
    return max(LEAST_RANK, triton.next_power_of_2(A.shape[-2]))


def effective_weight(weight: Tensor, A: Tensor, B: Tensor, mask: bool, c: float, s: float) -> Tensor:
    """Return the effective weight of contiguous tensors, as `fused.effective_weight` says it."""
    rows, columns = weight.shape[-2:]
    out = torch.empty_like(weight)
    grid: Any = (
        triton.cdiv(rows, TILE[0]) * triton.cdiv(columns, TILE[1]),
        weight.shape[0] if weight.dim() == 3 else 1,
    )
    _effective_weight_kernel[grid](
        weight, A, B, out, rows, columns, float(c), float(s), A.shape[-2], MASK=mask, RANK=_rank(A), ROWS=TILE[0],
        COLUMNS=TILE[1], PRECISION="tf32x3" if A.dtype == torch.float32 else "ieee", num_warps=WARPS,
    )  # fmt: skip
    return out


def masked_gradients(G: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: bool, s: float) -> tuple[Tensor, Tensor]:
    """Return dA and dB of contiguous tensors, as `fused.masked_gradients` says it."""
    rows, columns = weight.shape[-2:]
    experts, rank = (weight.shape[0] if weight.dim() == 3 else 1), A.shape[-2]
    strips = triton.cdiv(columns, GRADIENT_TILE[1])
    tiles = tiles_of_program(rows, strips * experts)
    parts = triton.cdiv(rows, tiles * GRADIENT_TILE[0])
    # Partial sums instead of atomic additions, so that a step gives the same bits whenever it is repeated.
    grad_A = torch.empty(parts, experts, rank, columns, dtype=torch.float32, device=weight.device)
    grad_B = torch.empty(strips, experts, rows, rank, dtype=torch.float32, device=weight.device)
    grid: Any = (strips, parts, experts)
    _masked_gradients_kernel[grid](
        G, weight, A, B, grad_A, grad_B, rows, columns, float(s), rank, MASK=mask, RANK=_rank(A),
        ROWS=GRADIENT_TILE[0], COLUMNS=GRADIENT_TILE[1], TILES=tiles, PRECISION=_gradient_precision(G, A),
        num_warps=GRADIENT_WARPS,
    )  # fmt: skip
    return grad_A.sum(0).view(A.shape).to(A.dtype), grad_B.sum(0).view(B.shape).to(B.dtype)


def _gradient_precision(G: Tensor, A: Tensor) -> str:
    if A.dtype != torch.float32:
        return "ieee"
    # G in bfloat16 has eight bits. The numbers of float16 are too few for such a split.
    return "split" if SPLIT and G.dtype in (torch.bfloat16, torch.int32) else "tf32x3"


def tiles_of_program(rows: int, strips: int) -> int:
    """Return how many tiles of rows one program goes through: one of two numbers, so that few programs are compiled.

    Many tiles give few partial sums of dA. 400 programs keep a GPU busy.
    """
    return 16 if strips * triton.cdiv(rows, 16 * GRADIENT_TILE[0]) >= 400 else 4


def eight_bits(x: Tensor, scale: Tensor, dtype: torch.dtype, padded: int) -> Tensor:
    """Return x / scale (tokens, columns) in eight bits, transposed to (columns, padded). Further tokens are zeros."""
    tokens, columns = x.shape
    out = torch.empty(columns, padded, dtype=dtype, device=x.device)
    grid: Any = (triton.cdiv(padded, 64), triton.cdiv(columns, 64))
    _eight_bits_kernel[grid](x, scale, out, tokens, columns, padded, TOKENS=64, COLUMNS=64)
    return out
