"""Every command on a tiny saved model, as a user calls it: what it writes, and what it says."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from peft_sparse import pack_sequences, perplexity, plan_pruning, sparsity
from peft_sparse.commands import retrain
from peft_sparse.commands.main import main

from checks import assert_same_weights, assert_zeros_kept, zeros_of
from conftest import tiny
from texts import save_tiny_model, write_text


SMALL = ["--calibration_samples", 4, "--calibration_length", 8, "--use_cpu"]
TRAINED = [*SMALL, "--max_steps", 4, "--sequence_length", 16, "--r", 2]
MEASURED = ["--evaluation_sequences", 2, "--evaluation_length", 32]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with a model and a text."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    return tmp_path


def call(*arguments):
    return main([str(argument) for argument in arguments])


def source():
    return ["--model", "model", "--text_file", "text.txt"]


def report_of(folder):
    report = json.loads((folder / "report.json").read_text())
    return report, {stage["name"]: stage for stage in report.get("stages", [])}


def test_prune_writes_a_sparse_model_and_its_report(folder, capsys):
    assert call("prune", *source(), "--pattern", "2:4", "--criterion", "wanda", *SMALL) == 0
    model = AutoModelForCausalLM.from_pretrained("pruned/sparse")
    assert sparsity(model) == 0.5
    assert AutoTokenizer.from_pretrained("pruned/sparse")("A")["input_ids"]
    report, _ = report_of(folder / "pruned")
    assert (report["pruning"]["pattern"], report["pruning"]["criterion"]) == ("2:4", "wanda")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "written: pruned/sparse (load it by AutoModelForCausalLM.from_pretrained)"
    assert lines[-2:] == ["written: pruned/report.json", "written: pruned/report.html"]


def test_prune_from_disk_gives_the_same_model():
    same = [*source(), "--sparsity", 0.6, "--criterion", "wanda", *SMALL]
    assert call("prune", *same, "--output_dir", "memory") == 0
    assert call("prune", *same, "--stream", "--output_dir", "disk") == 0
    memory, disk = (AutoModelForCausalLM.from_pretrained(f"{name}/sparse") for name in ("memory", "disk"))
    assert_same_weights(memory, disk)


def test_prune_needs_no_text_without_calibration():
    assert call("prune", "--model", "model", "--sparsity", 0.5, "--allocation", "lamp", "--use_cpu") == 0


def test_retrain_keeps_the_zeros_of_a_pruned_model(folder, capsys):
    call("prune", "--model", "model", "--sparsity", 0.5, "--use_cpu")
    options = ["--model", "pruned/sparse", "--text_file", "text.txt", *TRAINED, *MEASURED]
    assert call("retrain", *options) == 0
    pruned = AutoModelForCausalLM.from_pretrained("pruned/sparse")
    merged = AutoModelForCausalLM.from_pretrained("retrained/sparse")
    assert_zeros_kept(merged, zeros_of(pruned))
    assert not torch.equal(merged.model.norm.weight, pruned.model.norm.weight)
    adapted = AutoPeftModelForCausalLM.from_pretrained("retrained/adapter")
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, rtol=1e-3, atol=1e-3)
    report, stages = report_of(folder / "retrained")
    assert list(stages) == ["pruned", "retrained"]
    assert stages["retrained"]["sparsity"] == sparsity(merged)
    assert (report["task"], report["pruning"]) == ("train", None)
    assert {saved["folder"]: saved["base"] for saved in report["saved"]} == {"sparse": None, "adapter": "pruned"}
    assert "| retrained |" in capsys.readouterr().out


def test_retrain_takes_the_rate_of_the_adapter(folder, monkeypatch):
    seen = {}

    def started(args, recovery, defaults):
        seen[getattr(args, "adapter", "mask_lora")] = defaults["learning_rate"]
        raise ValueError("enough")

    monkeypatch.setattr(retrain, "start", started)
    assert call("retrain") == call("retrain", "--adapter", "scaled_lora") == 3
    assert seen == {"mask_lora": 2e-3, "scaled_lora": 2e-2}


def test_retrain_prunes_first_if_asked(folder):
    assert call("retrain", *source(), *TRAINED, *MEASURED, "--pattern", "2:4", "--criterion", "wanda") == 0
    report, stages = report_of(folder / "retrained")
    assert list(stages) == ["dense", "pruned", "retrained"]
    assert stages["pruned"]["sparsity"] == stages["retrained"]["sparsity"] == 0.5
    assert report["pruning"]["pattern"] == "2:4"
    held_out = pack_sequences(
        (folder / "text.txt").read_text().split("\n\n")[::10], AutoTokenizer.from_pretrained("model"), 32
    )
    merged = AutoModelForCausalLM.from_pretrained("retrained/sparse")
    measured = stages["retrained"]["perplexity"]["text.txt"]
    assert perplexity(merged, held_out[:2]) == pytest.approx(measured, rel=1e-4)


def test_reconstruct_fits_every_region(folder, capsys):
    options = [*source(), *SMALL, *MEASURED, "--pattern", "2:4", "--reconstruction_region", "block"]
    assert call("reconstruct", *options) == 0
    report, stages = report_of(folder / "reconstructed")
    assert list(stages) == ["dense", "reconstructed", "saved"]
    assert len(report["reconstruction"]["regions"]) == 3
    saved = AutoModelForCausalLM.from_pretrained("reconstructed/sparse")
    assert sparsity(saved) == stages["saved"]["sparsity"] == 0.5
    assert stages["saved"]["perplexity"] == stages["reconstructed"]["perplexity"]
    assert "| saved |" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["retrain", "reconstruct"])
def test_a_run_is_continued_by_the_word_true(folder, command):
    options = [*source(), *(TRAINED if command == "retrain" else SMALL), *MEASURED, "--sparsity", 0.5]
    options += ["--save_strategy", "steps", "--save_steps", 2]
    assert call(command, *options) == 0
    saved = AutoModelForCausalLM.from_pretrained(f"{command}ed/sparse")
    shutil.rmtree(folder / f"{command}ed" / ("checkpoint-4" if command == "retrain" else "sparse"))
    assert call(command, *options, "--resume_from_checkpoint", "true") == 0
    assert report_of(folder / f"{command}ed")[0]["resumed"]
    assert_same_weights(AutoModelForCausalLM.from_pretrained(f"{command}ed/sparse"), saved)


def test_compress_runs_a_recipe_with_the_values_that_are_given(folder, capsys):
    options = [*source(), *TRAINED, *MEASURED, "--recipe", "best", "--pattern", "2:4", "--logging_steps", 1]
    assert call("compress", *options) == 0
    report, stages = report_of(folder / "compressed")
    assert (report["arguments"]["refinement"], report["arguments"]["max_steps"]) == ("swap", 4)
    assert list(stages) == ["dense", "reconstructed", "retrained", "saved"]
    assert report["texts"]["calibration"]["length"] == 8
    assert sparsity(AutoModelForCausalLM.from_pretrained("compressed/sparse")) == stages["saved"]["sparsity"] == 0.5
    printed = capsys.readouterr().out
    assert "recipe best, prune to 2:4 by wanda, swaps, least squares and fit each region" in printed
    assert "retraining: step 4 of 4, loss" in printed
    assert "{'loss'" not in printed


def test_structured_writes_a_smaller_model(folder):
    assert call("structured", *source(), *SMALL, "--ratio", 0.3, "--structure", "ul-um") == 0
    compact = AutoModelForCausalLM.from_pretrained("compact/compact")
    assert compact.model.layers[0].mlp.up_proj.out_features < tiny("llama").model.layers[0].mlp.up_proj.out_features
    assert call("structured", *source(), *SMALL, "--ratio", 0.3, "--no_compact", "--output_dir", "zeros") == 0
    zeros = AutoModelForCausalLM.from_pretrained("zeros/compact")
    assert zeros.model.layers[0].mlp.up_proj.out_features == tiny("llama").model.layers[0].mlp.up_proj.out_features
    report, _ = report_of(folder / "compact")
    assert report["structured"]["ratio"] == 0.3


def test_merge_writes_a_plain_model_with_the_zeros_of_its_base(capsys):
    call("retrain", *source(), *TRAINED, *MEASURED, "--sparsity", 0.5)
    assert call("merge", "retrained/adapter") == 0
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert_zeros_kept(merged, zeros_of(AutoModelForCausalLM.from_pretrained("retrained/pruned")))
    assert_same_weights(merged, AutoModelForCausalLM.from_pretrained("retrained/sparse"))
    assert AutoTokenizer.from_pretrained("merged")("A")["input_ids"]
    assert call("merge", "retrained/adapter", "--base", "model", "--output_dir", "other") == 3
    assert "refused" in capsys.readouterr().err


def test_merge_refuses_to_fill_zeros(capsys):
    call("prune", "--model", "model", "--sparsity", 0.5, "--use_cpu")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained("pruned/sparse"), LoraConfig(target_modules=["q_proj"])
    )
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    model.save_pretrained("lora")
    assert call("merge", "lora") == 3
    assert "fill" in capsys.readouterr().err.splitlines()[-1]


def test_plan_takes_encoders_too(folder, capsys):
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=24)).save_pretrained("bert")
    lengths = ["--calibration_length", 8, "--sequence_length", 8]
    assert call("plan", "--model", "bert", "--sparsity", 0.5, "--stages", "retraining", *lengths) == 0
    assert "parameters trained" in capsys.readouterr().out


def test_plan_prints_what_the_library_plans(capsys):
    options = ["--model", "model", "--sparsity", 0.5, "--criterion", "sparsegpt", "--calibration_samples", 4]
    assert call("plan", *options, "--calibration_length", 8, "--sequence_length", 8) == 0
    printed = capsys.readouterr().out
    planned = plan_pruning("model", 0.5, criterion="sparsegpt", sequences=4, length=8, flops_per_second=1)
    assert str(planned).splitlines()[0] in printed
    assert [title for title in ("pruning", "reconstruction", "retraining") if f"{title}\n" in printed] == [
        "pruning",
        "reconstruction",
        "retraining",
    ]
    assert "written" not in printed
