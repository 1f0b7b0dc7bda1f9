"""The notebook examples/tour.ipynb runs, on a tiny model."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from texts import character_tokenizer


ROOT = Path(__file__).parent.parent
TINY = """
source, length, steps = "tiny", 16, 2
documents = ["SOME TEXT, AND MORE OF IT. " * 20] * 99
"""


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)


@pytest.mark.slow
def test_the_tour_runs_on_a_tiny_model(notebook, tmp_path, monkeypatch, llama):
    llama.save_pretrained(tmp_path / "tiny")
    character_tokenizer().save_pretrained(tmp_path / "tiny")
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = TINY
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
    assert (tmp_path / "tour-output" / "sparse" / "model.safetensors").exists()


def test_the_tour_is_stored_with_its_pictures_and_without_errors(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not [output for output in outputs if output.output_type == "error"]
    assert str(Path(sys.prefix)) not in str(outputs)
