"""What runs on a GPU gives what the CPU gives. Run with `pytest -m gpu` where there is one."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_sparse import (
    MaskLoRAConfig,
    ScaledLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    compact,
    prune,
    prune_checkpoint,
    prune_structured,
    reconstruct,
)

from checks import assert_same_zeros, assert_zeros_kept, zeros_of
from conftest import FAMILIES, VOCABULARY, Samples, inputs_of, tiny


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

WAYS = [
    {"criterion": "magnitude", "group": "model"},
    {"criterion": "wanda"},
    {"criterion": "wanda", "group": "model"},
    {"criterion": "ria", "pattern": "2:4"},
    {"criterion": "gblm"},
    {"criterion": "sparsegpt"},
    {"criterion": "sparsegpt", "pattern": "4:8"},
    {"criterion": "wanda", "allocation": "owl"},
    {"criterion": "magnitude", "allocation": "lamp"},
    {"criterion": "wanda", "refinement": "dsnot"},
    {"criterion": "wanda", "refinement": "swap", "pattern": "2:4"},
    {"criterion": "magnitude", "update": True},
]
ADAPTERS = {
    "MaskLoRA": MaskLoRAConfig(r=2, init_weights=False, target_modules="all-linear"),
    "LoRA-Prune": MaskLoRAConfig(r=2, init_weights=False, target_modules="all-linear", masking="merge"),
    "ScaledLoRA": ScaledLoRAConfig(r=2, init_weights=False, target_modules="all-linear"),
    "ScaledLoRA, rank 1": ScaledLoRAConfig(r=1, init_weights=False, target_modules="all-linear"),
}


def on_gpu(batch):
    return {name: value.cuda() for name, value in batch.items()}


def assert_same(gpu, cpu, relative=1e-3):
    """The same zeros, and the same weights up to rounding."""
    assert_same_zeros(gpu.cpu(), zeros_of(cpu))
    found = gpu.state_dict()
    for name, expected in cpu.state_dict().items():
        assert (found[name] - expected).norm() <= relative * expected.norm(), name


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_pruning(way, tokens):
    cpu = tiny("llama")
    gpu = copy.deepcopy(cpu).cuda()
    options = {"pattern": 0.5, **way}
    prune(cpu, calibration=tokens, **options)
    prune(gpu, calibration=tokens.cuda(), **options)
    # The least-squares solver stops once its gradient is a thousandth of what it was.
    assert_same(gpu, cpu, relative=1e-2 if "update" in way else 1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    cpu, batch = tiny(name), inputs_of(name)
    gpu = copy.deepcopy(cpu).cuda()
    prune(cpu, 0.5, criterion="sparsegpt", calibration=[batch])
    prune(gpu, 0.5, criterion="sparsegpt", calibration=[on_gpu(batch)])
    assert_same(gpu, cpu)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "gblm", "sparsegpt"])
@pytest.mark.parametrize("activations", ["device", "cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_blocks_take_turns_on_the_gpu(name, criterion, activations):
    cpu, batch = tiny(name), inputs_of(name)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 9:] = 0
    batch |= {"labels": batch.get("decoder_input_ids", batch["input_ids"])}
    other = copy.deepcopy(cpu)
    prune(cpu, 0.5, criterion=criterion, calibration=[batch])
    prune(other, 0.5, criterion=criterion, calibration=[batch], device="cuda", activations=activations)
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    assert_same(other, cpu)


def test_a_checkpoint_is_pruned_on_the_gpu(tmp_path, tokens):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    prune(model, 0.5, criterion="sparsegpt", calibration=tokens)
    prune_checkpoint(
        tmp_path / "dense", tmp_path / "sparse", 0.5, criterion="sparsegpt", calibration=tokens, device="cuda"
    )
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"), model)


def test_structured_pruning(tokens):
    cpu = tiny("llama")
    gpu = copy.deepcopy(cpu).cuda()
    prune_structured(cpu, 0.3, calibration=tokens)
    prune_structured(gpu, 0.3, calibration=tokens.cuda())
    assert_same_zeros(gpu, {name: zeros.cuda() for name, zeros in zeros_of(cpu).items()})
    compact(cpu)
    compact(gpu)
    with torch.no_grad():
        torch.testing.assert_close(gpu(tokens.cuda()).logits.cpu(), cpu(tokens).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("region", ["matrix", "submodule", "block"])
@pytest.mark.parametrize("where", ["the model", "block by block"])
def test_reconstruction(region, where, tokens):
    cpu = tiny("llama")
    gpu = copy.deepcopy(cpu).cuda() if where == "the model" else copy.deepcopy(cpu)
    device = None if where == "the model" else "cuda"
    reconstruct(cpu, calibration=tokens, pattern=0.5, criterion="wanda", region=region)
    reconstruct(gpu, calibration=tokens, pattern=0.5, criterion="wanda", region=region, device=device)
    # Single matrices are fitted by least squares, whose solver stops by the size of its last improvements.
    assert_same(gpu, cpu, relative=1e-2 if region == "matrix" else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, dtype, tokens):
    model = tiny("llama")
    prune(model, 0.5)
    zeros = zeros_of(model)
    cpu = get_peft_model(model.to(dtype), copy.deepcopy(ADAPTERS[name]))
    gpu = copy.deepcopy(cpu).cuda()
    gradients = []
    for adapted, ids in ((cpu, tokens), (gpu, tokens.cuda())):
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in adapted.parameters() if p.grad is not None]))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (gradients[0] - gradients[1]).norm() <= tolerance * gradients[0].norm()
    assert_zeros_kept(gpu.merge_and_unload().cpu(), zeros)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
@pytest.mark.parametrize("name", [*ADAPTERS, "full"])
def test_training_keeps_the_zeros(name, precision, tmp_path):
    model = tiny("llama")
    prune(model, 0.5)
    zeros = zeros_of(model)
    model = model if name == "full" else get_peft_model(model, copy.deepcopy(ADAPTERS[name]))
    arguments = SparseTrainingArguments(
        str(tmp_path), max_steps=5, learning_rate=1e-2, save_strategy="no", report_to="none", **precision
    )
    SparseTrainer(model, arguments, train_dataset=Samples()).train()
    assert next(model.parameters()).is_cuda
    model = model if name == "full" else model.merge_and_unload()
    assert_zeros_kept(model.cpu(), zeros)


def test_recovery_by_reconstruction(tmp_path):
    arguments = SparseTrainingArguments(
        str(tmp_path), sparsity=0.5, criterion="wanda", recovery="reconstruct", calibration_samples=16,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = SparseTrainer(tiny("llama"), arguments, train_dataset=Samples())
    trainer.train()
    expected = tiny("llama")
    prune(expected, 0.5, criterion="wanda", calibration=torch.randint(0, VOCABULARY, (4, 12)))
    assert sum(int(zeros.sum()) for zeros in zeros_of(trainer.model).values()) == sum(
        int(zeros.sum()) for zeros in zeros_of(expected).values()
    )
