"""A packed checkpoint loads as the plain model, unpacks to the same bytes, and is never read wrongly."""

import json
import subprocess
import sys
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_sparse import MaskLoRAConfig, prune, sparsity
from peft_sparse.sharing import packed_file
from peft_sparse.sharing.packed_file import PackedFile, pack_file, unpack_file
from peft_sparse.sharing.packing import pack_checkpoint, unpack_checkpoint

from checks import assert_same_weights, assert_same_zeros, train_some, zeros_of
from conftest import tiny


load = AutoModelForCausalLM.from_pretrained


def pruned(dtype=torch.bfloat16, **options):
    """A small model with half of its weights zero, large enough to be packed."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, **options)).to(dtype)
    prune(model, 0.5)
    return model.eval()


def packed(folder, model=None, **saving):
    """Save a model as `plain` and `packed` in a folder, and return both places."""
    (model or pruned()).save_pretrained(folder / "plain", **saving)
    pack_checkpoint(folder / "plain", folder / "packed")
    return folder / "plain", folder / "packed"


def contents(folder):
    """The contents of all files but the card, which is written anew."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_same_bits(found, expected):
    assert_same_weights(found, expected)
    for name, tensor in expected.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype, name


@pytest.fixture
def everything_packed(monkeypatch):
    """Packs tensors of any size, also where that makes them larger."""
    monkeypatch.setattr(packed_file, "_SMALLEST", 1)
    monkeypatch.setattr(packed_file, "_WORTH", 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
def test_a_packed_model_loads_as_the_plain_one(tmp_path, dtype, options, shards):
    plain, small = packed(tmp_path, pruned(dtype, **options), **shards)
    assert_same_bits(load(small), load(plain))
    for loading in ({"dtype": torch.float32}, {"dtype": torch.float16}, {"device_map": "cpu"}):
        assert_same_bits(load(small, **loading), load(plain, **loading))


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss", "gemma3"])
def test_the_models_own_conversions_follow(tmp_path, everything_packed, family):
    plain, small = packed(tmp_path, tiny(family).bfloat16())
    with safe_open(small / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"U8"}  # noqa: SIM118
    assert_same_bits(load(small), load(plain))
    load(small).save_pretrained(tmp_path / "small again")
    load(plain).save_pretrained(tmp_path / "plain again")
    assert contents(tmp_path / "small again") == contents(tmp_path / "plain again")


def test_a_loaded_model_is_a_plain_one(tmp_path, tokens):
    plain, small = packed(tmp_path, pruned(torch.float32))
    model = load(small)
    zeros = zeros_of(model)
    assert not model.is_quantized
    assert not {"quantization_config", "transformers_weights"} & model.config.to_dict().keys()
    adapted = get_peft_model(model, MaskLoRAConfig(target_modules="all-linear", init_weights=False))
    train_some(adapted, tokens)
    merged = adapted.merge_and_unload()
    assert_same_zeros(merged, zeros)
    prune(merged, 0.7)
    merged.save_pretrained(tmp_path / "saved")
    assert sparsity(load(tmp_path / "saved")) == pytest.approx(0.7, abs=1e-3)
    # It was read without damage to the files.
    assert_same_bits(load(small), load(plain))


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
def test_unpacking_restores_every_file(tmp_path, shards):
    pruned().save_pretrained(tmp_path / "plain", **shards)
    (tmp_path / "plain" / "README.md").write_text("# A model\n")
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    report = pack_checkpoint(tmp_path / "plain", tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert contents(tmp_path / "unpacked") == contents(tmp_path / "plain")
    assert "# A model\n" in (tmp_path / "unpacked" / "README.md").read_text()
    assert report.packed_bytes == sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert report.fraction < 0.6


def test_a_configuration_without_a_dtype_loads_in_the_same_dtype(tmp_path):
    pruned().save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    pack_checkpoint(tmp_path / "plain", tmp_path / "packed")
    assert_same_bits(load(tmp_path / "packed"), load(tmp_path / "plain"))
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert contents(tmp_path / "unpacked") == contents(tmp_path / "plain")


def test_every_tensor_of_a_file_survives(tmp_path):
    tensors = {
        "weight": torch.randn(600, 500).bfloat16() * (torch.rand(600, 500) > 0.5),
        "minus": -torch.zeros(100, 100),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.ones(3, dtype=torch.bool),
        "odd": torch.randn(5).half(),
        "numbers": torch.arange(9),
        "scalar": torch.tensor(3.0),
        "nothing": torch.zeros(0, 4),
        "float8": torch.randn(80, 80).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "plain.safetensors", {"format": "pt", "made": "by a test"})
    pack_file(tmp_path / "plain.safetensors", tmp_path / "packed.safetensors", bool)
    stored = load_file(tmp_path / "packed.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.uint8} >= {"weight", "minus", "bytes"}
    assert stored.keys() == tensors.keys()
    unpack_file(tmp_path / "packed.safetensors", tmp_path / "again.safetensors", bool)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_a_large_tensor_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    save_file({"weight": torch.randn(4096, 4096).bfloat16()}, tmp_path / "plain.safetensors")
    for step, source, target in ((pack_file, "plain", "packed"), (unpack_file, "packed", "again")):
        tracemalloc.start()
        step(tmp_path / f"{source}.safetensors", tmp_path / f"{target}.safetensors", lambda done: None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6, step  # the tensor takes 34e6


@pytest.mark.slow
def test_without_the_import_transformers_refuses_and_names_it(tmp_path):
    _, small = packed(tmp_path)
    code = f"from transformers import AutoModelForCausalLM as Auto; Auto.from_pretrained({str(small)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "Run `import peft_sparse` before `from_pretrained`" in run.stderr.splitlines()[-1]


def test_nothing_is_left_of_a_target_that_was_not_finished(tmp_path):
    plain, small = packed(tmp_path)
    data = bytearray((small / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (small / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged.*again"):
        unpack_checkpoint(small, tmp_path / "unpacked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "plain"]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    weight = torch.randn(80, 80).bfloat16() * (torch.rand(80, 80) > 0.5)
    save_file({"weight": weight, "norm": torch.ones(40)}, folder / "plain.safetensors", {"format": "pt"})
    pack_file(folder / "plain.safetensors", folder / "packed.safetensors", bool)
    return folder


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_changed_bit_is_refused_or_changes_nothing(small_file, data):
    expected = load_file(small_file / "plain.safetensors")
    content = bytearray((small_file / "packed.safetensors").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = small_file / "changed.safetensors"
    path.write_bytes(content)
    try:
        with PackedFile(path) as file:
            file.verify()
            found = {name: None if (weight := file.weight(name)) is None else weight.tensor() for name in file.plain}
    except ValueError:
        return
    assert torch.equal(found["weight"], expected["weight"])
    assert found.keys() == expected.keys()
