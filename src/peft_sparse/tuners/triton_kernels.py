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


# A tile of the matrix, (rows, columns). Registers hold it beside the operands of rank r.
TILE = (64, 128)
GRADIENT_TILE = (64, 128)
# Tensor cores multiply no fewer components than these.
LEAST_RANK = 16


@triton.jit
def _split_dot(left, right, TYPE: tl.constexpr):
    """Multiply `left`, which is exact in TYPE, by float32 `right`, which is split into two summands of TYPE."""
    high = right.to(TYPE)
    return tl.dot(left, (right - high.to(tl.float32)).to(TYPE), tl.dot(left, high))


@triton.jit
def _effective_weight_kernel(
    W, A, B, OUT, rows, columns, rank, c, s,
    a_batch, a_rank, a_column, b_batch, b_row, b_rank,
    MASK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    strips = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // strips * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, RANK)
    a = tl.load(
        A + expert * a_batch + k[:, None] * a_rank + column[None, :] * a_column,
        (k < rank)[:, None] & (column < columns)[None, :], 0.0,
    )  # fmt: skip
    b = tl.load(
        B + expert * b_batch + row[:, None] * b_row + k[None, :] * b_rank,
        (row < rows)[:, None] & (k < rank)[None, :], 0.0,
    )  # fmt: skip
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = (expert * rows + row[:, None]) * columns + column[None, :]
    w = tl.load(W + place, inside, 0.0)
    product = s * tl.dot(b, a, input_precision=PRECISION)
    wide = w.to(tl.float32)
    # The mask of a NaN is 1, as `w != 0` says it.
    result = tl.where(wide != 0, c * wide + product, 0.0) if MASK else wide * (c + product)
    tl.store(OUT + place, result.to(OUT.dtype.element_ty), inside)


@triton.jit
def _masked_gradients_kernel(
    G, W, A, B, DA, DB, rows, columns, rank, s,
    a_batch, a_rank, a_column, b_batch, b_row, b_rank,
    MASK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    strip, part, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = strip * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, RANK)
    known = (column < columns)[:, None] & (k < rank)[None, :]
    a = tl.load(
        A + expert * a_batch + column[:, None] * a_column + k[None, :] * a_rank, known, 0.0
    )  # fmt: skip
    grad_a = tl.zeros((COLUMNS, RANK), tl.float32)
    for tile in range(TILES):
        row = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = (expert * rows + row[:, None]) * columns + column[None, :]
        g = tl.load(G + place, inside, 0.0)
        w = tl.load(W + place, inside, 0.0)
        some = (row < rows)[:, None] & (k < rank)[None, :]
        b = tl.load(B + expert * b_batch + row[:, None] * b_row + k[None, :] * b_rank, some, 0.0)
        # Integers are the sums of an eight-bit product.
        TYPE: tl.constexpr = tl.float32 if G.dtype.element_ty == tl.int32 else G.dtype.element_ty
        g = g.to(TYPE)
        g = tl.where(w.to(tl.float32) != 0, g, 0.0) if MASK else (g.to(tl.float32) * w.to(tl.float32)).to(TYPE)
        if PRECISION == "split":
            g = g.to(tl.bfloat16)
            grad_b = _split_dot(g, a, tl.bfloat16)
            grad_a += _split_dot(tl.trans(g), b, tl.bfloat16)
        else:
            g = g.to(A.dtype.element_ty)
            grad_b = tl.dot(g, a, input_precision=PRECISION)
            grad_a = tl.dot(tl.trans(g), b, grad_a, input_precision=PRECISION)
        to = ((expert + strip * tl.num_programs(2)) * rows + row[:, None]) * rank + k[None, :]
        tl.store(DB + to, s * grad_b, some)
    to = ((expert + part * tl.num_programs(2)) * rank + k[None, :]) * columns + column[:, None]
    tl.store(DA + to, s * grad_a, known)


@triton.jit
def _quantise_kernel(X, SCALE, OUT, tokens, columns, padded, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
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


def _strides(A: Tensor, B: Tensor) -> tuple[int, ...]:
    a, b = ((0, *t.stride())[-3:] for t in (A, B))
    return (*a, *b)


def _rank(A: Tensor) -> int:
    return max(LEAST_RANK, triton.next_power_of_2(A.shape[-2]))


def _precision(A: Tensor) -> str:
    return "tf32x3" if A.dtype == torch.float32 else "ieee"


def effective_weight(weight: Tensor, A: Tensor, B: Tensor, mask: bool, c: float, s: float) -> Tensor:
    """Return the effective weight of a contiguous `weight`, as `fused.effective_weight` says it."""
    rows, columns = weight.shape[-2:]
    out = torch.empty_like(weight)
    grid: Any = (
        triton.cdiv(rows, TILE[0]) * triton.cdiv(columns, TILE[1]),
        weight.shape[0] if weight.dim() == 3 else 1,
    )
    _effective_weight_kernel[grid](
        weight, A, B, out, rows, columns, A.shape[-2], c, s, *_strides(A, B),
        MASK=mask, RANK=_rank(A), ROWS=TILE[0], COLUMNS=TILE[1], PRECISION=_precision(A),
    )  # fmt: skip
    return out


def masked_gradients(G: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: bool, s: float) -> tuple[Tensor, Tensor]:
    """Return dA and dB for contiguous G and `weight`, as `fused.masked_gradients` says."""
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
        G, weight, A, B, grad_A, grad_B, rows, columns, rank, s, *_strides(A, B),
        MASK=mask, RANK=_rank(A), ROWS=GRADIENT_TILE[0], COLUMNS=GRADIENT_TILE[1], TILES=tiles,
        PRECISION=_precision(A),
    )  # fmt: skip
    return grad_A.sum(0).view(A.shape).to(A.dtype), grad_B.sum(0).view(B.shape).to(B.dtype)


def tiles_of_program(rows: int, strips: int) -> int:
    """Return how many tiles of rows one program goes through: a power of two, so that few programs are compiled.

    Many tiles give few partial sums of dA. 512 programs keep a GPU busy.
    """
    tiles = 16
    while tiles > 2 and strips * triton.cdiv(rows, tiles * GRADIENT_TILE[0]) < 512:
        tiles //= 2
    return tiles


def eight_bits(x: Tensor, scale: Tensor, dtype: torch.dtype, padded: int) -> Tensor:
    """Return x / scale (tokens, columns) in eight bits, transposed to (columns, padded). Further tokens are zeros."""
    tokens, columns = x.shape
    out = torch.empty(columns, padded, dtype=dtype, device=x.device)
    grid: Any = (triton.cdiv(padded, 64), triton.cdiv(columns, 64))
    _quantise_kernel[grid](x, scale, out, tokens, columns, padded, TOKENS=64, COLUMNS=64)
    return out
