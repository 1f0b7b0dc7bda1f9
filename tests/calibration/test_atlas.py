"""The atlas on one model per kind, and its reference on mistakes made on purpose. The whole runs by `-m atlas`."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_sparse import prune
from peft_sparse.model.blocks import prunable_weights


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SAMPLE = {
    "vision-language": "llava",
    "seq2seq": "t5",
    "encoder": "bert",
    "causal": "mixtral",
    "vision": "vit",
    "speech": "wav2vec2",
}


@pytest.fixture
def atlas(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import atlas

    return atlas


def entry_of(name):
    from atlas_models import entries

    return next(entry for entry in entries() if entry.type == name)


def built(name):
    from atlas_inputs import find_batches
    from atlas_models import build, configurations

    entry = entry_of(name)
    model = build(entry, next(configurations(entry)))
    return model, find_batches(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE.values())
def test_no_cell_of_the_sample_is_wrong(atlas, name):
    row = atlas.try_model(entry_of(name), atlas.STAGES)
    cells = {stage: row[stage] for stage in atlas.STAGES}
    assert not [cell for cell in cells.values() if cell.startswith(("wrong", "error"))], cells
    assert cells["prune"] == cells["2:4"] == "works"


def test_the_reference_finds_a_wrong_mask(atlas):
    from atlas_reference import Reference

    model, batches = built("llama")
    pruned = copy.deepcopy(model)
    names = [weight.name for weight in prune(pruned, 0.5, batches, criterion="wanda").weights]
    assert Reference(copy.deepcopy(model), batches).compare(pruned, names, 0.5).different == 0
    # The mean of the inputs, not their norm, would be measured by a wrong hook: magnitude stands for it.
    prune(wrong := copy.deepcopy(model), 0.5)
    assert Reference(copy.deepcopy(model), batches).compare(wrong, names, 0.5).different > 0


def test_the_reference_finds_padding_that_counts(atlas):
    from atlas_reference import Reference

    model, batches = built("llama")
    unmasked = [{key: value for key, value in batch.items() if key == "input_ids"} for batch in batches]
    pruned = copy.deepcopy(model)
    names = [weight.name for weight in prune(pruned, 0.5, unmasked, criterion="wanda").weights]
    assert Reference(model, batches).compare(pruned, names, 0.5).different > 0


def test_the_reference_sees_weights_that_are_used_without_their_layer(atlas):
    from atlas_reference import Watch

    class Uses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 4)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.layer.weight) + (self.layer.weight @ x.mT).mT

    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([Uses()])})
    inputs = torch.randn(2, 5, 6)
    watch = Watch(prunable_weights(model), called=set())
    with torch.no_grad(), watch.watching():
        model["blocks"][0](inputs)
    (squares,) = watch.squares.values()
    expected = 2 * inputs.flatten(0, 1).double().square().sum(0).expand(4, 6)
    assert torch.allclose(squares, expected, rtol=1e-5)


def test_a_change_after_a_refusal_is_wrong(atlas):
    from atlas_stages import outcome

    model, _ = built("llama")

    def refuses_late():
        with torch.no_grad():
            next(model.parameters()).zero_()
        prune(model, 2.0)

    assert outcome(model, refuses_late).startswith("wrong: refused with weights changed")
    assert outcome(model, lambda: prune(model, 2.0)).startswith("refused: ")
    assert outcome(model, lambda: [][0]).startswith("error: IndexError")


@pytest.mark.atlas
def test_no_row_of_the_atlas_is_wrong(tmp_path):
    """All model types: about 20 minutes on two cores."""
    command = [sys.executable, str(BENCHMARKS / "atlas.py"), "--output", str(tmp_path), "--workers", "2"]
    subprocess.run(command, check=True)
    rows = json.loads((tmp_path / "atlas.json").read_text())["rows"]
    assert len(rows) > 500
    found = [
        (row["type"], cell) for row in rows for cell in map(str, row.values()) if cell.startswith(("wrong", "error"))
    ]
    assert found == []
    assert not [row["type"] for row in rows if "crashed" in row]
