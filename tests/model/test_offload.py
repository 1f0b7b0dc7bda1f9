"""Models whose weights accelerate has offloaded or dispatched are pruned through its hooks."""

import contextlib
import hashlib

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from transformers import AutoModelForCausalLM

from peft_sparse import Fit, prune, reconstruct, sparsity
from peft_sparse.calibration.residence import on_device
from peft_sparse.model.blocks import find_blocks
from peft_sparse.model.offload import execution_device, is_offloaded, resident_through_hooks

from checks import assert_same_weights
from conftest import tiny
from rebuilding import batches_of


pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
PLACES = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
PLACES |= {"model.layers.0": "cpu", "model.layers.1": "disk"}


def on_cpu(family, folder):
    return cpu_offload(tiny(family))


def on_disk(family, folder):
    return disk_offload(tiny(family), folder / "offloaded")


def mapped(family, folder, **options):
    """One block on disk, the others in memory."""
    tiny(family).save_pretrained(folder / "saved")
    places = PLACES | dict.fromkeys(list(find_blocks(tiny(family)))[2:], "cpu")
    return AutoModelForCausalLM.from_pretrained(folder / "saved", device_map=places, **options)


def mapped_to_a_folder(family, folder):
    return mapped(family, folder, offload_folder=folder / "offloaded")


WAYS = [on_cpu, on_disk, mapped, mapped_to_a_folder]
RUNS = [
    {},
    {"criterion": "wanda"},
    {"criterion": "wanda", "exclude_modules": r"model\.layers\.1\..*"},
    {"criterion": "wanda", "group": "model"},
    {"allocation": "global"},
    {"criterion": "wanda", "allocation": "owl", "refinement": "swap", "update": True},
]


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("saved/*.safetensors")}


def values_of(model):
    """All parameters, also those that are offloaded."""
    found = {}
    for name, module in model.named_modules():
        with resident_through_hooks(module) if is_offloaded(module) else on_device(None)(name, module):
            found |= {f"{name}.{key}": p.clone() for key, p in module.named_parameters(recurse=False)}
    return found


def hooks_of(model):
    return {
        name: (hook.offload, hook.execution_device)
        for name, module in model.named_modules()
        if isinstance(hook := getattr(module, "_hf_hook", None), AlignDevicesHook)
    }


# Without a folder, `from_pretrained` itself refuses experts that it has to convert.
@pytest.mark.parametrize("options", RUNS, ids=str)
@pytest.mark.parametrize(
    ("family", "way"), [("llama", way) for way in WAYS] + [("mixtral", way) for way in WAYS if way is not mapped]
)
def test_an_offloaded_model_is_pruned_as_one_in_memory(family, way, options, tokens, tmp_path):
    model, expected = way(family, tmp_path), tiny(family)
    before, hooks = digests(tmp_path), hooks_of(model)
    where = {name: parameter.device for name, parameter in model.named_parameters()}
    calibration = tokens if "criterion" in options else None
    assert prune(model, 0.5, calibration, **options).sparsity == prune(expected, 0.5, calibration, **options).sparsity
    found = values_of(model)
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.named_parameters())
    assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)
    assert sparsity(model) == sparsity(expected)
    # Everything is where it was, and a checkpoint of the user is only read.
    assert {name: parameter.device for name, parameter in model.named_parameters()} == where
    assert (hooks_of(model), digests(tmp_path)) == (hooks, before)
    if way in (mapped, mapped_to_a_folder):
        model.save_pretrained(tmp_path / "pruned")
        assert_same_weights(type(expected).from_pretrained(tmp_path / "pruned"), expected)


@pytest.mark.parametrize("way", [cpu_offload, disk_offload])
def test_an_offloaded_layer_with_two_places_is_pruned_as_one_in_memory(way, tokens, tmp_path):
    def shared():
        model = tiny("llama")
        model.model.layers[2].mlp.up_proj = model.model.layers[0].mlp.up_proj
        return model

    model, other = shared(), shared()
    way(model, *([tmp_path] if way is disk_offload else []))
    for net in (model, other):
        prune(net, 0.5, tokens, criterion="wanda")
    assert torch.equal(model(input_ids=tokens).logits, other(input_ids=tokens).logits)


@pytest.mark.parametrize("preloaded", ["LlamaMLP", "LlamaDecoderLayer", "LlamaModel"])
@pytest.mark.parametrize("options", [{}, {"criterion": "wanda"}, {"criterion": "wanda", "allocation": "owl"}], ids=str)
def test_weights_that_are_loaded_with_a_module_around_their_layer_are_pruned(preloaded, options, tokens):
    model, expected = cpu_offload(tiny("llama"), preload_module_classes=[preloaded]), tiny("llama")
    for each in (model, expected):
        prune(each, 0.5, tokens, **options)
    assert sparsity(model) == 0.5
    assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)
    assert all(parameter.is_meta for parameter in model.parameters())


class Attending(torch.nn.Module):
    """A block whose attention reads the weight of its last layer and does not call it."""

    def __init__(self):
        super().__init__()
        self.attention, self.up = torch.nn.MultiheadAttention(16, 2, batch_first=True), torch.nn.Linear(16, 16)

    def forward(self, hidden):
        return hidden + self.up(self.attention(hidden, hidden, hidden, need_weights=False)[0])


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(61, 16)
        self.layers = torch.nn.ModuleList(Attending() for _ in range(2))

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("options", [{}, {"preload_module_classes": ["MultiheadAttention"]}], ids=str)
def test_an_offloaded_attention_whose_last_layer_is_not_called_is_pruned(options, tokens):
    torch.manual_seed(0)
    model, expected = Attention().eval(), Attention().eval()
    expected.load_state_dict(model.state_dict())
    cpu_offload(model, **options)
    for each in (model, expected):
        assert len(prune(each, 0.5, tokens, criterion="wanda").weights) == 4
    found = values_of(model)
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.named_parameters())


@pytest.mark.parametrize("way", [on_cpu, on_disk])
@pytest.mark.parametrize("options", [{}, {"mode": "DD"}, {"allocation": "erk"}])
def test_an_offloaded_model_is_reconstructed_as_one_in_memory(way, options, tmp_path):
    model, expected, batches = way("llama", tmp_path), tiny("llama"), batches_of("llama")
    fit = Fit(max_steps=2, holdout=0)
    reports = [reconstruct(each, 0.5, batches, fit=fit, **options) for each in (model, expected)]
    assert [[region.error for region in report.regions] for report in reports[:1]] == [
        [region.error for region in report.regions] for report in reports[1:]
    ]
    found = values_of(model)
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.named_parameters())


@pytest.mark.parametrize("way", [on_cpu, on_disk])
def test_a_broken_weight_is_found_although_it_is_offloaded(way, tokens, tmp_path, monkeypatch):
    with torch.no_grad():
        broken = tiny("llama")
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    monkeypatch.setattr(f"{__name__}.tiny", lambda family: broken)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj' holds NaN or infinity. Correct"):
        prune(way("llama", tmp_path), 0.5)


@pytest.mark.parametrize("way", [on_cpu, on_disk])
def test_a_block_stays_in_memory_while_it_is_called_and_is_dropped_after_an_error(way, tmp_path):
    model, before = way("llama", tmp_path), tiny("llama")
    block, residence = model.model.layers[0], on_device(None)
    with contextlib.suppress(ZeroDivisionError), residence("", block):
        with residence("", block), torch.no_grad():
            block.mlp.up_proj.weight.mul_(2)
        held = block.mlp.up_proj.weight
        block.mlp(torch.randn(2, 16))
        assert block.mlp.up_proj.weight is held
        raise ZeroDivisionError
    assert all(parameter.is_meta for parameter in model.parameters())
    found = values_of(model)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, 2 * before.model.layers[0].mlp.up_proj.weight)


def test_what_did_not_change_is_not_written(tmp_path):
    model = mapped_to_a_folder("llama", tmp_path)
    assert list((tmp_path / "offloaded").glob("*.dat")) == []
    with on_device(None)("", model.model.layers[1]):
        pass
    assert list((tmp_path / "offloaded").glob("*.dat")) == []
    prune(model, 0.5, target_modules=["layers.1.mlp.up_proj"])
    assert [path.name for path in (tmp_path / "offloaded").iterdir()] == ["model.layers.1.mlp.up_proj.weight.dat"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_offloaded_weight_keeps_its_dtype(dtype, tmp_path):
    model = disk_offload(tiny("llama").to(dtype), tmp_path / "offloaded")
    expected = tiny("llama").to(dtype)
    prune(model, 0.5), prune(expected, 0.5)
    found = values_of(model)
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.named_parameters())


def test_the_device_of_an_offloaded_model_is_that_where_it_computes(tmp_path):
    assert execution_device(on_cpu("llama", tmp_path)) == torch.device("cpu")
    assert execution_device(tiny("llama")) == torch.device("cpu")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("device", [None, "cuda", "cpu"])
def test_a_model_over_gpu_memory_and_disk_is_pruned_as_one_in_memory(device, tokens, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "saved")
    places = PLACES | {"model.embed_tokens": 0, "model.layers.2": 0}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    expected = tiny("llama").cuda()
    for each in (model, expected):
        prune(each, 0.5, tokens, criterion="wanda", device=device)
    found, wanted = values_of(model), dict(expected.named_parameters())
    assert sum((found[name].cuda() == 0).ne(value == 0).sum() for name, value in wanted.items()) <= 4
    model.save_pretrained(tmp_path / "pruned")
    assert sparsity(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")) == 0.5


@pytest.mark.gpu
@GPU
def test_a_dispatched_block_can_be_pruned_on_another_device(tokens, tmp_path):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"), 0)
    model = dispatch_model(
        tiny("llama"), places | {f"model.layers.{index}": index // 2 * 0 for index in range(3)}, force_hooks=True
    )
    prune(model, 0.5, tokens, criterion="wanda", device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert sparsity(model) == 0.5
