"""The commands `pack`, `unpack` and `inspect`, as `peft-sparse` calls them."""

import argparse
import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import prune
from peft_sparse.commands import inspect, pack, unpack


def call(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def plain(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    prune(model, "2:4")
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_pack_and_unpack_name_what_they_wrote(tmp_path, plain, capsys):
    (written,) = call(pack, plain, tmp_path / "packed")
    assert written == f"{tmp_path / 'packed'} (load it by from_pretrained, after `import peft_sparse`)"
    assert "MB packed" in capsys.readouterr().out
    assert call(unpack, tmp_path / "packed", tmp_path / "again") == [str(tmp_path / "again")]
    for path in plain.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_inspect_prints_a_text_or_json(plain, capsys):
    assert call(inspect, plain) == []
    assert "sparsity 0.5000 of 14 matrices inside of blocks, all 2:4" in capsys.readouterr().out
    assert call(inspect, plain, "--json") == []
    found = json.loads(capsys.readouterr().out)
    assert (found["sparsity"], found["pattern"], len(found["matrices"])) == (0.5, "2:4", 16)
