import pytest
import torch
import torch.nn.functional as F

from peft_sparse.functional import mask_lora_linear, masked_weight


def problem(dtype=torch.float64, adapter_dtype=None, bias=True):
    adapter_dtype = adapter_dtype or dtype
    weight = torch.randn(7, 5, dtype=dtype).masked_fill_(torch.rand(7, 5) < 0.5, 0)
    A = torch.randn(3, 5, dtype=adapter_dtype, requires_grad=True)
    B = torch.randn(7, 3, dtype=adapter_dtype, requires_grad=True)
    x = torch.randn(2, 4, 5, dtype=dtype, requires_grad=True)
    return x, weight, A, B, torch.randn(7, dtype=dtype, requires_grad=True) if bias else None


def plain_formula(x, weight, A, B, bias, scaling):
    return F.linear(x, weight + scaling * (weight != 0) * (B @ A), bias)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_formula(bias):
    x, weight, A, B, b = problem(bias=bias)
    wanted = [t for t in (x, A, B, b) if t is not None]
    upstream = torch.randn(2, 4, 7, dtype=torch.float64)
    found = torch.autograd.grad(mask_lora_linear(x, weight, A, B, b, 1.7), wanted, upstream)
    expected = torch.autograd.grad(plain_formula(x, weight, A, B, b, 1.7), wanted, upstream)
    torch.testing.assert_close(mask_lora_linear(x, weight, A, B, b, 1.7), plain_formula(x, weight, A, B, b, 1.7))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck():
    x, weight, A, B, bias = problem()
    assert torch.autograd.gradcheck(lambda *args: mask_lora_linear(args[0], weight, *args[1:], 0.6), (x, A, B, bias))


def test_only_the_wanted_gradients_are_computed():
    x, weight, A, B, bias = problem()
    mask_lora_linear(x.detach(), weight, A.detach(), B, bias.detach(), 1.0).sum().backward()
    assert x.grad is A.grad is bias.grad is None
    assert B.grad is not None


def test_nothing_but_references_is_kept_for_backward():
    x, weight, A, B, bias = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        mask_lora_linear(x, weight, A, B, bias, 1.0)
    assert set(saved) == {t.data_ptr() for t in (x, weight, A, B)}


def test_transposed_weights_need_no_copy():
    x, weight, A, B, bias = problem()
    stored = weight.T.contiguous()
    torch.testing.assert_close(
        mask_lora_linear(x, stored.T, A, B, bias, 1.0), mask_lora_linear(x, weight, A, B, bias, 1.0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_with_float32_adapters_without_autocast(dtype):
    x, weight, A, B, bias = problem(dtype, torch.float32)
    y = mask_lora_linear(x, weight, A, B, bias, 1.0)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, A.grad.dtype) == (dtype, dtype, torch.float32)
    exact = plain_formula(*(t.detach().double() for t in (x, weight, A, B, bias)), 1.0)
    torch.testing.assert_close(y.double(), exact, rtol=3e-2, atol=3e-2)
    # Rounded once: the merged weight is the very one that was trained with.
    assert torch.equal(y, F.linear(x, masked_weight(weight, A, B, 1.0), bias))


def test_autocast_is_followed():
    x, weight, A, B, bias = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mask_lora_linear(x, weight, A, B, bias, 1.0)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, A.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_zeros_stay_positive_zeros():
    _, weight, A, B, _ = problem()
    merged = masked_weight(weight, A, B, -3.0).detach()
    assert torch.equal(merged == 0, weight == 0)
    assert not merged[weight == 0].signbit().any()


def test_compiles_without_graph_breaks():
    x, weight, A, B, bias = problem(torch.float32)
    compiled = torch.compile(mask_lora_linear, fullgraph=True, backend="aot_eager")
    y = compiled(x, weight, A, B, bias, 1.3)
    torch.testing.assert_close(y, plain_formula(x, weight, A, B, bias, 1.3))
    y.sum().backward()
    assert A.grad is not None
