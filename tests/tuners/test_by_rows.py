"""The layer on a CPU gives what the formula and autograd give, whole or by rows, and in all that a caller can do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_sparse.tuners import by_rows, fused
from peft_sparse.tuners.functional import Factor, sparse_lora


def inputs(rows: int = 40, columns: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    weight = torch.randn(rows, columns, dtype=dtype)
    weight[torch.rand(rows, columns) < 0.5] = 0
    shapes = ((2, 3, columns), (4, columns), (rows, 4), (rows,))
    x, A, B, bias = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return x, weight, A, B, bias


def output(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, factor: Factor, c: float) -> Tensor:
    return sparse_lora(x, weight, A, B, bias, factor=factor, c=c, s=2.0)


def formula(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, factor: Factor, c: float) -> Tensor:
    H = (weight != 0).to(weight.dtype) if factor == "mask" else weight
    return F.linear(x, c * weight + 2.0 * H * (B @ A), bias)


@pytest.mark.parametrize("rows", [10, 40])
@pytest.mark.parametrize(
    ("factor", "c", "biased"), [("mask", 1.0, True), ("weight", 1.0, False), ("weight", -1.0, True)]
)
def test_output_and_gradients_are_those_of_the_formula_whole_and_by_rows(
    rows: int, factor: Factor, c: float, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "ROWS", 16)
    monkeypatch.setattr(fused, "PART_BYTES", 24 * 8 * 16)
    x, weight, A, B, bias = inputs(rows)
    leaves = [x, A, B, bias] if biased else [x, A, B]
    given = bias if biased else None
    assert by_rows.serves(x, weight, A, B)
    found, expected = (f(x, weight, A, B, given, factor, c) for f in (output, formula))
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad))


def test_a_step_by_rows_holds_one_matrix_of_the_size_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_rows, "ROWS", 16)
    x, weight, A, B, _ = inputs(160, 24)
    with torch.profiler.profile(profile_memory=True) as profiler:
        output(x, weight, A, B, None, "mask", 1.0).sum().backward()
    whole = weight.numel() * weight.element_size()
    sizes = [event.cpu_memory_usage for event in profiler.events() if event.name == "aten::empty_like"]
    assert sum(size >= whole for size in sizes) == 1


def test_a_second_derivative_is_refused() -> None:
    x, weight, A, B, bias = inputs()
    (gradient,) = torch.autograd.grad(output(x, weight, A, B, bias, "mask", 1.0).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_functional_transforms_compute_the_same_gradient() -> None:
    x, weight, A, B, bias = inputs()
    found = torch.func.grad(lambda A: output(x, weight, A, B, bias, "mask", 1.0).square().sum())(A)
    (expected,) = torch.autograd.grad(formula(x, weight, A, B, bias, "mask", 1.0).square().sum(), A)
    torch.testing.assert_close(found, expected)


def test_half_precision_large_weights_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight, A, B, _ = (t.detach() for t in inputs(dtype=torch.float32))
    half = weight.bfloat16()
    whole = fused.effective_weight(half, A, B, True, 1.0, 2.0)
    gradients = fused.masked_gradients(torch.ones_like(half), half, A, B, True, 2.0)
    monkeypatch.setattr(fused, "PART_BYTES", 24 * 2 * 16)
    torch.testing.assert_close(fused.effective_weight(half, A, B, True, 1.0, 2.0), whole)
    torch.testing.assert_close(fused.masked_gradients(torch.ones_like(half), half, A, B, True, 2.0), gradients)
