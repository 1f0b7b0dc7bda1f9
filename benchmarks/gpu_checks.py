"""Checks of `benchmarks/gpu.py`: what the device computes is what the CPU computes, up to rounding."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_sparse.tuners import eight_bit, fused
from peft_sparse.tuners.functional import Factor, effective_weight

from common import DEVICE


Row = dict[str, Any]


def relative_error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return float((found - exact).norm() / exact.norm())


def formulas(size: int, rank: int) -> Iterator[Row]:
    """Compare effective weights and gradients on the device with the operations on the CPU in float64."""
    rows, columns = size // 4 + 5, size // 4 + 3
    for dtype, adapter_dtype in (
        (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ):  # fmt: skip
        weight = torch.randn(rows, columns).masked_fill_(torch.rand(rows, columns) < 0.5, 0).to(dtype)
        A, B = torch.randn(rank, columns).to(adapter_dtype), torch.randn(rows, rank).to(adapter_dtype)
        G = torch.randn(rows, columns).to(dtype)
        factors: tuple[Factor, ...] = ("mask", "weight")
        for factor in factors:
            mask = factor == "mask"
            W, left, right = (t.to(DEVICE) for t in (weight, A, B))
            exact = weight.double(), A.double(), B.double()
            found = effective_weight(W, left, right, factor, 1.0, 2.0)
            gradients = fused.masked_gradients(G.clone().to(DEVICE), W, left, right, mask, 2.0)
            expected = fused.masked_gradients(G.double(), *exact, mask, 2.0)
            errors = {"effective weight": relative_error(found, fused.effective_weight(*exact, mask, 1.0, 2.0))}
            errors |= {f"d{name}": relative_error(one, other) for name, one, other in zip("AB", gradients, expected)}  # noqa: B905
            allowed = 3 * max(torch.finfo(dtype).eps, torch.finfo(adapter_dtype).eps, 1e-6)
            for name, error in errors.items():
                yield checked(f"{factor}, {dtype}, A in {adapter_dtype}: {name}", error, allowed)
            zeros = int((found.cpu()[weight == 0] != 0).sum())
            yield checked(f"{factor}, {dtype}, A in {adapter_dtype}: zeros that changed", zeros, 0)


def checked(name: str, error: float, allowed: float) -> Row:
    return {"check": name, "error": error, "allowed": allowed, "passed": error <= allowed}


def eight_bit_gradients(size: int, rank: int, dtype: torch.dtype) -> Iterator[Row]:
    """Compare gradients from numbers of eight bits with float64, columns of zeros included."""
    rows, columns = size, size // 2
    weight = torch.randn(rows, columns).masked_fill_(torch.rand(rows, columns) < 0.5, 0)
    A, B = torch.randn(rank, columns), torch.randn(rows, rank)
    x, D = torch.randn(100, columns), torch.randn(100, rows)
    x[:, 3] = D[:, 5] = 0
    exact = fused.masked_gradients(D.double().T @ x.double(), weight.double(), A.double(), B.double(), True, 2.0)
    there = weight.to(DEVICE, dtype), A.to(DEVICE), B.to(DEVICE)
    most: dict[eight_bit.GradientDtype, float] = {"int8": 0.03, "fp8": 0.06}
    for kind, allowed in most.items():
        kept = eight_bit.quantised(x.to(DEVICE, dtype), kind)
        found = eight_bit.factor_gradients(D.to(DEVICE, dtype), *kept, *there, True, 2.0)
        for name, one, other in zip(("dA", "dB"), found, exact, strict=True):
            yield checked(f"{kind}: {name}", relative_error(one, other), allowed)


def pruned_alike(base: nn.Module, ids: Tensor, ways: Mapping[str, Callable[[Any, Tensor], Any]]) -> Iterator[Row]:
    """Prune copies of a float32 model on the device and on the CPU in several ways; compare weights and zeros."""
    for name, way in ways.items():
        here: Any = copy.deepcopy(base).cpu()
        there: Any = copy.deepcopy(base)
        way(here, ids)
        way(there, ids.to(DEVICE))
        pairs = list(zip(there.model.layers.parameters(), here.model.layers.parameters(), strict=True))
        # The least-squares solver and the fit stop or step by sums that are rounded differently.
        allowed = 1e-2 if name in ("update", "reconstruct") else 1e-3
        yield checked(f"{name}, weights", max(relative_error(*pair) for pair in pairs), allowed)
        yield checked(f"{name}, other zeros", sum(int(((a == 0).cpu() ^ (b == 0)).sum()) for a, b in pairs), 0)
