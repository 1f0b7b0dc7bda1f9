"""A training is shown as one bar on a terminal, and as ten lines elsewhere."""

import sys

import pytest
from transformers import PrinterCallback, ProgressCallback

from peft_sparse import SparseTrainer
from peft_sparse.training.one_bar import OneBar, show_one_bar

from conftest import Samples
from trainers import arguments


def trained(folder, llama, **options):
    trainer = SparseTrainer(
        llama,
        arguments(folder, sparsity=0.5, logging_steps=1, calibration_samples=8, **options),
        train_dataset=Samples(),
    )
    show_one_bar(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("recovery", ["retrain", "reconstruct,retrain"])
def test_a_terminal_shows_one_bar_for_each_stage(tmp_path, llama, monkeypatch, capsys, recovery):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    trained(tmp_path, llama, recovery=recovery, max_steps=6)
    shown = capsys.readouterr()
    assert "{'loss'" not in shown.out
    assert "step" not in shown.out
    last = [line for line in shown.err.replace("\r", "\n").splitlines() if "100%" in line]
    stages = [name for name in ("reconstructing", "retraining") if any(line.startswith(name) for line in last)]
    assert stages == [f"{name}ing" for name in recovery.split(",")]
    assert "loss" in last[-1]


def test_ten_lines_elsewhere(tmp_path, llama, capsys):
    trained(tmp_path, llama, max_steps=20)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("retraining: step 2 of 20, loss ")
    assert lines[-1].endswith(", 0 s left")


def test_the_lines_of_transformers_are_left_out_and_other_displays_stay(tmp_path, llama):
    trainer = SparseTrainer(llama, arguments(tmp_path, sparsity=0.5), train_dataset=Samples())
    show_one_bar(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert OneBar in kinds
    assert not {ProgressCallback, PrinterCallback} & set(kinds)
    # A notebook has another display, which is not doubled.
    trainer.remove_callback(OneBar)
    show_one_bar(trainer)
    assert OneBar not in [type(callback) for callback in trainer.callback_handler.callbacks]
