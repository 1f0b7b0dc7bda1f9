import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sparse import MaskLoRAConfig, prune, sparsity
from peft_sparse.blocks import prunable_layers
from peft_sparse.calibration import evaluation_mode
from peft_sparse.criteria import CRITERIA
from peft_sparse.weights import weight_matrix

from checks import assert_zeros_kept, zeros_of
from conftest import tiny


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_every_criterion_and_pattern_on_every_family(model, tokens, criterion, pattern):
    untouched = {
        name: p.clone() for name, p in model.named_parameters() if name.removesuffix(".weight") not in prunable(model)
    }
    model.train()
    report = prune(model, pattern, criterion=criterion, calibration=tokens)
    assert sparsity(model) == report.sparsity == 0.5
    assert model.training
    for name, parameter in model.named_parameters():
        if name in untouched:
            assert torch.equal(parameter, untouched[name]), name
    if pattern == "2:4":
        for zeros in zeros_of(model).values():
            assert (zeros.reshape(-1, 4).sum(1) == 2).all()


def prunable(model):
    return prunable_layers(model).keys()


def test_magnitude_per_matrix_by_hand():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(3, 2, bias=False))])})
    model["layers"][0][0].weight.data = torch.tensor([[0.1, -3.0, 0.2], [2.0, -0.3, 1.0]])
    prune(model, 0.5)
    assert model["layers"][0][0].weight.tolist() == [[0.0, -3.0, 0.0], [2.0, 0.0, 1.0]]


def test_groups_differ_as_they_say(llama):
    by_row, by_matrix, by_model = (copy.deepcopy(llama) for _ in range(3))
    with torch.no_grad():
        for one in (by_row, by_matrix, by_model):
            one.model.layers[0].mlp.up_proj.weight[0] *= 100
            one.model.layers[1].mlp.up_proj.weight *= 100
    for one, group in ((by_row, "row"), (by_matrix, "matrix"), (by_model, "model")):
        prune(one, 0.5, group=group)
        assert sparsity(one) == 0.5
    zeros = {group: zeros_of(m) for group, m in (("row", by_row), ("matrix", by_matrix), ("model", by_model))}
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    assert (zeros["row"][first].sum(1) == 8).all()
    assert zeros["matrix"][first][0].sum() == 0
    assert zeros["matrix"][second].float().mean() == 0.5
    assert zeros["model"][second].float().mean() < 0.02


def test_random_across_the_model_repeats_with_the_seed(llama):
    other = copy.deepcopy(llama)
    torch.manual_seed(5)
    prune(llama, 0.5, criterion="random", group="model")
    torch.manual_seed(5)
    prune(other, 0.5, criterion="random", group="model")
    assert all(torch.equal(a, b) for a, b in zip(zeros_of(llama).values(), zeros_of(other).values(), strict=True))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_pruning_again_changes_nothing_and_pruning_further_only_adds(llama, tokens, criterion, group):
    prune(llama, 0.5, criterion=criterion, group=group, calibration=tokens)
    once = zeros_of(llama)
    prune(llama, 0.5, criterion=criterion, group=group, calibration=tokens)
    assert all(torch.equal(found, once[name]) for name, found in zeros_of(llama).items())
    prune(llama, 0.75, criterion=criterion, group=group, calibration=tokens)
    assert sparsity(llama) == 0.75
    assert_zeros_kept(llama, once)


def test_wanda_differs_from_magnitude_and_serves_the_outputs_better(tokens):
    """On inputs with outlier channels, the criterion that sees them must lose less of the outputs."""
    errors = {}
    for criterion in ("magnitude", "wanda"):
        model = tiny("llama")
        model.model.embed_tokens.weight.data[:, :3] *= 30
        with torch.no_grad(), evaluation_mode(model):
            hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
            dense = model.model.layers[0].self_attn.q_proj(hidden)
            prune(model, 0.5, criterion=criterion, group="row", calibration=tokens)
            errors[criterion] = (model.model.layers[0].self_attn.q_proj(hidden) - dense).norm().item()
    assert errors["wanda"] < 0.8 * errors["magnitude"]


def test_half_precision_ties_are_counted_exactly(llama):
    prune(llama.bfloat16(), 0.6, group="row")
    for name, zeros in zeros_of(llama).items():
        assert (zeros.sum(1) == int(0.6 * zeros.shape[1] + 1e-6)).all(), name


def test_pruning_below_an_attached_adapter(llama, tokens):
    model = get_peft_model(llama, MaskLoRAConfig(r=2, target_modules="all-linear"))
    prune(model, 0.5, criterion="wanda", calibration=tokens)
    assert sparsity(model) == 0.5
    plain = tiny("llama")
    prune(plain, 0.5, criterion="wanda", calibration=tokens)
    assert all(torch.equal(a, b) for a, b in zip(zeros_of(model).values(), zeros_of(plain).values(), strict=True))


def test_a_tied_weight_is_pruned_when_asked_for():
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    prune(model, 0.5, target_modules=["lm_head"], prune_tied=True)
    assert (model.transformer.wte.weight == 0).float().mean() == pytest.approx(0.5, abs=1e-3)


def test_the_report_says_what_was_done(llama):
    report = prune(llama, "2:4")
    plain = report.to_dict()
    assert (plain["criterion"], plain["pattern"], plain["group"], plain["sparsity"]) == ("magnitude", "2:4", None, 0.5)
    assert plain["weights"][0] == {"name": "model.layers.0.self_attn.q_proj", "shape": (16, 16), "sparsity": 0.5}
    assert "21 weights to sparsity 0.5000 (magnitude, 2:4)" in str(report)


def test_ragged_groups_are_pruned_when_asked_for():
    from peft_sparse import SemiStructured

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(6, 5))])})
    prune(model, SemiStructured(2, 4, allow_ragged=True))
    matrix = weight_matrix(model["layers"][0][0])
    assert ((matrix[:, :4] != 0).sum(1) == 2).all()
    assert (matrix[:, 4:] != 0).all()
