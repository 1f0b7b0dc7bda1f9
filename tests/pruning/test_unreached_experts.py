"""Experts that no calibration token reaches: pruned by magnitude with a warning, or refused beforehand."""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_sparse import prune, reconstruct
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.reconstruction import Fit


def mixture(experts=32):
    """A model with more experts than its calibration tokens can reach."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=experts, num_experts_per_tok=1, moe_intermediate_size=8,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


TOKENS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.filterwarnings("ignore:The Hessian")
def test_they_keep_the_counts_of_the_pattern_by_magnitude(criterion, pattern):
    model, other = mixture(), mixture()
    with pytest.warns(UserWarning, match=r"reached \d+ weights of experts, .* instead: model.*gate_up_proj"):
        report = prune(model, pattern, TOKENS, criterion=criterion)
    unmeasured = [weight.name for weight in report.weights if weight.error is None]
    assert unmeasured
    assert all(".experts." in name for name in unmeasured)
    assert {round(weight.sparsity, 6) for weight in report.weights} == {0.5}
    prune(other, pattern, group="row" if criterion == "wanda" and pattern == 0.5 else None)
    expected = prunable_weights(other)
    for name, weight in prunable_weights(model).items():
        if name in unmeasured:
            assert torch.equal(weight.matrix(), expected[name].matrix()), name


def test_or_they_are_refused_before_anything_is_changed():
    model = mixture()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"No calibration token reaches \d+ weights of experts, .*`on_unreached="):
        prune(model, 0.5, TOKENS, criterion="wanda", on_unreached="error")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    enough = torch.randint(0, 32, (64, 16))
    few = mixture(experts=1)
    assert prune(few, 0.5, enough, criterion="wanda", on_unreached="error").error is not None


@pytest.mark.parametrize("region", ["block", "matrix"])
@pytest.mark.filterwarnings("ignore:The Hessian")
def test_they_are_pruned_on_the_way_of_a_reconstruction(region):
    model = mixture()
    with pytest.warns(UserWarning, match="No calibration token reached"):
        report = reconstruct(model, 0.5, TOKENS, region=region, fit=Fit(max_steps=1, holdout=0))
    assert {round(weight.sparsity, 6) for weight in report.pruning.weights} == {0.5}


def test_owl_divides_the_sparsity_although_some_have_no_inputs():
    with pytest.warns(UserWarning, match="No calibration token reached"):
        report = prune(mixture(), 0.5, TOKENS, criterion="wanda", allocation="owl")
    assert report.sparsity == 0.5
