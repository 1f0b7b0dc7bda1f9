"""G = D^T x from numbers of eight bits: how exact dA and dB are, what is kept, and what stays as it is."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig
from peft_sparse.tuners.eight_bit import factor_gradients, quantised
from peft_sparse.tuners.functional import sparse_lora


KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])
ERROR = {"int8": 0.02, "fp8": 0.05}
FORMULA = {"c": 1.0, "s": 1.7}


def problem(tokens=200, columns=48, rows=32, dtype=torch.float32):
    weight = torch.randn(rows, columns).masked_fill_(torch.rand(rows, columns) < 0.5, 0).to(dtype)
    # Columns of very different sizes, as activations of language models have them.
    x = (torch.randn(tokens, columns) * torch.logspace(-2, 2, columns)).to(dtype).requires_grad_()
    A, B = torch.randn(4, columns, requires_grad=True), torch.randn(rows, 4, requires_grad=True)
    return x, weight, A, B


def outputs_and_gradients(x, weight, A, B, factor, kind, upstream):
    y = sparse_lora(x, weight, A, B, None, factor=factor, gradient_dtype=kind, **FORMULA)
    return y, *torch.autograd.grad(y, (x, A, B), upstream)


@KINDS
@pytest.mark.parametrize("factor", ["mask", "weight"])
@pytest.mark.parametrize("shape", [{}, {"tokens": 3}, {"columns": 47}, {"rows": 9}], ids=str)
def test_gradients_of_the_factors_are_near_and_all_else_is_the_same(shape, factor, kind):
    x, weight, A, B = problem(**shape)
    upstream = torch.randn(len(x), len(weight))
    y, grad_x, grad_A, grad_B = outputs_and_gradients(x, weight, A, B, factor, kind, upstream)
    expected = outputs_and_gradients(x, weight, A, B, factor, None, upstream)
    assert torch.equal(y, expected[0])
    assert torch.equal(grad_x, expected[1])
    for found, exact in ((grad_A, expected[2]), (grad_B, expected[3])):
        assert 0 < (found - exact).norm() <= ERROR[kind] * exact.norm()


@KINDS
def test_tokens_and_columns_of_zeros_give_numbers(kind):
    x, weight, A, B = problem()
    with torch.no_grad():
        x[:, 3] = 0
        x[5] = 0
    upstream = torch.randn(len(x), len(weight))
    upstream[:, 7] = 0
    *_, grad_A, grad_B = outputs_and_gradients(x, weight, A, B, "mask", kind, upstream)
    assert grad_A.isfinite().all()
    assert grad_A[:, 3].eq(0).all()
    assert grad_B.isfinite().all()
    assert grad_B[7].eq(0).all()


@KINDS
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_overflows_reach_the_gradients(where, value, kind):
    # A GradScaler finds them there, and skips the step.
    x, weight, A, B = (t.detach() for t in problem())
    D = torch.randn(len(x), len(weight))
    (x if where == "input" else D)[0, 0] = value
    found = factor_gradients(D, *quantised(x, kind), weight, A, B, True, 1.0)
    assert not all(t.isfinite().all() for t in found)


@KINDS
def test_half_of_the_memory_is_kept_and_layers_share_it(kind):
    x, weight, A, B = problem(tokens=256, dtype=torch.bfloat16)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The results must live: memory that is freed would be counted once for both.
        outputs = [sparse_lora(x, weight, A, B, None, factor="mask", gradient_dtype=kind, **FORMULA) for _ in range(2)]
    assert len(outputs) == 2
    others = {t.data_ptr() for t in (weight, A, B)}
    scales = 4 * x.shape[1]
    assert sum(size for place, size in kept.items() if place not in others) == x.numel() + scales


@KINDS
def test_an_input_that_was_changed_in_place_is_rounded_again(kind):
    x = torch.randn(16, 16)
    before, _ = quantised(x, kind)
    assert quantised(x, kind)[0] is before
    x.neg_()
    assert not torch.equal(quantised(x, kind)[0].float(), before.float())


def test_weights_that_are_trained_get_their_exact_gradient():
    x, weight, A, B = problem()
    weight.requires_grad_()
    for kind in (None, "int8"):
        sparse_lora(x, weight, A, B, None, factor="mask", gradient_dtype=kind, **FORMULA).sum().backward()
    torch.testing.assert_close(weight.grad / 2, torch.ones(len(x), len(weight)).T @ x)


@pytest.mark.parametrize("config_class", [MaskLoRAConfig, ScaledLoRAConfig])
def test_the_field_reaches_the_layers_and_is_saved(config_class, tmp_path):
    base = nn.Sequential(nn.Linear(32, 32))
    config = config_class(r=2, target_modules=["0"], gradient_dtype="int8")
    model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path)
    for adapted in (model, PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)):
        layer = adapted.base_model.model[0]
        assert layer.gradient_dtype == {"default": "int8"}
        x = torch.randn(8, 32)
        adapted(x).sum().backward()
        assert hasattr(x, "_peft_sparse_eight_bits")


def test_inference_rounds_nothing():
    model = get_peft_model(
        nn.Sequential(nn.Linear(32, 32)), MaskLoRAConfig(r=2, target_modules=["0"], gradient_dtype="fp8")
    )
    x = torch.randn(8, 32)
    with torch.no_grad():
        model(x)
    assert not hasattr(x, "_peft_sparse_eight_bits")
