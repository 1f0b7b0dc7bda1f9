"""`report.json` comes back as it was written, and what is no report of this schema is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from peft_sparse import prune, prune_structured, reconstruct, residual_lora
from peft_sparse.reconstruction import Fit
from peft_sparse.reporting import SCHEMA, RunReport, SavedModel, Stage, as_run_report, read_report, write_report

from conftest import tiny


ROOT = Path(__file__).parent.parent.parent
TOKENS = torch.randint(0, 61, (6, 12), generator=torch.Generator().manual_seed(0))


def corrected():
    pruned = tiny("llama")
    prune(pruned, 0.5)
    return residual_lora(pruned, tiny("llama"), TOKENS, r=2)[1]


# Every function that returns a report, with a part of the report that is its own.
FUNCTIONS = {
    "prune": lambda: prune(tiny("llama"), 0.5, TOKENS, criterion="wanda", update=True, exclude_modules=["k_proj"]),
    "prune_structured": lambda: prune_structured(tiny("llama"), 0.3, TOKENS),
    "reconstruct": lambda: reconstruct(tiny("llama"), "2:4", TOKENS, criterion="wanda", fit=Fit(max_steps=1)),
    "residual_lora": corrected,
}


@pytest.mark.parametrize("task", FUNCTIONS)
def test_the_report_of_every_function_is_written_and_read_as_it_was(task, tmp_path):
    report = FUNCTIONS[task]()
    json_path, page = write_report(report, tmp_path / "new")
    assert (json_path.name, page.name) == ("report.json", "report.html")
    read = read_report(tmp_path / "new")
    assert read.task == task
    assert report in (read.pruning, read.structured, read.reconstruction, read.residual)
    plain = json.loads(json_path.read_text())
    assert list(plain)[0] == "schema"
    assert plain["schema"] == SCHEMA
    assert read.to_dict() == plain
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_a_report_tells_the_model_and_how_it_is_loaded(tmp_path):
    model = tiny("llama")
    report = prune(model, 0.5)
    model.save_pretrained(tmp_path / "sparse")
    write_report(report, tmp_path, model=model, saved="sparse")
    read = read_report(tmp_path)
    assert read.model.parameters == model.num_parameters()
    assert read.model.prunable == sum(weight.shape[0] * weight.shape[1] for weight in report.weights)
    assert read.model.adapter is None
    assert read.saved[0].auto_class == "AutoModelForCausalLM"
    assert read.saved[0].bytes == (tmp_path / "sparse" / "model.safetensors").stat().st_size
    assert "AutoModelForCausalLM.from_pretrained(&#39;sparse&#39;)" in (tmp_path / "report.html").read_text()


def test_numbers_that_are_not_finite_survive_json(tmp_path):
    logs = {"training": ({"loss": math.nan, "step": 1}, {"loss": 2.0, "step": 2})}
    stages = (Stage("pruned", {"text": math.inf}, 0.5),)
    path, _ = write_report(RunReport("train", stages=stages, logs=logs), tmp_path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read_report(path).stages == stages
    assert read_report(path).logs["training"][0]["loss"] == "nan"


def test_the_report_of_the_demonstration_is_read(tmp_path):
    read = read_report(ROOT / "benchmarks" / "results" / "compress-smollm2-cpu.json")
    assert [stage.name for stage in read.stages] == ["dense", "reconstructed", "retrained", "saved"]
    assert (len(read.pruning.weights), len(read.reconstruction.regions)) == (210, 30)
    assert read.reconstruction.pruning is read.pruning
    write_report(read, tmp_path)
    assert read_report(tmp_path) == read


def test_writing_replaces_an_older_report(tmp_path):
    for seed in (1, 2):
        write_report(RunReport("train", seed=seed), tmp_path)
    assert read_report(tmp_path).seed == 2


def test_the_schema_is_documented_field_by_field():
    text = (ROOT / "docs" / "details" / "report.md").read_text()
    for kind in (RunReport, Stage, SavedModel):
        assert [each.name for each in dataclasses.fields(kind) if f"`{each.name}`" not in text] == []


def test_a_run_report_is_left_as_it_is():
    report = RunReport("train")
    assert as_run_report(report) is report
