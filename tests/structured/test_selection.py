"""Metrics by hand, and the units that a ratio of true parameter counts removes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.calibration.statistics import Statistics
from peft_sparse.structured.metrics import METRICS, standardised, unit_scores
from peft_sparse.structured.selection import ScoredUnits, select_units


W = torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.0, -4.0]])
KNOWN = Statistics(
    input_norm=torch.tensor([2.0, 3.0, 1.0]), input_variance=torch.tensor([0.5, 1.0, 2.0]), input_mean=torch.zeros(3)
)
BY_HAND = {
    "ifv": [0.5, 1.0, 2.0],
    "wifv": [0.5 * 10, 1.0 * 4, 2.0 * 16],
    "wifn": [2.0 * 2, 1.0 * 3, 2.0 * 1],
    "wanda_sp": [2.0 * 2, 1.0 * 3, 2.0 * 1],
    "magnitude_sp": [math.sqrt(10), 2.0, 4.0],
}


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_their_formulas(metric):
    assert torch.allclose(METRICS[metric].score(W, KNOWN), torch.tensor(BY_HAND[metric]))


def test_metrics_of_half_precision_are_computed_in_full():
    large = torch.full((300, 1), 20.0, dtype=torch.float16)
    assert METRICS["wifv"].score(large, Statistics(input_variance=torch.ones(1))).item() == 300 * 400


def test_standardisation_is_by_the_unbiased_deviation_of_a_layer():
    channels = torch.tensor([1.0, 2.0, 3.0, 6.0])
    expected = (channels - 3) / channels.std()
    assert torch.allclose(standardised(channels), expected)
    assert torch.allclose(unit_scores(channels, 2), expected.view(2, 2).mean(1))
    assert standardised(torch.ones(3)).tolist() == [0, 0, 0]


def sets(*scores, costs=(10, 1)):
    """Attention and MLP in turn, two of them per block."""
    kinds = ("attention", "mlp")
    return [
        ScoredUnits(f"block{i // 2}", kinds[i % 2], torch.tensor(score, dtype=torch.float), costs[i % 2])
        for i, score in enumerate(scores)
    ]


def kept(masks):
    return ["".join("01"[value] for value in mask.tolist()) for mask in masks]


LAYERS = sets([5, -1], [0, 1, 2, 3], [9, 8], [-5, -4, 4, -3])


def test_all_are_compared_and_ties_go_by_place():
    # Of 48 parameters 14: three neurons of the second block, the head, and a neuron of the first block.
    assert kept(select_units(LAYERS, 0.29, "al-am")) == ["10", "0111", "11", "0010"]
    # Of 48 parameters 12: with the head they are 13, and the best of the neurons stays.
    assert kept(select_units(LAYERS, 0.25, "al-am")) == ["10", "1111", "11", "0011"]
    assert kept(select_units(sets([0, 0], [0, 0]), 0.4, "al-am")) == ["01", "11"]


def test_heads_and_neurons_are_ranked_apart():
    # Of 40 parameters of heads 10 may go, of all 48 there go 14.
    assert kept(select_units(LAYERS, 0.29, "al-mm", 0.25)) == ["10", "0111", "11", "0010"]
    assert kept(select_units(LAYERS, 0.05, "al-mm", 0.2)) == ["11", "1111", "11", "0010"]


def test_layers_stay_equally_wide():
    for structure in ("ul-um", "ul-mm"):
        assert kept(select_units(LAYERS, 0.5, structure)) == ["10", "0011", "10", "0011"]
    # No head is as little as a tenth: neurons make up for it.
    assert kept(select_units(LAYERS, 0.1, "ul-mm")) == ["11", "0001", "11", "0010"]
    assert kept(select_units(LAYERS, 0.1, "ul-um")) == ["10", "0111", "10", "0111"]


def test_units_that_are_gone_go_first():
    scores = sets([-math.inf, -9], [-9, -9, -9])
    assert kept(select_units(scores, 10 / 23, "al-am")) == ["01", "111"]


@given(
    ratio=st.floats(0, 0.8),
    heads=st.integers(1, 5),
    neurons=st.integers(2, 40),
    cost=st.integers(1, 30),
    seed=st.integers(0, 99),
    structure=st.sampled_from(["al-am", "al-mm", "ul-mm", "ul-um"]),
)
@settings(max_examples=300, deadline=None)
def test_the_ratio_is_met_within_one_unit(ratio, heads, neurons, cost, seed, structure):
    torch.manual_seed(seed)
    model = sets(*[torch.randn(heads if i % 2 == 0 else neurons).tolist() for i in range(6)], costs=(cost, 3))
    try:
        masks = select_units(model, ratio, structure)
    except ValueError:
        # One unit of each stays: with few of them, less than the ratio can go.
        each = [(len(units.scores) - 1) * units.cost / units.size for units in model]
        attainable = sum((len(units.scores) - 1) * units.cost for units in model) / sum(units.size for units in model)
        assert ratio > (min(each) if structure == "ul-um" else attainable) - 1e-6
        return
    assert all(mask.any() for mask in masks)
    scopes = {"al": [list(range(6))], "ul-mm": [[0, 1], [2, 3], [4, 5]], "ul-um": [[i] for i in range(6)]}
    for scope in scopes[structure if structure in scopes else structure[:2]]:
        size = sum(model[i].size for i in scope)
        gone = sum(int((~masks[i]).sum()) * model[i].cost for i in scope)
        assert gone >= ratio * size - 1e-5
        went = [model[i].cost for i in scope if not masks[i].all()]
        unit = 0 if not went else 3 if structure.endswith("mm") and 3 in went else min(went)
        assert gone - unit < ratio * size + 1e-5
