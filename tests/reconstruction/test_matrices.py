"""Regions of single matrices: least-squares problems that are solved and not trained."""

import pytest
import torch

from peft_sparse import LeastSquares, prune

from checks import assert_same_weights, assert_same_zeros, inputs_by_hooks, zeros_of
from rebuilding import batches_of, lively, rebuild, weight_of


def test_single_matrices_get_better(family):
    model, pruned = lively(family), lively(family)
    report = rebuild(model, batches_of(family), region="matrix")
    prune(pruned, 0.5)
    assert_same_zeros(model, zeros_of(pruned))
    assert {region.name for region in report.regions} == set(zeros_of(model))
    assert all(region.error < region.error_pruned for region in report.regions)
    assert all(region.steps == 0 for region in report.regions)


@pytest.mark.parametrize(
    ("damping", "options"),
    [
        (0.01, {}),
        (0.01, {"update": True}),
        (0.3, {"update": LeastSquares(damping=0.3), "criterion": "wanda", "refinement": "swap"}),
    ],
)
def test_single_matrices_reach_their_optimum(damping, options):
    """q, k and v of the first block, whose inputs no other matrix changes."""
    model, dense, tokens = lively("llama"), lively("llama"), batches_of("llama")
    rebuild(model, tokens, region="matrix", mode="SS", **options)
    inputs = inputs_by_hooks(dense, tokens)
    for kind in "qkv":
        name = f"model.layers.0.self_attn.{kind}_proj"
        X, W, found = inputs[name].double(), weight_of(dense, name), weight_of(model, name)
        ridge = damping * (X.T @ X).diagonal().mean().sqrt() ** 2
        extended = torch.cat([X, ridge.sqrt() * torch.eye(X.shape[1])])
        for row, kept in enumerate(found != 0):
            best = torch.linalg.lstsq(extended[:, kept], extended @ W[row]).solution
            torch.testing.assert_close(found[row, kept], best, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mode", ["SS", "DD"])
def test_a_model_that_was_pruned_before_is_solved_for_its_dense_weights(mode):
    at_once, pruned, calibration = lively("llama"), lively("llama"), batches_of("llama")
    report = rebuild(at_once, calibration, region="matrix", mode=mode)
    prune(pruned, 0.5)
    later = rebuild(pruned, calibration, pattern=None, dense=lively("llama"), region="matrix", mode=mode)
    assert_same_weights(pruned, at_once)
    assert [r.error for r in later.regions] == [r.error for r in report.regions]


@pytest.mark.parametrize("mode", ["SS", "DD"])
def test_a_matrix_is_solved_on_the_inputs_of_the_mode(mode):
    """The report's errors, on the inputs of the finished model ("SS") or of the dense one ("DD")."""
    model, dense, calibration = lively("llama"), lively("llama"), batches_of("llama")
    report = rebuild(model, calibration, region="matrix", mode=mode)
    inputs = inputs_by_hooks(model if mode == "SS" else dense, calibration)
    for region in report.regions:
        X, W = inputs[region.name].double(), weight_of(dense, region.name)
        wrong = (X @ (weight_of(model, region.name) - W).T).norm() / (X @ W.T).norm()
        assert region.error == pytest.approx(float(wrong), rel=1e-3)
