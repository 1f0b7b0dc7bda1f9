"""Whether the merge of an adapter fills zeros is found by trying, for every tuner of PEFT, and nothing changes."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, prune
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.tuners.merge_trial import merge_trials, warn_of_filling_merges

from checks import assert_same_weights
from conftest import tiny


TARGETS = ["q_proj", "o_proj"]
FILLING = {
    "LoRA": lambda: LoraConfig(target_modules=TARGETS),
    "DoRA": lambda: LoraConfig(target_modules=TARGETS, use_dora=True),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10),
    "LoHa": lambda: peft.LoHaConfig(target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(target_modules=TARGETS),
    "VeRA": lambda: peft.VeraConfig(target_modules=TARGETS),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=20),
    "RandLora": lambda: peft.RandLoraConfig(target_modules=TARGETS),
    "BOFT": lambda: peft.BOFTConfig(target_modules=TARGETS, boft_block_size=4),
    "OFT": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=4, r=0),
    "DeLoRA": lambda: peft.DeloraConfig(target_modules=TARGETS),
    "VB-LoRA": lambda: peft.VBLoRAConfig(target_modules=TARGETS, num_vectors=8, vector_length=4),
    "HRA": lambda: peft.HRAConfig(target_modules=TARGETS),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=TARGETS),
}
KEEPING = {
    "HiRA": lambda: peft.HiraConfig(target_modules=TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "MaskLoRA": lambda: MaskLoRAConfig(target_modules=TARGETS),
    "ScaledLoRA": lambda: ScaledLoRAConfig(target_modules=TARGETS),
}


def pruned(*targets):
    model = tiny("llama")
    prune(model, 0.5, target_modules=list(targets) or None)
    return model


def zeros_in(model):
    weights = prunable_weights(model)
    return {name: weight.storage for name, weight in weights.items() if (weight.matrix() == 0).any()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [*FILLING, *KEEPING])
def test_every_tuner_is_known_by_its_merge(method):
    model = get_peft_model(pruned(), (FILLING | KEEPING)[method]())
    before, random = copy.deepcopy(model), torch.random.get_rng_state()
    (trial,) = merge_trials(model, zeros_in(model))
    assert trial.fills == (method in FILLING)
    assert (len(trial.weights), trial.weights[0]) == (6, "model.layers.0.self_attn.q_proj")
    assert_same_weights(model, before)
    assert torch.equal(torch.random.get_rng_state(), random)
    # It says what happens if the real layers are merged after training.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    weights = {name: weight.matrix() == 0 for name, weight in prunable_weights(model).items() if name in trial.weights}
    merged = prunable_weights(model.merge_and_unload())
    filled = any(merged[name].matrix()[zero].any() for name, zero in weights.items())
    assert filled == trial.fills


def test_one_layer_of_each_kind_is_copied(monkeypatch):
    model = get_peft_model(pruned(), LoraConfig(r=2, target_modules=["q_proj", "k_proj", "up_proj"]))
    copied = []
    monkeypatch.setattr(
        copy, "deepcopy", lambda found, original=copy.deepcopy: copied.append(found) or original(found)
    )
    (trial,) = merge_trials(model, zeros_in(model))
    # Keys have half the size of queries.
    assert copied == [model.base_model.model.model.layers[0].self_attn.k_proj]
    assert len(trial.weights) == 9


@pytest.mark.parametrize("route", ["PeftModel", "add_adapter", "mixed"])
def test_adapters_of_every_route_are_told_of(route, caplog):
    model = pruned("q_proj", "v_proj")
    if route == "add_adapter":
        model.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    else:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS), mixed=route == "mixed")
    if route == "mixed":
        model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["v_proj"]))
        model.set_adapter(["default", "other"])
    warn_of_filling_merges(model, zeros_in(model))
    assert (
        "'default' (LoraConfig) is attached to 3 pruned weights, the first of which is "
        "'model.layers.0.self_attn.q_proj'. Training keeps the zeros of the base weights, and merging fills them. Use"
    ) in caplog.text
    assert ("'other' (LoHaConfig) is attached to 3 pruned weights" in caplog.text) == (route == "mixed")


def test_experts_are_tried_by_the_parameter_that_is_adapted():
    model = tiny("mixtral")
    prune(model, 0.5, target_modules=["mlp.experts.down_proj"])
    config = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    model = get_peft_model(model, config)
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    (trial,) = merge_trials(model, {"down": experts.down_proj})
    assert (trial.fills, trial.weights) == (True, ("down",))


def test_adapters_of_dense_weights_and_adapters_that_cannot_be_merged_are_left_out(caplog):
    model = get_peft_model(pruned("up_proj"), LoraConfig(r=2, target_modules=TARGETS))
    warn_of_filling_merges(model, zeros_in(model))
    poly = get_peft_model(pruned(), peft.PolyConfig(r=2, target_modules=TARGETS))
    warn_of_filling_merges(poly, zeros_in(poly))
    assert "merging" not in caplog.text


def test_what_cannot_be_tried_is_told_of(caplog):
    model = get_peft_model(pruned(), LoraConfig(r=2, target_modules=TARGETS))
    weights = zeros_in(model)
    for layer in model.base_model.model.model.layers:
        for adapted in (layer.self_attn.q_proj, layer.self_attn.o_proj):
            adapted.lora_A.to("meta")
    warn_of_filling_merges(model, weights)
    assert "merging may fill them, which could not be tried: the weights of these layers are not" in caplog.text
