"""What runs on a GPU gives what the CPU gives. Run with `pytest -m gpu` where there is one."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch.autograd import DeviceType
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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
from peft_sparse.calibration.activations import ActivationStore
from peft_sparse.calibration.runner import stack_runners
from peft_sparse.tuners import eight_bit, fused

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


def test_hidden_states_go_to_the_cpu_and_back_without_a_wait():
    store = ActivationStore("cpu")
    value = torch.randn(3, 1000, 1000, device="cuda")
    first = store.copy("a", value, alike=2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        back = store.get(first, value.device)
        second = store.copy("a", 2 * back, first)
        again = store.get(second, value.device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert second is first
    assert first.is_pinned()
    torch.testing.assert_close([back, again], [value, 2 * value], rtol=0, atol=0)
    # The host waits for the copy where it reads it.
    assert torch.equal(store.get(store.copy("a", 3 * value, second)), 3 * value.cpu())


def padded_batches(count):
    """Batches of which each has a mask of its own."""
    made = []
    for number in range(count):
        ids = torch.randint(0, VOCABULARY, (2, 12))
        mask = torch.ones_like(ids)
        mask[0, : number + 1] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


@pytest.mark.parametrize("where", ["the model", "block by block"])
@pytest.mark.parametrize("work", ["sparsegpt", "SS", "SD", "DD"])
def test_where_hidden_states_wait_changes_no_bit(work, where):
    data, found = padded_batches(7), []
    for activations in ("device", "cpu"):
        torch.manual_seed(0)
        model = tiny("llama")
        # The backward pass of the kernels for attention adds up in any order.
        model.set_attn_implementation("eager")
        options = {"activations": activations, "calibration": data}
        if where == "the model":
            model.cuda()
        else:
            options["device"] = "cuda"
        if work == "sparsegpt":
            prune(model, 0.5, criterion=work, **options)
        else:
            reconstruct(model, pattern=0.5, criterion="wanda", mode=work, **options)
        found.append(model.cpu().state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def large_runner(activations):
    """A runner of a stack on the GPU, whose blocks compute longer than its hidden states are copied."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=16
    )
    model = LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    inputs = [{"input_ids": torch.randint(0, VOCABULARY, (4, 1024), device="cuda")} for _ in range(8)]
    (runner,) = stack_runners(model, inputs, activations=activations)
    return runner


def test_copies_and_computation_overlap():
    runner = large_runner("cpu")
    # What is taken and made once for all blocks, such as streams and kernels.
    runner.advance(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.advance(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    # Two states in, two out, and what a block computes on the way, which is as large as some of its inputs.
    state = 4 * 1024 * 2048 * 2
    assert torch.cuda.max_memory_allocated() - before < 30 * state
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        runner.advance(2)
        torch.cuda.synchronize()
    own = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end) for event in own if "Memcpy" not in event.name]
    copied = [event.time_range for event in own if "Memcpy" in event.name and event.time_range.elapsed_us() > 50]
    assert len(copied) >= 2 * 8
    both = sum(max(0, min(end, c.end) - max(start, c.start)) for start, end in spans for c in copied)
    assert both > 0.5 * sum(c.elapsed_us() for c in copied)


def test_all_batches_together_are_never_on_the_device():
    runner, peaks = large_runner("cpu"), []
    for count in (8, 3):
        del runner.batches[count:]
        torch.cuda.reset_peak_memory_stats()
        runner.run(0, lambda batch, constants: None)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


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


def factors(shape, r, dtype, adapter_dtype):
    """W with half of its entries zero, A, B and G, on the GPU."""
    weight = torch.randn(shape).masked_fill_(torch.rand(shape) < 0.5, 0).to("cuda", dtype)
    A = torch.randn(*shape[:-2], r, shape[-1]).to("cuda", adapter_dtype)
    B = torch.randn(*shape[:-1], r).to("cuda", adapter_dtype)
    return weight, A, B, torch.randn(shape).to("cuda", dtype)


def relative_error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(("shape", "r"), [((300, 1000), 5), ((1024, 512), 64), ((3, 130, 72), 16), ((16, 16), 1)])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_kernels_are_as_exact_as_the_operations(dtype, adapter_dtype, shape, r, layout, monkeypatch):
    weight, A, B, G = factors(shape, r, dtype, adapter_dtype)
    if layout == "columns":
        weight = weight.mT.contiguous().mT
    wide = [t.double() for t in (weight, A, B)]
    for mask, c in ((True, 1.0), (True, 0.0), (False, 1.0), (False, 0.4)):
        exact = fused.effective_weight(*wide, mask, c, 1.7), *fused.masked_gradients(G.double(), *wide, mask, 1.7)
        errors = []
        for switch in ("1", "0"):
            monkeypatch.setenv("PEFT_SPARSE_FUSED", switch)
            assert fused.has_kernels(weight.device) == (switch == "1")
            found = (
                fused.effective_weight(weight, A, B, mask, c, 1.7),
                *fused.masked_gradients(G.clone(), weight, A, B, mask, 1.7),
            )
            assert [t.dtype for t in found] == [dtype, adapter_dtype, adapter_dtype]
            assert found[0][weight == 0].eq(0).all()
            errors.append([relative_error(*pair) for pair in zip(found, exact, strict=True)])
        for kernel, operations in zip(*errors, strict=True):
            assert kernel <= 1.5 * operations + 1e-6


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_eight_bits(dtype, kind):
    weight, A, B, _ = factors((512, 256), 16, dtype, torch.float32)
    x, D = (torch.randn(1000, size, device="cuda", dtype=dtype) for size in (256, 512))
    x[:, 3] = D[:, 5] = 0
    kept = eight_bit.quantised(x, kind)
    assert eight_bit._multiplies(kept[0], D)
    found = eight_bit.factor_gradients(D, *kept, weight, A, B, True, 1.7)
    exact = fused.masked_gradients(D.double().T @ x.double(), weight.double(), A.double(), B.double(), True, 1.7)
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < (0.02 if kind == "int8" else 0.05)


def adapted(config, dtype=torch.bfloat16):
    model = tiny("llama")
    prune(model, 0.5)
    return get_peft_model(model.to("cuda", dtype), copy.deepcopy(config))


def step(run, model, ids):
    model.zero_grad()
    loss = run(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


LIVELY = {"r": 4, "init_weights": False, "target_modules": "all-linear"}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("config_class", [MaskLoRAConfig, ScaledLoRAConfig])
def test_a_step_makes_the_host_wait_for_nothing_and_can_be_repeated(config_class, kind, tokens):
    model, ids = adapted(config_class(**LIVELY, gradient_dtype=kind)), tokens.cuda()
    x = torch.randn(2, 16, model.config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer = next(module for module in model.modules() if hasattr(module, "gradient_dtype"))
    first = step(model, model, ids)
    layer(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, step(model, model, ids), strict=True):
        assert torch.equal(one, other)


# Inductor of torch 2.11 imports what is deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_compiled_model_is_one_graph(kind, tokens):
    model, ids = adapted(MaskLoRAConfig(**LIVELY, gradient_dtype=kind)), tokens.cuda()
    plain = step(model, model, ids)
    compiled = step(torch.compile(model, fullgraph=True), model, ids)
    for one, other in zip(compiled, plain, strict=True):
        assert relative_error(one, other.double()) < 5e-2


@pytest.mark.parametrize("config_class", [MaskLoRAConfig, ScaledLoRAConfig])
def test_a_merged_model_computes_the_same_bits(config_class, tokens):
    model, ids = adapted(config_class(**LIVELY)), tokens.cuda()
    with torch.no_grad():
        before = model.train()(input_ids=ids).logits
        assert torch.equal(model.merge_and_unload()(input_ids=ids).logits, before)
