import math

import pytest
import torch
import torch.nn.functional as F

from peft_sparse.tuners.functional import (
    Convolution,
    effective_weight,
    scale_rows_and_columns,
    sparse_lora,
    stacked_effective_weight,
)


MASK = {"factor": "mask", "c": 1.0, "s": 1.7}
SCALED = {"factor": "weight", "c": 0.0, "s": 1.0}
SOFT = {"factor": "weight", "c": 0.4, "s": 0.6}
RESIDUAL = {"factor": "weight", "c": 1.0, "s": 1.7}
UPDATE = {"factor": "mask", "c": 0.0, "s": 0.3}
FORMULAS = pytest.mark.parametrize(
    "formula", [MASK, SCALED, SOFT, RESIDUAL, UPDATE], ids=["mask", "scaled", "soft", "residual", "update"]
)


def problem(dtype=torch.float64, adapter_dtype=None, bias=True):
    adapter_dtype = adapter_dtype or dtype
    weight = torch.randn(7, 5, dtype=dtype).masked_fill_(torch.rand(7, 5) < 0.5, 0)
    A = torch.randn(3, 5, dtype=adapter_dtype, requires_grad=True)
    B = torch.randn(7, 3, dtype=adapter_dtype, requires_grad=True)
    x = torch.randn(2, 4, 5, dtype=dtype, requires_grad=True)
    return x, weight, A, B, torch.randn(7, dtype=dtype, requires_grad=True) if bias else None


def plain_weight(weight, A, B, factor, c, s):
    H = (weight != 0).to(weight) if factor == "mask" else weight
    return c * weight + s * H * (B @ A)


def plain_formula(x, weight, A, B, bias, **formula):
    return F.linear(x, plain_weight(weight, A, B, **formula), bias)


@FORMULAS
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_formula(formula, bias):
    x, weight, A, B, b = problem(bias=bias)
    wanted = [t for t in (x, A, B, b) if t is not None]
    upstream = torch.randn(2, 4, 7, dtype=torch.float64)
    ours, theirs = sparse_lora(x, weight, A, B, b, **formula), plain_formula(x, weight, A, B, b, **formula)
    torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(theirs, wanted, upstream)
    for one, other in zip(torch.autograd.grad(ours, wanted, upstream), expected, strict=True):
        torch.testing.assert_close(one, other)


@FORMULAS
def test_an_input_without_a_batch_gives_the_gradients_of_a_batch_of_one(formula):
    x, weight, A, B, bias = problem()
    gradients = []
    for one in (x[0, 0], x[:1, 0]):
        y = sparse_lora(one, weight, A, B, bias, **formula)
        assert y.shape == (*one.shape[:-1], 7)
        gradients.append(torch.autograd.grad(y.square().sum(), (x, A, B, bias)))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@FORMULAS
def test_gradcheck(formula):
    x, weight, A, B, bias = problem()
    assert torch.autograd.gradcheck(lambda *args: sparse_lora(args[0], weight, *args[1:], **formula), (x, A, B, bias))


CONVOLUTIONS = [
    Convolution((7, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    Convolution((6, 2, 3, 1), (2, 1), (0, 2), (1, 2), 2),
]


@FORMULAS
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=["plain", "strided, dilated, in groups"])
def test_convolutions(formula, convolution):
    rows, columns = convolution.kernel[0], math.prod(convolution.kernel[1:])
    weight = torch.randn(rows, columns, dtype=torch.float64).masked_fill_(torch.rand(rows, columns) < 0.5, 0)
    tensors = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, columns), (rows, 3), (rows,))
    ]
    A, B, bias = tensors
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    ours = sparse_lora(x, weight, A, B, bias, operation=convolution, **formula)
    kernel = plain_weight(weight, A, B, **formula).view(convolution.kernel)
    geometry = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    theirs = F.conv2d(x, kernel, bias, *geometry)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, (x, *tensors), upstream)
    for one, other in zip(torch.autograd.grad(ours, (x, *tensors), upstream), expected, strict=True):
        torch.testing.assert_close(one, other)


@FORMULAS
def test_stacked_weights(formula):
    weight = torch.randn(4, 7, 5, dtype=torch.float64).masked_fill_(torch.rand(4, 7, 5) < 0.5, 0)
    A = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    B = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        stacked_effective_weight(weight, A, B, **formula), plain_weight(weight, A, B, **formula)
    )
    assert torch.autograd.gradcheck(lambda A, B: stacked_effective_weight(weight, A, B, **formula), (A, B))


def test_rank_one_scaling_is_the_general_formula():
    x, weight, _, _, bias = problem()
    a = torch.randn(5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(7, dtype=torch.float64, requires_grad=True)
    general = sparse_lora(x, weight, a[None], b[:, None], bias, **SCALED)
    torch.testing.assert_close(scale_rows_and_columns(x, weight, a, b, bias), general)
    assert torch.autograd.gradcheck(lambda *args: scale_rows_and_columns(args[0], weight, *args[1:]), (x, a, b, bias))


def test_rank_one_scaling_keeps_nothing_of_the_size_of_the_weight():
    weight, x = torch.randn(64, 48), torch.randn(3, 48, requires_grad=True)
    a, b = torch.ones(48, requires_grad=True), torch.ones(64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scale_rows_and_columns(x, weight, a, b, None)
    assert [t.data_ptr() for t in saved if t.numel() >= weight.numel()] == [weight.data_ptr()]


def test_only_the_wanted_gradients_are_computed():
    x, weight, A, B, bias = problem()
    sparse_lora(x.detach(), weight, A.detach(), B, bias.detach(), **MASK).sum().backward()
    assert x.grad is A.grad is bias.grad is None
    assert B.grad is not None


@FORMULAS
def test_nothing_but_references_is_kept_for_backward(formula):
    x, weight, A, B, bias = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        sparse_lora(x, weight, A, B, bias, **formula)
    assert set(saved) == {t.data_ptr() for t in (x, weight, A, B)}


def test_a_costly_weight_is_computed_twice_and_never_kept():
    x, weight, A, B, bias = problem()
    calls = []

    def dequantise():
        calls.append(0)
        return weight.clone()

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = sparse_lora(x, dequantise, A, B, bias, **MASK)
    y.sum().backward()
    assert set(saved) == {t.data_ptr() for t in (x, A, B)}
    assert len(calls) == 2
    torch.testing.assert_close(y, sparse_lora(x, weight, A, B, bias, **MASK))


def test_transposed_weights_need_no_copy():
    x, weight, A, B, bias = problem()
    stored = weight.T.contiguous()
    torch.testing.assert_close(
        sparse_lora(x, stored.T, A, B, bias, **MASK), sparse_lora(x, weight, A, B, bias, **MASK)
    )


@FORMULAS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_with_float32_adapters_without_autocast(formula, dtype):
    x, weight, A, B, bias = problem(dtype, torch.float32)
    y = sparse_lora(x, weight, A, B, bias, **formula)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, A.grad.dtype) == (dtype, dtype, torch.float32)
    exact = plain_formula(*(t.detach().double() for t in (x, weight, A, B, bias)), **formula)
    torch.testing.assert_close(y.double(), exact, rtol=5e-2, atol=5e-2)
    # Rounded once: the merged weight is the very one that was trained with.
    assert torch.equal(y, F.linear(x, effective_weight(weight, A, B, **formula), bias))


@FORMULAS
def test_autocast_is_followed(formula):
    x, weight, A, B, bias = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_lora(x, weight, A, B, bias, **formula)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, A.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@FORMULAS
@pytest.mark.parametrize("experts", [(), (4,)], ids=["matrix", "experts"])
def test_autocast_does_not_round_the_effective_weight(formula, experts):
    weight, A, B = torch.randn(*experts, 7, 5), torch.randn(*experts, 3, 5), torch.randn(*experts, 7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = effective_weight(weight, A, B, **formula)
    assert torch.equal(found, effective_weight(weight, A, B, **formula))


@FORMULAS
def test_zeros_stay_zeros(formula):
    _, weight, A, B, _ = problem()
    merged = effective_weight(weight, A, B, **formula).detach()
    assert torch.equal(merged == 0, weight == 0)
