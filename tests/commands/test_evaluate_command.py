import argparse
import gzip
import json

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_sparse import MaskLoRAConfig, perplexity, prune
from peft_sparse.commands import evaluate
from peft_sparse.evaluation.protocol import windows_of

from conftest import tiny
from texts import character_tokenizer


TEXT = "A LINE OF TEXT, AND MORE OF IT. " * 4


@pytest.fixture
def models(tmp_path):
    """A dense model, a pruned one, and an adapter on that."""
    folders = [str(tmp_path / name) for name in ("dense", "pruned", "tuned")]
    model = tiny("llama")
    model.save_pretrained(folders[0])
    prune(model, 0.5)
    model.save_pretrained(folders[1])
    for folder in folders[:2]:
        character_tokenizer().save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folders[1])
    get_peft_model(base, MaskLoRAConfig(target_modules="all-linear")).save_pretrained(folders[2])
    return folders


def run(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return evaluate.run(parser.parse_args(list(arguments)))


def test_it_prints_one_table_and_writes_the_numbers(models, tmp_path, capsys):
    text, results = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text(TEXT)
    options = ["--window", "16", "--rounds", "1", "--new-tokens", "2", "--device", "cpu", "--json", str(results)]
    assert run(*models, "--text_file", str(text), *options) == [str(results)]
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][2:] == [
        "dense",
        "pruned",
        "tuned on pruned",
    ]
    found = json.loads(results.read_text())["models"]
    windows = windows_of([TEXT], character_tokenizer(), 16, None)
    assert found[0]["perplexity"]["perplexity"] == perplexity(tiny("llama"), windows)
    assert found[2]["generation"]["tokens_per_second"] > 0
    assert str(tmp_path) not in results.read_text()


def test_json_lines_are_joined_as_documents(models, tmp_path, capsys):
    with gzip.open(tmp_path / "text.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in (TEXT, TEXT))
    assert run(models[0], "--text-file", str(tmp_path / "text.jsonl.gz"), "--window", "16", "--rounds", "0") == []
    counted = 15 * len(windows_of([TEXT, TEXT], character_tokenizer(), 16, None))
    assert f" {counted} counted" in capsys.readouterr().out


def test_speed_and_tasks_are_asked_for_by_name(models, tmp_path, capsys):
    rows = [{"sentence1": f"IT RAINS {i}.", "sentence2": "IT IS WET.", "label": i % 2} for i in range(6)]
    (tmp_path / "rte-validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(models[1], "--tasks", "rte", "--limit", "4", "--data_dir", str(tmp_path), "--rounds", "0", "--speed")
    printed = capsys.readouterr().out
    assert " RTE |" in printed
    assert "4 rows each, rows drawn with seed 0" in printed
    assert "Sparse kernels, pruned:" in printed
