"""Every kind of run ends with its report, and loggers see what it shows."""

import json
import os
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from peft_sparse import MaskLoRAConfig, SparseTrainer, SparseTrainingArguments, compress
from peft_sparse.reporting import read_report
from peft_sparse.training.run_report import RunReportCallback

from conftest import Samples, tiny
from trainers import StopAt, arguments, in_two_processes


LORA = MaskLoRAConfig(r=2, target_modules="all-linear")


def train(path, model=None, callbacks=(), resume=None, **options):
    made = arguments(path, **({"sparsity": 0.5} | options))
    adapter = LORA if made.retrains else None
    trainer = SparseTrainer(
        model or tiny("llama"), made, train_dataset=Samples(), peft_config=adapter, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# What `recovery` asks for, with the stages of the report and the trainings that it has logs of.
RUNS = {
    "none": (["pruned"], []),
    "retrain": (["pruned", "retrained"], ["training"]),
    "reconstruct": (["reconstructed"], ["reconstruction"]),
    "reconstruct,retrain": (["reconstructed", "retrained"], ["reconstruction", "training"]),
}


@pytest.mark.parametrize("recovery", RUNS)
def test_every_training_ends_with_its_report(recovery, tmp_path):
    trainer = train(tmp_path, recovery=recovery, calibration_samples=8, max_steps=4, seed=7)
    report = read_report(tmp_path)
    stages, logged = RUNS[recovery]
    assert [stage.name for stage in report.stages] == stages
    assert list(report.logs) == logged
    assert all(stage.sparsity == 0.5 and stage.seconds > 0 for stage in report.stages)
    assert report.pruning == trainer.pruning_report
    assert report.reconstruction == trainer.reconstruction_report
    assert (report.seed, report.resumed) == (7, False)
    assert report.texts["train"]["sequences"] == 24
    if "training" in logged:
        assert report.model.adapter == "MASK_LORA"
        assert [e["step"] for e in report.logs["training"] if "loss" in e] == [2, 4]
        assert f"{report.model.trained:,} parameters trained" in (tmp_path / "report.html").read_text()
    if "reconstruction" in logged:
        assert len([e for e in report.logs["reconstruction"] if "error_pruned" in e]) == len(
            report.reconstruction.regions
        )


def test_a_report_counts_the_parameters_of_the_model_apart_from_those_of_adapters(tmp_path):
    trainer = train(tmp_path, max_steps=1)
    facts = read_report(tmp_path).model
    assert facts.parameters == tiny("llama").num_parameters()
    assert facts.trained == trainer.model.get_nb_trainable_parameters()[0]
    assert facts.kind == "LlamaForCausalLM"


@pytest.mark.parametrize("recovery", ["retrain", "reconstruct"])
def test_the_report_of_a_resumed_run_says_so(recovery, tmp_path):
    options = {"recovery": recovery, "calibration_samples": 8, "save_strategy": "steps", "save_steps": 3}
    options |= {"logging_steps": 1}
    if recovery == "retrain":
        train(tmp_path, callbacks=[StopAt(3)], **options)
    else:
        with pytest.raises(RuntimeError, match="stopped reconstruction"):
            train(tmp_path, callbacks=[StopAt(9)], **options)
        assert not (tmp_path / "report.json").exists(), "a run that did not end has no report"
    train(tmp_path, resume=True, **options)
    report = read_report(tmp_path)
    assert report.resumed
    assert "This run was stopped and continued." in (tmp_path / "report.html").read_text()
    if recovery == "retrain":
        assert [e["step"] for e in report.logs["training"] if "loss" in e] == [1, 2, 3, 4, 5, 6]


def test_the_last_checkpoint_of_a_whole_model_can_be_loaded_as_the_report_says(tmp_path):
    model = tiny("llama")
    args = arguments(tmp_path, sparsity=0.5, save_strategy="steps", save_steps=3)
    SparseTrainer(model, args, train_dataset=Samples()).train()
    (saved,) = read_report(tmp_path).saved
    assert (saved.folder, saved.kind) == ("checkpoint-6", "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / saved.folder)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_without_the_callback_there_is_no_report(tmp_path):
    trainer = SparseTrainer(tiny("llama"), arguments(tmp_path, sparsity=0.5, max_steps=1), train_dataset=Samples())
    trainer.remove_callback(RunReportCallback)
    trainer.train()
    assert not (tmp_path / "report.json").exists()
    assert trainer.run_report().pruning.sparsity == 0.5


def test_a_report_that_cannot_be_written_loses_no_training(tmp_path, caplog):
    (tmp_path / "report.json").mkdir()
    trainer = train(tmp_path, max_steps=2)
    assert trainer.state.global_step == 2
    assert "its report could not be written" in caplog.text


def test_no_folder_and_no_token_of_this_machine_gets_into_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "run.py"), "--text", str(tmp_path / "text.txt")])
    tiny("llama").save_pretrained(tmp_path / "my-llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my-llama")
    train(tmp_path / "out", model, hub_token="hf_secret", run_name=str(tmp_path / "run"), max_steps=1)
    report = read_report(tmp_path / "out")
    assert report.model.name == "my-llama"
    assert "hub_token" not in report.arguments
    assert report.environment["command"] == "python run.py --text text.txt"
    for name in ("report.json", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "hf_secret" not in text
        assert str(tmp_path) not in text


class Recording(TrainerCallback):
    """Keeps what a logger such as TensorBoard's receives."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen += [(state.global_step, name, value) for name, value in logs.items()]

    def of(self, name):
        return [(step, value) for step, each, value in self.seen if each == name]


def test_loggers_see_every_pruning_of_a_schedule(tmp_path):
    recording = Recording()
    trainer = train(
        tmp_path,
        callbacks=[recording],
        sparsity=0.6,
        pruning_schedule="cubic",
        pruning_rounds=3,
        logging_steps=1,
    )
    expected = [(e["step"], e["pruning"]) for e in trainer.state.log_history if "pruning" in e]
    assert recording.of("pruning") == expected
    assert len(expected) == 3
    assert all(isinstance(value, (int, float)) for _, _, value in recording.seen)
    assert [step for step, _ in recording.of("loss")] == [1, 2, 3, 4, 5, 6]


def test_loggers_see_pruning_region_errors_and_stages_of_a_compression(tmp_path, monkeypatch):
    recording = Recording()
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [recording])
    tokens = torch.randint(0, 61, (16, 10))
    options = {"sparsity": 0.5, "calibration_samples": 8, "max_steps": 4, "r": 4, "use_cpu": True}
    options |= {"dataloader_pin_memory": False, "report_to": "none", "logging_steps": 2}
    report = compress(
        tiny("llama"), "balanced", tokens, evaluation={"text": tokens[:4]}, output_dir=tmp_path, **options
    )
    for stage in report.stages:
        assert [value for _, value in recording.of(f"{stage.name}_perplexity")] == [stage.perplexity["text"]]
    assert [value for _, value in recording.of("error")] == [region.error for region in report.reconstruction.regions]
    assert recording.of("loss")
    assert recording.of("sparsity")[-1][1] == 0.5
    assert read_report(tmp_path) == report
    assert all(stage.peak_memory_bytes > 0 for stage in report.stages)
    assert "sparse/model.safetensors" in (tmp_path / "report.html").read_text()


def test_only_the_process_that_saves_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(SparseTrainingArguments, "process_index", 1)
    monkeypatch.setattr(SparseTrainingArguments, "local_process_index", 1)
    trainer = train(tmp_path, max_steps=1)
    assert not list(tmp_path.glob("report.*"))
    assert trainer.run_report().stages[-1].name == "retrained"


def train_beside(folder):
    rank = int(os.environ["RANK"])
    train(os.path.join(folder, str(rank)), max_steps=1)


@pytest.mark.slow
def test_of_two_processes_one_writes(tmp_path):
    in_two_processes(tmp_path, __file__, f"train_beside({str(tmp_path)!r})")
    assert json.loads((tmp_path / "0" / "report.json").read_text())["task"] == "train"
    assert not list((tmp_path / "1").glob("report.*"))
