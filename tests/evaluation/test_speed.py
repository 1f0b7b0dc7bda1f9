import pytest
import torch
from accelerate import cpu_offload

from peft_sparse import prune
from peft_sparse.evaluation import generation, generation_speeds, kernel_speed
from peft_sparse.evaluation.kernels import KernelReport, KernelTime, is_two_of_four, kernels_for

from conftest import tiny


def row(tokens, dense, sparse, shape=(8, 4), matrices=3, kernel="CSR (MKL)"):
    return KernelTime(shape, matrices, 0.5, tokens, "float32", kernel, dense, sparse, dense / sparse)


def test_every_shape_is_measured_with_every_number_of_tokens(llama):
    prune(llama, 0.75)
    report = kernel_speed(llama, tokens=(1, 5), rounds=2)
    assert [(one.shape, one.matrices, one.tokens) for one in report.rows] == [
        (shape, count, tokens)
        for shape, count in {(16, 16): 6, (8, 16): 6, (24, 16): 6, (16, 24): 3}.items()
        for tokens in (1, 5)
    ]
    assert all(one.sparsity == 0.75 and one.kernel.startswith("CSR") for one in report.rows)
    assert [ratio > 0 for ratio in report.totals().values()] == [True, True]


def test_a_sparse_kernel_computes_the_product():
    for dtype in (torch.float32, torch.float64):
        matrix, inputs = torch.randn(8, 16, dtype=dtype) * (torch.rand(8, 16) < 0.5), torch.randn(3, 16, dtype=dtype)
        for convert in kernels_for(matrix).values():
            result = torch.nn.functional.linear(inputs, convert(matrix))
            torch.testing.assert_close(result, torch.nn.functional.linear(inputs, matrix))


def test_a_dtype_without_a_kernel_is_said(llama):
    prune(llama, "2:4")
    report = kernel_speed(llama.bfloat16(), tokens=(1,), rounds=1)
    assert {one.verdict for one in report.rows} == {"no kernel: torch has none for bfloat16 on cpu"}
    assert report.totals() == {}
    assert "no kernel: torch has none for bfloat16 on cpu" in str(report)


def test_what_is_not_faster_is_said():
    report = KernelReport([row(1, 2e-6, 1e-6), row(1, 1e-6, 1e-6, (4, 4), 1), row(64, 1.04e-6, 1e-6)], {})
    assert [one.verdict for one in report.rows] == ["2.00 times faster", "no faster", "no faster"]
    # Three matrices take half of the time, and one takes the same. The last shape was not measured with 64 tokens.
    assert report.totals() == {("CSR (MKL)", 1): pytest.approx(7 / 4)}
    assert "All matrices with CSR (MKL), 1 token: 1.75 times faster." in str(report)
    assert "no faster (0.50 times as fast)" in str(KernelReport([row(2, 1e-6, 2e-6)], {}))


def test_two_of_four_is_read_off_the_zeros(llama):
    assert is_two_of_four(torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 0]]))
    assert not is_two_of_four(torch.tensor([[1.0, 0, 2, 3]]))
    assert not is_two_of_four(torch.zeros(2, 6))


def test_models_generate_in_turn_and_the_first_is_the_measure(monkeypatch):
    """With a clock of its own: the second model takes half of the time, and a slow round slows both."""
    order = []

    def seconds(model, prompt, new_tokens):
        order.append(model.name)
        slow = 10 if len(order) in (3, 4) else 1
        # In the last round the second model is as slow as the first.
        return slow * {"first": 2.0, "second": 2.0 if len(order) == 8 else 1.0}[model.name]

    models = {name: tiny("llama") for name in ("first", "second")}
    for name, model in models.items():
        model.name = name
    monkeypatch.setattr(generation, "_seconds", seconds)
    found = generation_speeds(models, new_tokens=6, rounds=3)
    assert order == ["second", "first", "first", "second", "second", "first", "first", "second"]
    assert (found["first"].ratio, found["first"].lowest, found["first"].highest) == (1, 1, 1)
    assert (found["second"].ratio, found["second"].lowest, found["second"].highest) == (2, 1, 2)
    assert found["first"].tokens_per_second == 3


def test_generation_has_exactly_the_tokens_asked_for(llama, monkeypatch):
    lengths = []
    real = llama.generate

    def generate(**options):
        result = real(**options)
        lengths.append(result.shape)
        return result

    monkeypatch.setattr(llama, "generate", generate)
    # Nearly every token would end the text.
    llama.generation_config.eos_token_id = list(range(60))
    generation_speeds({"only": llama}, new_tokens=5, rounds=1)
    assert set(lengths) == {(1, generation.PROMPT + 5)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_kernels_of_cuda_compute_the_product():
    weight = torch.randn(256, 512, device="cuda", dtype=torch.float16)
    pairs = weight.unflatten(1, (-1, 4))
    pairs[..., 2:] = 0
    for matrix in (weight, torch.nn.functional.dropout(weight, 0.5)):
        kernels = kernels_for(matrix)
        expected = is_two_of_four(matrix) and torch.backends.cusparselt.is_available()
        assert ("semi-structured 2:4 (cuSPARSELt)" in kernels) == expected
        for convert in kernels.values():
            for tokens in (1, 64):
                inputs = torch.randn(tokens, 512, device="cuda", dtype=torch.float16)
                result = torch.nn.functional.linear(inputs, convert(matrix))
                torch.testing.assert_close(result, torch.nn.functional.linear(inputs, matrix), rtol=1e-2, atol=5e-2)


def test_an_offloaded_model_generates():
    found = generation_speeds({"offloaded": cpu_offload(tiny("llama"))}, new_tokens=1, rounds=1)
    assert found["offloaded"].tokens_per_second > 0
