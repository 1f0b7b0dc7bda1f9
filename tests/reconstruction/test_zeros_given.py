"""No zero that a model has is filled, whatever prunes it further or fits it, and to whatever sparsity."""

import contextlib

import pytest
import torch
from peft import IA3Config, LoraConfig

from peft_sparse import Fit, LeastSquares, MaskLoRAConfig, ScaledLoRAConfig, prune, reconstruct
from peft_sparse.reconstruction import checks

from conftest import tiny


pytestmark = [
    pytest.mark.filterwarnings("ignore:A sparsity of .* was requested"),
    # What was pruned before is no dense model to fit to. It may be pruned further all the same.
    pytest.mark.filterwarnings("ignore:The targets come from this model, of whose weights"),
]


def given(family="llama"):
    """A model whose layers were pruned before, its head and embedding too."""
    model = tiny(family)
    prune(model, 0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                parameter[torch.rand_like(parameter) < 0.3] = 0
        # Whole rows, and with them inputs of the next layer.
        model.model.layers[1].mlp.up_proj.weight[:3] = 0
    return model, {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}


def assert_kept(model, zeros):
    for name, mask in zeros.items():
        assert not model.get_parameter(name)[mask].any(), name


FITS = {
    "full": {},
    "mask_lora": {"tuner": MaskLoRAConfig(r=2)},
    "scaled_lora": {"tuner": ScaledLoRAConfig(r=2, target_modules=["down_proj"])},
    "ia3": {"tuner": IA3Config(target_modules=["down_proj"], feedforward_modules=[])},
    "matrix": {},
}
PRUNINGS = {
    "all further": {"pattern": 0.6},
    "one layer further": {"pattern": 0.7, "target_modules": ["down_proj"]},
    "n:m": {"pattern": "1:4", "exclude_modules": ["q_proj"]},
}


@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("fit", FITS)
def test_reconstruction_keeps_the_zeros_it_was_given(tokens, fit, pruning):
    model, zeros = given()
    options = {"region": "matrix"} if fit == "matrix" else {"fit": Fit(learning_rate=1e-2, max_steps=3, **FITS[fit])}
    reconstruct(model, calibration=tokens, batch_size=2, **PRUNINGS[pruning], **options)
    assert_kept(model, zeros)


def test_a_fit_to_the_dense_model_keeps_the_zeros_of_all_layers(tokens):
    model, zeros = given()
    reconstruct(model, calibration=tokens, dense=tiny("llama"), fit=Fit(learning_rate=1e-2, max_steps=3))
    assert_kept(model, zeros)


def test_a_tuner_that_fills_zeros_although_its_trial_did_not_is_refused_and_undone(tokens, monkeypatch):
    model, zeros = given()
    monkeypatch.setattr(checks, "check_tuner_keeps_zeros", lambda *arguments: None)
    fit = Fit(tuner=LoraConfig(r=2, target_modules=["down_proj"]), learning_rate=1e-2, max_steps=3)
    with pytest.raises(ValueError, match="The tuner filled zeros of 'model.layers.0.mlp.down_proj'"):
        reconstruct(model, 0.7, tokens, fit=fit)
    assert_kept(model, zeros)


@pytest.mark.parametrize("pattern", [0.0, 0.3, 0.6, "2:4"])
@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "magnitude"},
        {"criterion": "sparsegpt"},
        {"criterion": "wanda", "update": True, "refinement": "swap"},
        {"criterion": "wanda", "update": LeastSquares(), "refinement": "dsnot"},
        {"criterion": "random", "update": True},
    ],
    ids=str,
)
def test_pruning_fills_no_zero(tokens, options, pattern):
    model, zeros = given()
    prune(model, pattern, calibration=tokens, batch_size=2, **options)
    assert_kept(model, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fails", [False, True], ids=["whole", "interrupted"])
def test_gradients_of_the_user_are_neither_read_nor_lost(tokens, dtype, fails):
    model, clean = (tiny("llama").to(dtype) for _ in range(2))
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}

    def schedule(optimizer, steps):
        if fails:
            raise RuntimeError("no rate")
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    for each in (model, clean):
        with pytest.raises(RuntimeError, match="no rate") if fails else contextlib.nullcontext():
            reconstruct(each, 0.5, tokens, fit=Fit(max_steps=2, scheduler=schedule))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, clean.get_parameter(name))
        kept, value = gradients[name]
        assert parameter.grad is kept
        assert torch.equal(kept, value)
