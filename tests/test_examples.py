import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
)

from peft_sparse import sparsity

from texts import save_tiny_model, write_text


EXAMPLES = Path(__file__).parent.parent / "examples"


def launch(example, *arguments, **environment):
    """Run an example as a user does, and return what it printed."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command = [*accelerate, str(EXAMPLES / f"{example}.py"), *map(str, arguments)]
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


def test_the_quickstart_prunes_retrains_merges_and_saves(examples, tmp_path, monkeypatch, capsys):
    tiny_model_dir, text = save_tiny_model(tmp_path / "model"), write_text(tmp_path / "text.txt")
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


@pytest.mark.parametrize("example", ["compress", "retrain", "reconstruct"])
def test_an_example_is_the_command_of_its_name(examples, monkeypatch, capsys, example):
    monkeypatch.setattr(sys, "argv", [f"{example}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert end.value.code == 0
    assert f"peft-sparse {example} [arguments]" in capsys.readouterr().out


@pytest.mark.slow
def test_image_classification_prints_its_table_and_every_saved_model_keeps_its_zeros(examples, monkeypatch, capsys):
    few = {"max_train_samples": 64, "max_eval_samples": 40, "calibration_samples": 40, "num_train_epochs": 1}
    few |= {"dense_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "report_to": "none"}
    options = [word for name, value in few.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["image_classification.py", "--use_cpu", *options])
    run = runpy.run_path(str(EXAMPLES / "image_classification.py"))
    rows = {row["model"]: row for row in run["main"]().rows}
    assert list(rows) == ["dense", "pruned", "new statistics", *run["WAYS"]]
    assert rows.pop("dense")["sparsity"] == 0
    assert {round(row["sparsity"], 3) for row in rows.values()} == {0.95}
    for way in run["WAYS"]:
        assert rows[way]["filled"] == 0, way
        assert rows[way]["accuracy"] == rows[way]["trained"], way
    share = {way: rows[way]["share"] for way in run["WAYS"]}
    assert 0 < share["head"] < share["biases, norms and head"] < share["MaskLoRA beside these"] < 1
    assert share["all parameters"] == 1
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 12
    assert "Layers in which a zero was filled: 0." in printed
    classifier = AutoModelForImageClassification.from_pretrained("image-classification/masklora-beside-these")
    assert sparsity(classifier) == pytest.approx(0.95, abs=1e-3)
    assert AutoImageProcessor.from_pretrained("image-classification/head").size["height"] == 28


@pytest.mark.slow
def test_retrain_on_the_real_model(tmp_path):
    """The default run on SmolLM2, cut to a few steps: quality already comes back."""
    options = ["--max_steps", 8, "--evaluation_sequences", 2, "--output_dir", tmp_path]
    printed = launch("retrain", *options, HF_HUB_OFFLINE="1")
    report = json.loads((tmp_path / "report.json").read_text())
    value = {stage["name"]: next(iter(stage["perplexity"].values())) for stage in report["stages"]}
    assert value["dense"] < 40
    assert value["pruned"] > 5 * value["dense"]
    assert value["retrained"] < value["pruned"] / 3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert sparsity(merged) == pytest.approx(0.5, abs=1e-6)
    assert "| retrained |" in printed
