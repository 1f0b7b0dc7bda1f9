import gzip
import json
import os
import random
import subprocess
import sys

import numpy
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_sparse.evaluation import evaluate_tasks, load_model
from peft_sparse.evaluation.task_rows import PERP

from conftest import tiny
from evaluated import save_adapter, save_pruned, task_rows, write_rows
from texts import character_tokenizer


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows")


@pytest.fixture
def adapted(tmp_path):
    """(folder of the base, folder of the adapter)"""
    base = save_pruned(tmp_path / "base")
    return base, save_adapter(tmp_path / "adapter", base)


def log_likelihood(model, prompt, answer):
    tokenizer = character_tokenizer()
    begin, whole = tokenizer(prompt)["input_ids"], torch.tensor([tokenizer(prompt + answer)["input_ids"]])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=whole).logits[0, :-1], whole[0, 1:], reduction="none"
        )
    return -float(losses[len(begin) - 1 :].sum())


def rte_by_hand(model):
    """For each row, whether the likelier of lm-eval's two answers is the right one."""
    right = []
    for row in task_rows()["rte-validation"]:
        prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
        scores = [log_likelihood(model, prompt, f" {answer}") for answer in ("True", "False")]
        right.append(scores.index(max(scores)) == row["label"])
    return sum(right) / len(right)


def test_the_seven_tasks_have_one_name(llama, rows):
    report = evaluate_tasks(llama, character_tokenizer(), "perp", data_dir=rows)
    assert list(report.scores) == list(PERP)
    assert {score.rows for score in report.scores.values()} == {5}
    assert report.seed is None
    errors = [score.standard_error for score in report.scores.values()]
    assert report.mean == pytest.approx(sum(score.accuracy for score in report.scores.values()) / 7)
    assert report.mean_error == pytest.approx(sum(error**2 for error in errors) ** 0.5 / 7)
    table = str(report).splitlines()
    assert len(table) == 2 + 7 + 1
    assert table[2].startswith("| BoolQ")
    assert table[-1].startswith("| mean")
    # Both metrics are there, and the one of PERP is in the table.
    assert {"acc_norm", "acc_norm_stderr"} <= set(report.scores["hellaswag"].others)
    assert report.to_dict()["metric"] == "acc"


def test_plain_models_and_adapters_are_scored_as_they_compute(rows, adapted):
    models = [tiny("llama"), load_model(adapted[0], device="cpu").model, load_model(adapted[1], device="cpu").model]
    assert isinstance(models[2], PeftModel)
    for model in models:
        found = evaluate_tasks(model, character_tokenizer(), "rte", data_dir=rows).scores["rte"].accuracy
        assert found == rte_by_hand(model)


def test_a_limit_draws_rows_by_the_seed(llama, tmp_path):
    rows = task_rows() | {
        "rte-validation": [
            {"sentence1": f"{i}", "sentence2": "IT IS WET.", "label": i % 2} for i in range(40)
        ]
    }  # fmt: skip
    folder = write_rows(tmp_path / "rows", rows)
    state = random.getstate()
    torch_state, numpy_state = torch.get_rng_state(), numpy.random.get_state()[1]

    def report(seed):
        return evaluate_tasks(llama, character_tokenizer(), ["rte"], limit=7, seed=seed, data_dir=folder)

    assert report(1) == report(1)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (numpy.random.get_state()[1] == numpy_state).all()
    score = report(1).scores["rte"]
    assert (score.rows, score.total, report(1).seed) == (7, 40, 1)
    chosen = sorted(random.Random(1).sample(range(40), 7))
    only = write_rows(tmp_path / "only", {"rte-validation": [rows["rte-validation"][index] for index in chosen]})
    assert evaluate_tasks(llama, character_tokenizer(), "rte", data_dir=only).scores["rte"].accuracy == score.accuracy


def test_rows_may_be_compressed_and_labelled_as_in_super_glue(llama, tmp_path):
    rows = task_rows()["boolq-validation"]
    plain = write_rows(tmp_path / "plain", {"boolq-validation": rows})
    other = tmp_path / "other"
    other.mkdir()
    labelled = [{"passage": row["passage"], "question": row["question"], "label": int(row["answer"])} for row in rows]
    with gzip.open(other / "boolq-validation.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n\n" for row in labelled))
    found = [evaluate_tasks(llama, character_tokenizer(), "boolq", data_dir=folder) for folder in (plain, other)]
    assert found[0] == found[1]


def test_the_model_and_the_tokenizer_are_left_as_they_were(llama, rows):
    tokenizer = character_tokenizer()
    llama.train()
    evaluate_tasks(llama, tokenizer, "openbookqa", data_dir=rows)
    assert llama.training
    assert tokenizer.pad_token is None


def test_lm_eval_itself_loads_our_adapters_once_the_package_is_imported(adapted):
    base, adapter = adapted
    wrapped = HFLM(pretrained=base, peft=adapter, device="cpu", dtype="float32")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = load_model(adapter, device="cpu").model(input_ids=tokens).logits
        assert torch.equal(wrapped.model(input_ids=tokens).logits, expected)
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=tokens).logits
    assert not torch.allclose(expected, plain)


# A task whose rows lie in a file, in lm-eval's own language.
LOCAL_TASK = """
task: local_rte
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{sentence1}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: ["True", "False"]
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("imported", [True, False])
def test_the_command_of_lm_eval_works_with_the_import_and_only_with_it(adapted, rows, tmp_path, imported):
    base, adapter = adapted
    (tmp_path / "local_rte.yaml").write_text(LOCAL_TASK.format(file=rows / "rte-validation.jsonl"))
    code = f"{'import peft_sparse; ' if imported else ''}from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    arguments = ["--model", "hf", "--model_args", f"pretrained={base},peft={adapter}", "--device", "cpu"]
    arguments += ["--tasks", str(tmp_path / "local_rte.yaml")]
    run = subprocess.run(
        [sys.executable, "-c", code, "run", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert (run.returncode == 0) == imported
    assert ("|local_rte|" in run.stdout) == imported
    assert ("KeyError: 'MASK_LORA'" in run.stderr) != imported
