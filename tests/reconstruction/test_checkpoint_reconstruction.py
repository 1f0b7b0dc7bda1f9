"""Reconstruction of a model on disk, against that of the loaded model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_sparse import prune, reconstruct, reconstruct_checkpoint
from peft_sparse.reconstruction import Fit

from checks import assert_same_weights
from rebuilding import OwnError, Told, batches_of, lively, split


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"region": 2, "mode": "DD"},
        {"region": "matrix", "criterion": "wanda"},
        {"criterion": "wanda", "allocation": "owl", "refinement": "swap", "update": True},
        {"allocation": "erk"},
    ],
)
def test_a_checkpoint_is_reconstructed_as_the_loaded_model_would_be(tmp_path, options):
    lively("llama").save_pretrained(tmp_path / "dense")
    calibration, model = batches_of("llama"), lively("llama")
    options = split({"learning_rate": 5e-3, "max_steps": 3, "holdout": 0} | options)
    expected = reconstruct(model, 0.5, calibration, **options)
    report = reconstruct_checkpoint(tmp_path / "dense", tmp_path / "sparse", 0.5, calibration, **options)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"), model)
    assert [region.error for region in report.regions] == [region.error for region in expected.regions]
    assert report.pruning.sparsity == 0.5


def test_a_checkpoint_that_was_pruned_already_is_refused(tmp_path):
    model = lively("llama")
    prune(model, 0.5)
    model.save_pretrained(tmp_path / "pruned")
    with pytest.raises(ValueError, match=r"50.0% of them are zero already, .* Start from the dense model"):
        reconstruct_checkpoint(tmp_path / "pruned", tmp_path / "out", 0.5, batches_of("llama"))


def test_a_checkpoint_that_was_interrupted_is_resumed_into_a_new_folder(tmp_path):
    def interrupt(report):
        if report.name == "model.layers.1 (attention)":
            raise OwnError

    lively("llama").save_pretrained(tmp_path / "dense")
    model, told, calibration = lively("llama"), Told(), batches_of("llama")
    fit = Fit(max_steps=3)
    options = {"fit": fit, "state_dir": tmp_path / "state"}
    reconstruct(model, 0.5, calibration, fit=fit)
    with pytest.raises(OwnError):
        reconstruct_checkpoint(
            tmp_path / "dense", tmp_path / "one", 0.5, calibration, observer=Told(on_region=interrupt), **options
        )
    reconstruct_checkpoint(tmp_path / "dense", tmp_path / "other", 0.5, calibration, observer=told, **options)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), model)
    assert told.steps[0].region == "model.layers.1 (mlp)"
    # The weights of a block are seen for the first time when its turn comes.
    with torch.no_grad():
        model = lively("llama")
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "edited")
    with pytest.raises(ValueError, match=r"state' holds the state of a run with another model\. Resume with the same"):
        reconstruct_checkpoint(tmp_path / "edited", tmp_path / "third", 0.5, calibration, **options)
