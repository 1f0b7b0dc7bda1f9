"""An inspection tells what the package itself finds in the loaded model, whoever wrote the files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import MaskLoRAConfig, prune, sparsity
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.model.masks import fingerprint, mask_of, sparsity_of
from peft_sparse.sharing.inspection import inspect_checkpoint
from peft_sparse.sharing.mask_summary import summary_of
from peft_sparse.sharing.packing import pack_checkpoint

from conftest import tiny


def by_name(inspection):
    return {matrix.name: matrix for matrix in inspection.matrices}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3"])
@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_it_finds_what_the_package_finds_in_the_model(tmp_path, family, pattern):
    model = tiny(family)
    prune(model, pattern)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    found = inspect_checkpoint(tmp_path)
    named = by_name(found)
    weights = prunable_weights(model)
    for name, weight in weights.items():
        # A checkpoint may leave out the prefix of the base model.
        matrix = next(named[key] for key in named if key.endswith(name.removeprefix("transformer.") + ".weight"))
        assert matrix.sparsity == pytest.approx(sparsity_of(weight.matrix()))
        assert matrix.fingerprint == fingerprint(mask_of(weight.matrix()))
        assert matrix.pattern == ("2:4" if pattern == "2:4" else None)
        assert matrix.inside
    assert sum(matrix.inside for matrix in found.matrices) == len(weights)
    assert found.sparsity == pytest.approx(sparsity(model))
    assert (found.kind, found.pattern) == ("model", "2:4" if pattern == "2:4" else None)
    assert found.tensors == len({tensor.data_ptr() for tensor in model.state_dict().values()})


def test_a_packed_model_has_the_same_masks(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).bfloat16()
    prune(model, 0.6)
    # As a product with a mask leaves them.
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)
    model.save_pretrained(tmp_path / "plain")
    pack_checkpoint(tmp_path / "plain", tmp_path / "packed")
    plain, packed = inspect_checkpoint(tmp_path / "plain"), inspect_checkpoint(tmp_path / "packed")
    assert packed.kind == "packed model"
    assert packed.bytes < plain.bytes
    assert packed.matrices == plain.matrices
    assert packed.entries == plain.entries
    assert packed.sparsity == pytest.approx(sparsity(model))


def test_stacked_experts_are_read(tmp_path):
    model = tiny("gpt_oss")
    prune(model, 0.5)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    stacked = [matrix for matrix in found.matrices if len(matrix.shape) == 3]
    assert stacked
    for matrix in stacked:
        weight = model.state_dict()[matrix.name]
        assert matrix.fingerprint == fingerprint(mask_of(weight.reshape(-1, weight.shape[-1])))
        assert matrix.sparsity == pytest.approx(0.5, abs=0.01)
    assert "Which axis the inputs are on is not known" in found.notes[0]


def test_files_of_torch_save_are_read_and_nothing_in_them_is_run(tmp_path, llama):
    prune(llama, 0.5)
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin")
    assert inspect_checkpoint(tmp_path).sparsity == pytest.approx(sparsity(llama))
    assert inspect_checkpoint(tmp_path / "pytorch_model.bin").sparsity == pytest.approx(sparsity(llama))
    # The format before torch 1.6, in which many older models of the Hub are stored.
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert inspect_checkpoint(tmp_path).sparsity == pytest.approx(sparsity(llama))
    torch.save({"weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        inspect_checkpoint(tmp_path)


def test_packed_integers_are_named_as_such(tmp_path):
    tensors = {
        "model.layers.0.q_proj.qweight": torch.ones(8, 8, dtype=torch.int32),
        "model.layers.0.q_proj.scales": torch.rand(4, 8).half(),
        "model.norm.weight": torch.ones(8).half(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    found = inspect_checkpoint(tmp_path)
    assert found.notes[0] == "Quantised by gptq: integers are not read as weights."
    assert "packed integers of GPTQ or AWQ" in found.notes[1]
    assert found.entries == {"I32": 64, "F16": 40}


@pytest.mark.parametrize("save_mask", [False, True])
def test_an_adapter_tells_what_it_is_for(tmp_path, llama, save_mask):
    prune(llama, 0.5)
    config = MaskLoRAConfig(r=4, target_modules=["q_proj"], save_mask=save_mask, task_type="CAUSAL_LM")
    get_peft_model(llama, config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "someone/pruned"}))
    found = inspect_checkpoint(tmp_path)
    adapter = found.adapter
    assert (found.kind, adapter.peft_type, adapter.base_model) == ("adapter", "MASK_LORA", "someone/pruned")
    assert (adapter.r, adapter.target_modules, adapter.task_type) == (4, ["q_proj"], "CAUSAL_LM")
    assert (adapter.saved_masks, adapter.fingerprints) == (3 if save_mask else 0, 3)
    assert found.sparsity == pytest.approx(0.5)
    assert adapter.other_pruned == 18
    words = (
        "3 masks: loads onto the pruned base model"
        if save_mask
        else "3 fingerprints of masks: loads onto the base model with"
    )
    assert words in str(found)


def test_an_adapter_of_another_method_is_read_too(tmp_path, llama):
    get_peft_model(llama, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert (found.adapter.peft_type, found.adapter.r, found.sparsity) == ("LORA", 8, None)
    assert "no masks and no fingerprints" in str(found)


def test_the_dict_is_json_and_the_text_has_every_matrix(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert json.loads(json.dumps(found.to_dict()))["sparsity"] == found.sparsity
    for matrix in found.matrices:
        assert f"{matrix.name} " in str(found)


def test_a_repository_of_the_hub_is_read_from_its_files(tmp_path, monkeypatch, llama):
    prune(llama, 0.5)
    snapshot = tmp_path / "models--someone--pruned" / "snapshots" / "0123"
    llama.save_pretrained(snapshot, max_shard_size="10KB")
    (tmp_path / "models--someone--pruned" / "refs").mkdir()
    (tmp_path / "models--someone--pruned" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert inspect_checkpoint("someone/pruned").sparsity == pytest.approx(sparsity(llama))
    pack_checkpoint("someone/pruned", tmp_path / "packed")
    assert inspect_checkpoint(tmp_path / "packed").sparsity == pytest.approx(sparsity(llama))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (5, 16), (16, 32)])
@pytest.mark.parametrize("shape", [(32, 96), (5, 70), (3, 32, 64)])
def test_the_smallest_pattern_is_found_on_either_axis(n, m, shape):
    groups = torch.rand(*shape[:-1], -(-shape[-1] // m), m).argsort(-1) < n
    mask = groups.flatten(-2)[..., : shape[-1]]
    found = summary_of([mask.reshape(-1).numpy()], shape)
    assert found.pattern == f"{n}:{m}"
    assert found.pattern_across is None
    if len(shape) == 2:
        turned = summary_of([mask.T.reshape(-1).numpy()], (shape[1], shape[0]))
        assert (turned.pattern, turned.pattern_across) == (None, f"{n}:{m}")
        stored = summary_of([mask.T.reshape(-1).numpy()], (shape[1], shape[0]), transposed=True)
        assert stored == found


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 90), columns=st.integers(1, 50), cut=st.integers(1, 999), share=st.floats(0, 1))
def test_pieces_of_any_length_give_the_same_summary(rows, columns, cut, share):
    mask = np.random.default_rng(cut).random((rows, columns)) < share
    flat = mask.reshape(-1)
    found = summary_of([flat[begin : begin + cut] for begin in range(0, len(flat), cut)], mask.shape)
    assert found == summary_of([flat], mask.shape)
    assert found.fingerprint == fingerprint(torch.from_numpy(mask))
