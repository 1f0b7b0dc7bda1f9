"""The kernels compute what PyTorch's operations compute. Triton's interpreter runs them without a GPU."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig
from peft_sparse.tuners import fused


@pytest.fixture
def kernels(monkeypatch):
    """The kernels as Triton's interpreter runs them, on CPU tensors."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Triton reads the variable when it is imported. Its compiled part cannot be imported twice.
    for name in [name for name in sys.modules if re.fullmatch(r"triton(?!\._C)(\..*)?", name)]:
        monkeypatch.delitem(sys.modules, name)
    path = Path(fused.__file__).with_name("triton_kernels.py")
    spec = importlib.util.spec_from_file_location("interpreted_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem(shape, r, dtype=torch.float32, adapter_dtype=torch.float32):
    weight = torch.randn(shape).masked_fill_(torch.rand(shape) < 0.5, 0).to(dtype)
    A = torch.randn(*shape[:-2], r, shape[-1]).to(adapter_dtype)
    B = torch.randn(*shape[:-1], r).to(adapter_dtype)
    return weight, A, B, torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "r"), [((70, 150), 3), ((2, 130, 40), 20)])
@pytest.mark.parametrize(("mask", "c"), [(True, 1.0), (True, 0.0), (False, 1.0), (False, 0.4)])
def test_kernels_compute_what_the_operations_compute(kernels, mask, c, shape, r, dtype):
    weight, A, B, G = problem(shape, r, dtype)
    found = kernels.effective_weight(weight, A, B, mask, c, 1.7)
    torch.testing.assert_close(found, fused.effective_weight(weight, A, B, mask, c, 1.7))
    assert found[weight == 0].eq(0).all()
    gradients = kernels.masked_gradients(G, weight, A, B, mask, 1.7)
    expected = fused.masked_gradients(G.clone(), weight, A, B, mask, 1.7)
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_kernel_reads_the_integers_of_an_eight_bit_product(kernels):
    weight, A, B, _ = problem((70, 150), 3)
    G = torch.randint(-(10**6), 10**6, weight.shape, dtype=torch.int32)
    expected = fused.masked_gradients(G, weight, A, B, True, 1.7)
    # The interpreter cannot multiply numbers in bfloat16.
    kernels.SPLIT = False
    for one, other in zip(kernels.masked_gradients(G, weight, A, B, True, 1.7), expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_kernel_rounds_columns_to_eight_bits(kernels):
    x = torch.randn(100, 70)
    scale = x.abs().amax(0) / 127
    torch.testing.assert_close(
        kernels.eight_bits(x, scale, torch.int8, 112), fused.eight_bits(x, scale, torch.int8, 112)
    )


@pytest.mark.parametrize("rows", [1, 300, 4096, 128256])
def test_two_programs_are_compiled_for_all_shapes(kernels, rows):
    tiles = kernels.tiles_of_program(rows, strips=32)
    assert tiles == (16 if rows == 128256 else 4)


@pytest.fixture
def gpu(monkeypatch):
    """A process that believes to have a GPU of compute capability 9.0, with Triton."""
    monkeypatch.setattr(fused, "_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return torch.device("cuda")


def test_a_variable_of_the_environment_switches_the_kernels_off(gpu, monkeypatch):
    assert fused.has_kernels(gpu)
    assert not fused.has_kernels(torch.device("cpu"))
    monkeypatch.setenv("PEFT_SPARSE_FUSED", "0")
    assert not fused.has_kernels(gpu)


def test_old_gpus_have_no_kernels(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert not fused.has_kernels(gpu)


def test_fake_tensors_get_the_shapes_of_the_kernels():
    with FakeTensorMode():
        weight, A, B = (torch.empty(shape, device="cuda") for shape in ((6, 4), (2, 4), (6, 2)))
        assert torch.ops.peft_sparse.effective_weight(weight, A, B, True, 1.0, 1.0).shape == (6, 4)
        found = torch.ops.peft_sparse.masked_gradients(weight, weight, A, B, True, 1.0)
        assert [t.shape for t in found] == [(2, 4), (6, 2)]
        x = torch.ops.peft_sparse.eight_bits(weight, torch.empty(4, device="cuda"), torch.int8, 16)
        assert (x.shape, x.dtype) == ((4, 16), torch.int8)


@pytest.mark.parametrize(
    "config",
    [
        MaskLoRAConfig(r=4, init_weights=False, target_modules="all-linear"),
        MaskLoRAConfig(r=4, init_weights=False, target_modules="all-linear", gradient_dtype="int8"),
        ScaledLoRAConfig(r=4, init_weights=False, target_modules="all-linear"),
    ],
    ids=["MaskLoRA", "int8", "ScaledLoRA"],
)
def test_a_compiled_model_is_one_graph(config):
    base = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.5)
    model = get_peft_model(base, config)
    x, results = torch.randn(8, 32), []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
