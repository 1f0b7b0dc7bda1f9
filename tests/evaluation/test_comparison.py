import json

import pytest
import torch

from peft_sparse import perplexity, sparsity
from peft_sparse.evaluation import LoadedModel, compare_models, evaluate_tasks, load_model
from peft_sparse.evaluation.protocol import windows_of

from conftest import tiny
from evaluated import TEXT, save_adapter, save_dense, save_pruned, write_rows
from texts import character_tokenizer


@pytest.fixture
def folders(tmp_path):
    dense, pruned = save_dense(tmp_path / "dense"), save_pruned(tmp_path / "pruned", "2:4")
    return [dense, pruned, save_adapter(tmp_path / "tuned", pruned)]


def columns(table):
    """The columns of a table in Markdown by their heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in str(table).splitlines() if "|" in line]
    return {head: cells for head, _, *cells in zip(*rows, strict=True)}


def test_models_are_measured_as_each_alone(folders):
    found = compare_models(folders, TEXT, window=16, rounds=0, device="cpu")
    windows = windows_of(TEXT, character_tokenizer(), 16, None)
    models = [load_model(folder, device="cpu").model for folder in folders]
    assert [one.perplexity.perplexity for one in found.models] == [perplexity(model, windows) for model in models]
    assert [one.sparsity for one in found.models] == [sparsity(model) for model in models]
    with torch.no_grad():
        best = [model(windows).logits[:, :-1].argmax(-1) for model in models]
    assert [one.agreement for one in found.models] == [float((own == best[0]).double().mean()) for own in best]
    assert found.models[0].agreement == 1 > found.models[2].agreement
    assert all(one.generation is None and one.tasks is None for one in found.models)


def test_the_table_has_what_was_asked_for(folders, tmp_path):
    rows = write_rows(tmp_path / "rows")
    found = compare_models(
        folders, TEXT, window=16, tasks=["rte", "boolq"], limit=3, data_dir=rows, rounds=2, new_tokens=4, device="cpu"
    )
    table = columns(found)
    assert list(table) == [
        "model", "dtype", "on disk", "sparsity", "perplexity", "agreement", "RTE", "BoolQ", "mean", "tokens/s", "speed"
    ]  # fmt: skip
    assert table["model"] == ["dense", "pruned", "tuned on pruned"]
    assert table["sparsity"] == ["0.0000", "0.5000", "0.5000"]
    assert table["agreement"][0] == "100.0 %"
    assert table["speed"][0] == "1.00"
    assert table["on disk"][2].endswith("+ base")
    assert found.models[0].tasks == evaluate_tasks(
        tiny("llama"), character_tokenizer(), ["rte", "boolq"], limit=3, data_dir=rows
    )
    written = json.dumps(found.to_dict())
    assert str(tmp_path) not in str(found) + written
    assert json.loads(written)["models"][1]["perplexity"]["tokens"] == found.models[1].perplexity.tokens


def test_without_text_and_tasks_there_are_size_and_sparsity(folders):
    assert list(columns(compare_models(folders[:1], rounds=0, device="cpu"))) == [
        "model", "dtype", "on disk", "sparsity"
    ]  # fmt: skip


def test_a_model_in_memory_stands_beside_one_on_disk(folders):
    ours = LoadedModel("mine", tiny("llama"), character_tokenizer())
    found = compare_models([folders[0], ours], TEXT, window=16, rounds=1, new_tokens=2, device="cpu")
    assert found.models[1].agreement == 1
    assert found.models[1].size is None
    assert columns(found)["on disk"][1] == ""


def test_kernels_are_measured_of_models_that_are_not_dense(folders):
    found = compare_models(folders[:2], rounds=0, kernels=True, device="cpu")
    assert found.models[0].kernels is None
    assert "Sparse kernels, pruned:" in str(found)
    assert "Sparse kernels, dense: not measured, because it is dense (sparsity 0.0000)." in str(found)
    assert found.to_dict()["models"][1]["kernels"]["rows"]
