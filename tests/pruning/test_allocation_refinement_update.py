"""The steps of `prune` after the criterion: dividing the sparsity, refining the mask, updating the kept weights."""

import copy

import pytest
import torch

from peft_sparse import OWL, DSnoT, LeastSquares, SemiStructured, SparseGPT, Swap, prune, sparsity
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.pruning.allocation import ALLOCATIONS
from peft_sparse.pruning.patterns import number_to_prune
from peft_sparse.pruning.refinement import REFINEMENTS

from checks import assert_same_weights, assert_zeros_kept, zeros_of
from conftest import inputs_of, tiny


FAMILIES = ["llama", "gpt2", "mixtral", "vit", "t5"]


def zeros_in(model) -> dict[str, int]:
    return {name: int((weight.matrix() == 0).sum()) for name, weight in prunable_weights(model).items()}


def calibration_of(family):
    batch = inputs_of(family, 24)
    return [batch | {"labels": torch.randint(0, 2, (24,))}] if family == "vit" else [batch]


# -- allocation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_prunes_exactly_what_was_asked_in_all(llama, tokens, allocation, criterion):
    size = sum(weight.matrix().numel() for weight in prunable_weights(llama).values())
    report = prune(llama, 0.617, criterion=criterion, allocation=allocation, calibration=tokens)
    counts = zeros_in(llama)
    assert sum(counts.values()) == number_to_prune(0.617, size)
    assert report.sparsity == sparsity(llama)
    assert report.allocation == allocation
    if allocation not in ("uniform", "uniform+"):
        assert len({weight.sparsity for weight in report.weights}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_outlier_weighed_sparsity_is_one_per_block_on_every_kind_of_model(family):
    model = tiny(family)
    size = sum(weight.matrix().numel() for weight in prunable_weights(model).values())
    prune(model, 0.5, criterion="wanda", allocation="owl", calibration=calibration_of(family))
    assert sum(zeros_in(model).values()) == number_to_prune(0.5, size)


def test_ones_own_sparsities_may_name_layers_by_their_endings(llama):
    plan = {"self_attn..*": 0.25, "mlp..*": 0.5}
    weights = prunable_weights(llama)
    sizes = {name: weight.matrix().numel() for name, weight in weights.items()}
    wanted = {name: (0.25 if "self_attn" in name else 0.5) * size for name, size in sizes.items()}
    prune(llama, sum(wanted.values()) / sum(sizes.values()), allocation=plan)
    assert zeros_in(llama) == {name: round(count) for name, count in wanted.items()}


def test_mixed_n_of_m_keeps_as_many_as_one_n_everywhere(llama, tokens):
    one = copy.deepcopy(llama)
    prune(one, SemiStructured(4, 8), criterion="wanda", calibration=tokens)
    prune(llama, SemiStructured(4, 8), criterion="wanda", allocation="owl", calibration=tokens)
    assert sum(zeros_in(llama).values()) == sum(zeros_in(one).values())
    shares = {name: zeros.reshape(-1, 8).sum(1).unique().tolist() for name, zeros in zeros_of(llama).items()}
    assert all(len(counts) == 1 for counts in shares.values()), shares


# -- refinement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_refining_changes_the_mask_and_not_the_counts(family, refinement, pattern):
    plain, refined = tiny(family), tiny(family)
    refined.load_state_dict(plain.state_dict())
    calibration = calibration_of(family)
    prune(plain, pattern, calibration=calibration)
    report = prune(refined, pattern, refinement=refinement, calibration=calibration)
    assert zeros_in(refined) == zeros_in(plain)
    # DSnoT leaves rows alone whose expected error is small already, in the vision transformer all.
    if refinement == "swap" or family == "llama":
        assert any((zeros_of(refined)[name] != zeros).any() for name, zeros in zeros_of(plain).items())
    if pattern == "2:4":
        assert all((zeros.reshape(-1, 4).sum(1) == 2).all() for zeros in zeros_of(refined).values())
    assert report.refinement == refinement
    assert all(weight.error_selected > 0 for weight in report.weights)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria"])
def test_swaps_lower_the_error_of_every_weight(llama, tokens, criterion):
    # In one batch of few tokens, so that errors are those of the very inputs that swaps are chosen on.
    report = prune(llama, 0.5, criterion=criterion, refinement="swap", calibration=tokens, batch_size=len(tokens))
    assert all(weight.error <= weight.error_selected * (1 + 1e-5) for weight in report.weights)
    assert any(weight.error < 0.98 * weight.error_selected for weight in report.weights)


# -- update ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_updating_keeps_the_mask_and_lowers_the_error(llama, tokens, criterion, pattern):
    # Weights of the first block's attention: there both runs see the same inputs.
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
    plain = copy.deepcopy(llama)
    options = {"criterion": criterion, "calibration": tokens, "batch_size": len(tokens)}
    before = prune(plain, pattern, **options)
    after = prune(llama, pattern, update=True, **options)
    assert all(torch.equal(zeros_of(llama)[name], zeros_of(plain)[name]) for name in names)
    assert zeros_in(llama) == zeros_in(plain)
    for old, new in zip(before.weights, after.weights, strict=True):
        if new.name in names:
            assert new.error_selected == pytest.approx(old.error)
        assert new.error <= new.error_selected * (1 + 1e-5)
    if criterion != "sparsegpt":
        assert after.error < 0.95 * before.error


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_is_refined_and_updated(family):
    model = tiny(family)
    report = prune(model, 0.5, refinement="swap", update=True, calibration=calibration_of(family))
    assert sparsity(model) == 0.5
    assert all(weight.error <= weight.error_selected for weight in report.weights)


def test_nothing_beside_the_criterion_is_asked_for_by_default(llama, tokens):
    same = copy.deepcopy(llama)
    report = prune(llama, 0.5, criterion="wanda", calibration=tokens)
    prune(same, 0.5, criterion="wanda", calibration=tokens, allocation=None, refinement=None, update=False)
    assert_same_weights(llama, same)
    assert {(report.allocation, report.refinement, report.update)} == {(None, None, False)}
    assert all(weight.error_selected is None for weight in report.weights)


def test_a_weight_that_is_zero_already_stays_so_under_an_allocation(llama):
    with torch.no_grad():
        llama.model.layers[0].self_attn.k_proj.weight.zero_()
    size = sum(weight.matrix().numel() for weight in prunable_weights(llama).values())
    prune(llama, 0.5, allocation="erk")
    assert sum(zeros_in(llama).values()) == number_to_prune(0.5, size)


@pytest.mark.parametrize("pattern", ["2:4", 0.4])
def test_an_update_fills_no_zero_that_was_there_before(llama, tokens, pattern):
    prune(llama, 0.5)
    zeros = zeros_of(llama)
    with pytest.warns(UserWarning, match="was requested, and the weights now have"):
        prune(llama, pattern, tokens, criterion="wanda", update=True)
    assert_zeros_kept(llama, zeros)


# -- values in place of names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "plain", "other"),
    [
        ({"criterion": "sparsegpt"}, {"criterion": SparseGPT()}, {"criterion": SparseGPT(damping=0.5)}),
        ({"allocation": "owl"}, {"allocation": OWL()}, {"allocation": OWL(spread=0.3)}),
        ({"refinement": "swap"}, {"refinement": Swap()}, {"refinement": Swap(max_swaps=1)}),
        ({"refinement": "dsnot"}, {"refinement": DSnoT()}, {"refinement": DSnoT(threshold=1e9)}),
        ({"update": True}, {"update": LeastSquares()}, {"update": LeastSquares(damping=10.0)}),
    ],
    ids=["sparsegpt", "owl", "swap", "dsnot", "update"],
)
def test_a_name_is_the_value_with_default_numbers(tokens, named, plain, other):
    models = [tiny("llama") for _ in range(3)]
    reports = [
        prune(model, 0.5, tokens, **{"criterion": "wanda"} | options)
        for model, options in zip(models, (named, plain, other), strict=True)
    ]
    assert_same_weights(models[0], models[1])
    weights = [prunable_weights(model) for model in models]
    assert any(not torch.equal(weights[0][name].matrix(), weights[2][name].matrix()) for name in weights[0])
    assert str(reports[0]).split(" in ")[0] == str(reports[1]).split(" in ")[0]
    if "update" not in named:
        assert str(reports[0]).split(" in ")[0] != str(reports[2]).split(" in ")[0], "the report names other numbers"
