import gc
import hashlib
import json
import shutil
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_sparse import Criterion, prune, prune_checkpoint, reconstruct_checkpoint, sparsity
from peft_sparse.model.blocks import find_blocks
from peft_sparse.pruning import checkpoint, checkpoint_model, streamed_model
from peft_sparse.reconstruction import Fit

from checks import assert_same_weights, named
from conftest import ENCODER_DECODERS, FAMILIES, VOCABULARY, inputs_of, tiny


STACKED = [family for family in FAMILIES if family not in ENCODER_DECODERS]
# Those that see one block at a time, with and without calibration.
RUNS = [("magnitude", False), ("random", False)]
RUNS += [(criterion, True) for criterion in ("magnitude", "random", "wanda", "ria", "sparsegpt")]


def saved(model, folder, **options):
    # By the names the model has; by default some are saved as they were before transformers renamed them.
    model.save_pretrained(folder, save_original_format=False, **options)
    return folder


def calibration_of(family):
    return [inputs_of(family, 24)]


def load(family_or_model, folder):
    model = tiny(family_or_model) if isinstance(family_or_model, str) else family_or_model
    return type(model).from_pretrained(folder).eval()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# -- the same weights as those of the loaded model --------------------------------------------------------------------


@pytest.mark.parametrize("family", STACKED)
def test_every_family_is_pruned_as_if_it_were_loaded(family, tmp_path):
    source = saved(tiny(family), tmp_path / "source")
    before, calibration = digests(source), calibration_of(family)
    report = prune_checkpoint(source, tmp_path / "pruned", "2:4", criterion="wanda", calibration=calibration)
    expected = load(family, source)
    plain = prune(expected, "2:4", criterion="wanda", calibration=calibration)
    found = load(family, tmp_path / "pruned")
    assert_same_weights(found, expected)
    assert sparsity(found) == report.sparsity == 0.5
    assert report.weights == plain.weights
    assert digests(source) == before
    batch = inputs_of(family)
    assert torch.equal(found(**batch)[0], expected(**batch)[0])


@pytest.mark.parametrize("options", [{"refinement": "dsnot"}, {"refinement": "swap", "update": True}])
def test_what_was_selected_is_refined_and_updated_as_if_the_model_were_loaded(options, tmp_path):
    source = saved(tiny("llama"), tmp_path / "source")
    options = options | {"criterion": "wanda", "calibration": calibration_of("llama")}
    report = prune_checkpoint(source, tmp_path / "pruned", 0.5, **options)
    expected = load("llama", source)
    assert report.weights == prune(expected, 0.5, **options).weights
    assert_same_weights(load("llama", tmp_path / "pruned"), expected)


@pytest.mark.parametrize(
    ("family", "criterion", "calibrated"),
    [
        *(("llama", *run) for run in RUNS),
        *((family, "random", False) for family in ("gpt2", "gpt_oss")),
        *((family, criterion, True) for family in ("gpt2", "gpt_oss") for criterion in ("wanda", "sparsegpt")),
    ],
)
def test_every_criterion_prunes_as_if_the_model_were_loaded(family, criterion, calibrated, tmp_path):
    source = saved(tiny(family), tmp_path / "source")
    calibration = calibration_of(family) if calibrated else None
    torch.manual_seed(3)
    prune_checkpoint(source, tmp_path / "pruned", 0.5, criterion=criterion, calibration=calibration)
    expected = load(family, source)
    torch.manual_seed(3)
    prune(expected, 0.5, criterion=criterion, calibration=calibration)
    assert_same_weights(load(family, tmp_path / "pruned"), expected)


@pytest.mark.parametrize("activations", ["device", "cpu", "disk"])
def test_every_option_means_the_same(llama, tokens, tmp_path, activations):
    source = saved(llama, tmp_path / "source")
    options = {
        "criterion": "wanda",
        "exclude_modules": ["o_proj"],
        "calibration": tokens,
        "batch_size": 4,
        "activations": activations,
    }
    pattern = {r"layers\.0\..*": 0.25, "mlp.up_proj": "2:4", "q_proj": 0.75}
    report = prune_checkpoint(source, tmp_path / "pruned", pattern, **options)
    assert report.weights == prune(llama, pattern, **options).weights
    assert_same_weights(load("llama", tmp_path / "pruned"), llama)


def test_a_users_function_is_given_what_prune_gives_it(llama, tokens, tmp_path):
    source, seen = saved(llama, tmp_path / "source"), []

    def mine(weight, statistics):
        seen.append((statistics.tokens, statistics.sequences, statistics.input_norm.sum().item()))
        return weight.abs()

    prune_checkpoint(source, tmp_path / "pruned", 0.5, criterion=mine, calibration=tokens)
    streamed = seen.copy()
    seen.clear()
    prune(llama, 0.5, criterion=mine, calibration=tokens)
    assert streamed == seen
    assert len(seen) == 21


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_keeps_its_dtype(llama, tokens, tmp_path, dtype):
    source = saved(llama.to(dtype), tmp_path / "source")
    prune_checkpoint(source, tmp_path / "pruned", 0.5, criterion="wanda", calibration=tokens)
    expected = load("llama", source)
    prune(expected, 0.5, criterion="wanda", calibration=tokens)
    found = load("llama", tmp_path / "pruned")
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert_same_weights(found, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sharded_source_gives_the_same(family, tokens, tmp_path):
    source = saved(tiny(family), tmp_path / "whole")
    shards = saved(tiny(family), tmp_path / "shards", max_shard_size="6KB")
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    files = [
        {file for name, file in index.items() if name.startswith(f"{block}.")} for block in find_blocks(tiny(family))
    ]
    assert max(map(len, files)) > 1, "no block is spread over shards"
    for folder in (source, shards):
        prune_checkpoint(folder, tmp_path / f"pruned {folder.name}", "2:4", criterion="wanda", calibration=tokens)
    assert_same_weights(load(family, tmp_path / "pruned whole"), load(family, tmp_path / "pruned shards"))


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_tied_embeddings_stay_tied_and_are_written_once(family, tokens, tmp_path):
    model = tiny(family)
    source = saved(model, tmp_path / "source")
    prune_checkpoint(source, tmp_path / "pruned", 0.5, criterion="wanda", calibration=tokens)
    found = load(family, tmp_path / "pruned")
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert torch.equal(found.get_input_embeddings().weight, model.get_input_embeddings().weight)
    index = json.loads((tmp_path / "pruned" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(source / "model.safetensors").keys()


def test_buffers_that_no_checkpoint_holds_survive(tokens, tmp_path):
    """GPT-Neo's attention has its causal mask as a buffer of each block."""
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
        window_size=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert list(find_blocks(model)["transformer.h.0"].buffers())
    source = saved(model, tmp_path / "source")
    prune_checkpoint(source, tmp_path / "pruned", 0.5, criterion="wanda", calibration=tokens)
    prune(model, 0.5, criterion="wanda", calibration=tokens)
    assert_same_weights(load(model, tmp_path / "pruned"), model)


def test_tensors_the_model_has_no_place_for_do_no_harm(llama, tokens, tmp_path):
    """Checkpoints of early Llamas hold their rotary frequencies."""
    source = saved(llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(2) for index in range(3)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(source, tmp_path / "pruned", 0.5, criterion="wanda", calibration=tokens)
    prune(llama, 0.5, criterion="wanda", calibration=tokens)
    assert_same_weights(load("llama", tmp_path / "pruned"), llama)


def test_the_index_tells_every_tensor_and_their_size(llama, tmp_path):
    prune_checkpoint(saved(llama, tmp_path / "source"), tmp_path / "pruned", 0.5)
    index = json.loads((tmp_path / "pruned" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in llama.parameters())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "pruned" / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    blocks = [{file for name, file in index["weight_map"].items() if f"layers.{i}." in name} for i in range(3)]
    assert [len(files) for files in blocks] == [1, 1, 1]


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def emptied(monkeypatch):
    """The models that the streaming makes."""
    models, make = [], checkpoint_model.empty_model

    def spy(config, model_class):
        models.append(make(config, model_class))
        return models[-1]

    monkeypatch.setattr(checkpoint_model, "empty_model", spy)
    return models


def loaded_blocks(model):
    return [n for n, block in find_blocks(model).items() if not all(p.is_meta for p in block.parameters())]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_never_more_than_one_block_is_in_memory(family, calibrated, emptied, tmp_path, monkeypatch):
    source = saved(tiny(family), tmp_path / "source")
    moments, read = [], streamed_model.StreamedModel.read
    tensors: list[weakref.ref] = []

    def note():
        (model,) = emptied
        loaded = loaded_blocks(model)
        assert len(loaded) <= 1
        # What was read for other blocks is gone, too.
        held = sum(ref().nbytes for ref in tensors if ref() is not None)
        assert held <= max(sum(p.nbytes for p in block.parameters()) for block in find_blocks(model).values())
        moments.extend(loaded)

    def reads(self, part):
        found = read(self, part)
        if part != streamed_model.OUTSIDE:
            assert loaded_blocks(self.model) == []
            tensors.extend(map(weakref.ref, found.values()))
        return found

    def mine(weight, statistics):
        note()
        return weight.abs()

    monkeypatch.setattr(streamed_model.StreamedModel, "read", reads)
    calibration = calibration_of(family) if calibrated else None
    forward = torch.nn.Linear.forward

    def watched(self, inputs):
        note()
        return forward(self, inputs)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    prune_checkpoint(source, tmp_path / "pruned", 0.5, criterion=mine, calibration=calibration)
    assert list(dict.fromkeys(moments)) == list(find_blocks(emptied[0]))
    assert loaded_blocks(emptied[0]) == []


@pytest.mark.parametrize("options", [{"region": "submodule"}, {"region": 2}, {"mode": "DD"}, {"mode": "SD"}])
def test_reconstruction_drops_its_windows_on_the_way(options, tmp_path, monkeypatch):
    source = saved(tiny("llama"), tmp_path / "source")
    load, weights = streamed_model.StreamedModel.load, []
    window = options["region"] if isinstance(options.get("region"), int) else 1

    def loads(self, part):
        gc.collect()
        alive = {block for block, weight in weights if weight() is not None}
        assert len(alive - {part}) < window, f"{alive} are in memory while {part} is loaded"
        load(self, part)
        if part != streamed_model.OUTSIDE:
            weights.extend((part, weakref.ref(weight)) for weight in self.blocks[part].parameters())

    monkeypatch.setattr(streamed_model.StreamedModel, "load", loads)
    fit = Fit(max_steps=1)
    calibration = calibration_of("llama")
    reconstruct_checkpoint(source, tmp_path / "sparse", 0.5, calibration, criterion="wanda", fit=fit, **options)
    assert weights


# -- what goes wrong on the way ---------------------------------------------------------------------------------------


class OwnError(Exception):
    pass


def raise_own_error():
    raise OwnError


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_crash_leaves_the_finished_blocks_and_nothing_that_loads(llama, tokens, tmp_path, calibrated):
    source, scored = saved(llama, tmp_path / "source"), []
    before = digests(source)

    def fails_at_the_last_block(weight, statistics):
        scored.append(0)
        if len(scored) == 15:
            raise ZeroDivisionError
        return weight.abs()

    calibration = tokens if calibrated else None
    with pytest.raises(ZeroDivisionError) as caught:
        prune_checkpoint(source, tmp_path / "pruned", 0.5, criterion=fails_at_the_last_block, calibration=calibration)
    assert "While pruning block 'model.layers.2': the blocks before it are pruned" in caught.value.__notes__[-1]
    found = {path.name for path in (tmp_path / "pruned").iterdir()}
    # The two blocks before, and what lies outside the blocks.
    assert found == {f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 4)}
    prune(llama, 0.5, criterion=lambda weight, statistics: weight.abs())
    for number, block in enumerate(list(find_blocks(llama).values())[:2], start=1):
        tensors = load_file(tmp_path / "pruned" / f"model-{number:05d}-of-00004.safetensors")
        assert all(torch.equal(tensors[f"model.layers.{number - 1}.{n}"], p) for n, p in block.named_parameters())
    with pytest.raises((OSError, ValueError)):
        load("llama", tmp_path / "pruned")
    assert digests(source) == before
    # What is left is in nobody's way.
    prune_checkpoint(
        source, tmp_path / "pruned", 0.5, criterion=lambda weight, _: weight.abs(), calibration=calibration
    )
    assert_same_weights(load("llama", tmp_path / "pruned"), llama)


def copy_of_config_that_dies(copy, survived):
    def copy_or_die(path, folder):
        if path.name == "config.json" and survived == "some files":
            raise OwnError
        return copy(path, folder)

    return copy_or_die


@pytest.mark.parametrize("survived", ["some files", "all files"])
def test_a_run_that_died_while_it_finished_is_run_again(llama, tmp_path, monkeypatch, survived):
    source = saved(llama, tmp_path / "source")
    (source / "vocab.txt").write_text("a b c")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copy2", copy_of_config_that_dies(shutil.copy2, survived))
        patched.setattr(Path, "replace", lambda path, target: raise_own_error())
        with pytest.raises(OwnError):
            prune_checkpoint(source, tmp_path / "pruned", 0.5)
    assert not (tmp_path / "pruned" / "model.safetensors.index.json").exists()
    assert (tmp_path / "pruned" / "config.json").exists() == (survived == "all files")
    prune_checkpoint(source, tmp_path / "pruned", 0.5)
    prune(llama, 0.5)
    assert_same_weights(load("llama", tmp_path / "pruned"), llama)
    assert not list((tmp_path / "pruned").glob("*.unfinished"))
    with pytest.raises(ValueError, match="not to exist, to be empty, or to hold only what a killed run left. Give"):
        prune_checkpoint(source, tmp_path / "pruned", 0.5)


@pytest.mark.parametrize("theirs", [["config.json"], ["model-00001-of-00002.safetensors", "thesis.txt"]])
def test_what_is_somebodys_own_is_not_overwritten(llama, tmp_path, theirs):
    source = saved(llama, tmp_path / "source")
    (tmp_path / "output").mkdir()
    for name in theirs:
        (tmp_path / "output" / name).write_text("mine")
    with pytest.raises(ValueError, match="to hold only what a killed run left. Give another `output`"):
        prune_checkpoint(source, tmp_path / "output", 0.5)
    assert all((tmp_path / "output" / name).read_text() == "mine" for name in theirs)


def test_a_broken_weight_is_found_when_its_block_is_read(llama, tokens, tmp_path):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    source = saved(llama, tmp_path / "source")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj' holds NaN or infinity. Correct") as caught:
        prune_checkpoint(source, tmp_path / "pruned", 0.5)
    assert "'model.layers.1': the blocks before it are pruned" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "gblm", "calibration": torch.zeros(2, 4, dtype=torch.long)},
        {"group": "model"},
        {"criterion": Criterion(lambda weight, _: weight.abs(), group="model")},
        {"criterion": "wanda"},
        {"pattern": "2:5"},
        {"target_modules": ["lm_head"]},
    ],
    ids=named,
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(llama, tmp_path, options):
    source = saved(llama, tmp_path / "source")
    with pytest.raises(ValueError, match="."):
        prune_checkpoint(source, tmp_path / "pruned", options.pop("pattern", 0.5), **options)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("allocation", ["uniform", "erk", "global", "lamp", "owl", "a dict"])
def test_a_sparsity_is_divided_as_if_the_model_were_loaded(family, allocation, tmp_path):
    source, calibration = saved(tiny(family), tmp_path / "source"), calibration_of(family)
    options = {"criterion": "wanda", "refinement": "swap", "update": True}
    options["allocation"] = {".*": 0.55} if allocation == "a dict" else allocation
    report = prune_checkpoint(source, tmp_path / "pruned", 0.55, calibration, **options)
    expected = load(family, source)
    plain = prune(expected, 0.55, calibration, **options)
    assert report.weights == plain.weights
    assert_same_weights(load(family, tmp_path / "pruned"), expected)


def test_weights_are_in_memory_one_at_a_time_while_the_sparsity_is_divided(tmp_path, monkeypatch):
    source = saved(tiny("mixtral"), tmp_path / "source")
    held, read = [], []
    plain = streamed_model.set_module_tensor_to_device

    def recorded(model, name, device, **options):
        plain(model, name, device, **options)
        if "experts" in name or "proj" in name:
            read.append(name) if device != "meta" else None
            held.append(sum(not p.is_meta for n, p in model.named_parameters() if "layers" in n))

    monkeypatch.setattr(streamed_model, "set_module_tensor_to_device", recorded)
    monkeypatch.setattr(checkpoint, "prune_blocks", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "pruned", 0.5, allocation="global")
    assert max(held) == 1
    # The parameter of all experts is read once for each of the passes, not once for each expert.
    passes = {name: read.count(name) for name in set(read)}
    assert set(passes.values()) == {4}
