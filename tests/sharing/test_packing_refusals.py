"""Every refusal of packing and unpacking, with its words."""

import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_sparse.sharing import packed_weight
from peft_sparse.sharing.codec import Stream, decode_mask
from peft_sparse.sharing.inspection import inspect_checkpoint
from peft_sparse.sharing.packed_file import MARK, PackedFile, pack_file, unpack_file
from peft_sparse.sharing.packed_quantizer import PackedConfig, PackedQuantizer
from peft_sparse.sharing.packed_weight import Description, PackedWeight, write_packed
from peft_sparse.sharing.packing import pack_checkpoint, unpack_checkpoint


def stored(name="weight"):
    """A packed weight as bytes."""
    weight = torch.randn(60, 50).bfloat16()
    dense = weight.view(torch.uint8).numpy().tobytes()
    file = io.BytesIO()
    write_packed(Description(name, "BF16", (60, 50)), lambda begin, size: dense[begin : begin + size], file)
    return bytearray(file.getvalue())


def opened(content, name="weight"):
    return PackedWeight(lambda begin, size: bytes(content[begin : begin + size]), len(content), name)


def changed(place, value):
    content = stored()
    content[place : place + len(value)] = value
    return content


def described(**changes):
    """A packed weight whose description says something else, with a right checksum."""
    real = json.loads(Description("weight", "BF16", (60, 50)).to_json())
    with mock.patch.object(Description, "to_json", return_value=json.dumps(real | changes).encode()):
        return stored()


def other_decoder():
    with mock.patch.object(packed_weight, "decode", return_value=torch.zeros(1).numpy()):
        stored()


def verify(folder):
    with PackedFile(folder / "packed.safetensors") as file:
        file.verify()


def files(edit=None, header=None, step=verify):
    """A packed file that is edited as bytes, or whose header is, before `step` reads it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = {"weight": torch.randn(80, 80).bfloat16(), "norm": torch.ones(40)}
        save_file(tensors, folder / "plain.safetensors", {"format": "pt"})
        path = folder / "packed.safetensors"
        pack_file(folder / "plain.safetensors", path, bool)
        if header is not None:
            edit_header(path, header)
        if edit is not None:
            path.write_bytes(edit(path.read_bytes()))
        step(folder)


def edit_header(path, edit):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length])
    mark = json.loads(found["__metadata__"][MARK])
    edit(found, mark)
    if MARK in found["__metadata__"]:
        found["__metadata__"][MARK] = json.dumps(mark)
    header = json.dumps(found).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def with_tensors(**tensors):
    """Replace tensors of a packed file, as a program that knows nothing of packing may do. None removes one."""

    def edit(folder):
        path = folder / "packed.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        found = load_file(path) | tensors
        save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, metadata)
        verify(folder)

    return edit


def unpack(folder):
    unpack_file(folder / "packed.safetensors", folder / "again.safetensors", bool)


def pack_again(folder):
    pack_file(folder / "packed.safetensors", folder / "twice.safetensors", bool)


def checkpoint(edit=None, call=None):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).bfloat16()
        model.save_pretrained(folder / "plain")
        pack_checkpoint(folder / "plain", folder / "packed")
        if edit is not None:
            edit(folder)
        call(folder)


def of_config(change):
    def edit(folder):
        for kind in ("plain", "packed"):
            path = folder / kind / "config.json"
            path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return edit


def pack(folder):
    pack_checkpoint(folder / "plain", folder / "new")


def load(folder):
    AutoModelForCausalLM.from_pretrained(folder / "packed")


def cut(folder):
    path = folder / "packed" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2000])


def lose_a_shard(folder):
    path = folder / "plain" / "model.safetensors"
    path.rename(folder / "plain" / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "plain" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def miscounted(config):
    if "quantization_config" in config:
        config["quantization_config"]["tensors"] += 1
    return config


def quantised(config):
    return config | {"quantization_config": {"quant_method": "gptq"}}


ONES = torch.ones(40).numpy().tobytes()

REFUSALS = [
    (lambda: decode_mask(Stream(b"12"), 100), ValueError, "2 bytes, where 13 were expected"),
    (other_decoder, ValueError, r"Chunk 0 of 'weight' did not unpack to what was packed\. Run it again"),
    (lambda: opened(b"PSP"), ValueError, r"'weight' is damaged: it does not begin.*download the file again"),
    (lambda: opened(changed(0, b"X"), None), ValueError, "A packed weight is damaged: it does not begin"),
    (lambda: opened(changed(16, b"[")), ValueError, "'weight' is damaged: its description cannot be read"),
    (lambda: opened(changed(12, b"1234")), ValueError, "the checksum of its description is another one"),
    (lambda: opened(stored("other")), ValueError, "'weight' is damaged: it is 'other'"),
    (lambda: opened(stored() + b"12345678"), ValueError, r"it has \d+ bytes and needs \d+"),
    (lambda: opened(described(version=2)), ValueError, r"'peft_sparse_planes', version 2.*Update peft_sparse"),
    (lambda: opened(changed(-1000, b"12345678")).verify(), ValueError, "a checksum of chunk 0 is another one"),
    (lambda: files(lambda content: b"not a file"), ValueError, "the header of 'packed.safetensors' cannot be read"),
    (lambda: files(lambda content: content[:-200]), ValueError, r"cut off after \d+ bytes: it lacks 'weight'"),
    (
        lambda: files(lambda content: content.replace(ONES, bytes(159) + b"1")),
        ValueError,
        "'norm' in 'packed.safetensors' is damaged",
    ),
    (lambda: files(step=with_tensors(norm=None)), ValueError, r"lacks the tensor 'norm'\. Copy or download"),
    (lambda: files(step=with_tensors(norm=torch.ones(20))), ValueError, r"F32 \[20\], where F32 \[40\] was packed"),
    (
        lambda: files(header=lambda found, mark: found["__metadata__"].pop(MARK)),
        ValueError,
        "Expected a packed file, but the header of 'packed.safetensors' says nothing of it",
    ),
    (lambda: files(header=lambda found, mark: mark.clear()), ValueError, "does not say how it is packed"),
    (
        lambda: files(header=lambda found, mark: mark.update(version=7)),
        ValueError,
        r"'packed.safetensors' is packed by the codec 'peft_sparse_planes', version 7.*Update peft_sparse",
    ),
    (
        lambda: files(header=lambda found, mark: mark.update(header=mark["header"].replace("BF16", "F16"))),
        ValueError,
        r"'weight' is packed as BF16 \[80, 80\], but the header of 'packed.safetensors' says F16 \[80, 80\]",
    ),
    (
        lambda: files(header=lambda found, mark: mark.update(sha256="0"), step=unpack),
        ValueError,
        "has the SHA-256 [0-9a-f]{64}, where 0 was packed",
    ),
    (lambda: files(step=pack_again), ValueError, "'packed.safetensors' is packed already"),
    (lambda: pack_checkpoint(Path("nowhere"), "new"), ValueError, "Expected a folder or the id .* 'nowhere'"),
    (lambda: pack_checkpoint("./nowhere", "new"), ValueError, "'./nowhere', which is no folder"),
    (
        lambda: checkpoint(call=lambda folder: pack_checkpoint(folder / "plain", folder / "packed")),
        ValueError,
        "packed' not to exist or to be empty. Give another `target`",
    ),
    (
        lambda: checkpoint(call=lambda folder: unpack_checkpoint(folder / "plain", "new")),
        ValueError,
        "needs no unpack",
    ),
    (
        lambda: checkpoint(call=lambda folder: pack_checkpoint(folder / "packed", folder / "new")),
        ValueError,
        "packed' is packed already. Pack a checkpoint with plain weights",
    ),
    (lambda: checkpoint(of_config(quantised), pack), ValueError, "is quantised by gptq"),
    (
        lambda: checkpoint(lambda folder: (folder / "plain" / "adapter_config.json").write_text("{}"), pack),
        ValueError,
        "holds an adapter, which is small already. Merge it",
    ),
    (
        lambda: checkpoint(lambda folder: (folder / "plain" / "config.json").unlink(), pack),
        ValueError,
        "Expected config.json and safetensors in .*`save_pretrained`",
    ),
    (
        lambda: checkpoint(
            lambda folder: (folder / "packed" / "model.safetensors").unlink(),
            lambda folder: unpack_checkpoint(folder / "packed", folder / "new"),
        ),
        ValueError,
        r"Expected \d+ tensors .* found 0",
    ),
    (lambda: checkpoint(cut, load), ValueError, "'model.safetensors' is cut off .*'model"),
    (lambda: checkpoint(of_config(miscounted), load), ValueError, r"Expected \d+ tensors .* found \d+\. Copy"),
    (
        lambda: checkpoint(
            call=lambda folder: AutoModelForCausalLM.from_pretrained(
                folder / "plain", quantization_config=PackedConfig()
            )
        ),
        ValueError,
        "`PackedConfig` describes packed checkpoints, and this one is plain",
    ),
    (
        lambda: checkpoint(
            lambda folder: (folder / "plain" / "model.safetensors").unlink(),
            lambda folder: inspect_checkpoint(folder / "plain"),
        ),
        ValueError,
        "Expected weights in .*plain'.* Found none. Give the folder of a saved model or adapter",
    ),
    (
        lambda: checkpoint(lambda folder: (folder / "plain" / "config.json").write_text("{"), pack),
        ValueError,
        "config.json' is no JSON: .* Copy or download it again",
    ),
    (
        lambda: checkpoint(lose_a_shard, lambda folder: inspect_checkpoint(folder / "plain")),
        ValueError,
        "lacks 'model-00002-of-00002.safetensors', which its index names",
    ),
    (
        lambda: checkpoint(
            lambda folder: (folder / "text.txt").write_text("weights"),
            lambda folder: inspect_checkpoint(folder / "text.txt"),
        ),
        ValueError,
        "Expected 'text.txt' to be a safetensors file, or one that `torch.save` wrote, got another file. Give",
    ),
    (
        lambda: checkpoint(
            lambda folder: (folder / "plain" / "adapter_config.json").write_text("{}"),
            lambda folder: inspect_checkpoint(folder / "plain"),
        ),
        ValueError,
        "has adapter_config.json and lacks adapter_model.safetensors. Save the adapter again",
    ),
    (
        lambda: PackedQuantizer(PackedConfig()).update_attn_implementation(SimpleNamespace(distributed_config=1)),
        ValueError,
        "cannot be loaded in shards by several processes. Make a plain one with `unpack_checkpoint`",
    ),
]


@pytest.mark.parametrize(("refused", "error", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_the_refusal_says_what_to_do(refused, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        refused()
    assert list(tmp_path.iterdir()) == []
