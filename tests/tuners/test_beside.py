"""Several tuner layers around one weight: each computes with the weight from before all merges, in any order."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, merged_state_dict, prune

from conftest import tiny


OURS, THEIRS = ["q_proj", "down_proj"], ["q_proj", "v_proj"]
TUNERS = pytest.mark.parametrize("tuner", [MaskLoRAConfig, ScaledLoRAConfig])
NOISE = pytest.mark.filterwarnings(
    "ignore:Already", "ignore:Adapter cannot be set when the model is merged", "ignore:All adapters are already merged"
)


def pruned():
    model = tiny("llama").eval()
    prune(model, 0.5)
    return model


def mixed(configs):
    (first, config), *others = configs.items()
    model = PeftMixedModel(pruned(), config, first)
    for name, other in others:
        model.add_adapter(name, other)
    model.set_adapter(list(configs))
    return model.eval()


def with_lora(tuner, order=("ours", "lora")):
    configs = {
        "ours": tuner(target_modules=OURS, r=4, init_weights=False),
        "lora": LoraConfig(target_modules=THEIRS, r=4, init_lora_weights=False),
    }
    return mixed({name: configs[name] for name in order})


def with_both():
    return mixed(
        {
            "mask": MaskLoRAConfig(target_modules=OURS, r=4, init_weights=False),
            "scaled": ScaledLoRAConfig(target_modules=OURS, r=4, init_weights=False),
        }
    )


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


def adapted_weights(model):
    """The base weights that our layers adapt, by the names they have in the base model."""
    named = model.base_model.model.named_parameters()
    found = {name.replace(".base_layer", ""): p for name, p in named if name.endswith("base_layer.weight")}
    return {name: p.detach() for name, p in found.items() if any(target in name for target in OURS)}


def assert_unchanged(model, base):
    for name, weight in adapted_weights(model).items():
        assert torch.equal(weight, base.get_parameter(name)), name


@TUNERS
@pytest.mark.parametrize("order", [("ours", "lora"), ("lora", "ours")])
@NOISE
def test_merging_beside_lora_keeps_the_function_and_unmerging_every_bit(tuner, order, tokens):
    model, base = with_lora(tuner, order), pruned()
    together = logits(model, tokens)
    model.set_adapter("ours")
    alone = logits(model, tokens)
    model.set_adapter(["ours", "lora"])
    model.base_model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), together)
    model.base_model.unmerge_adapter()
    assert_unchanged(model, base)
    model.base_model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), logits(base, tokens))
    assert_unchanged(model, base)
    model.base_model.merge_adapter()
    model.set_adapter("ours")  # PEFT unmerges first
    torch.testing.assert_close(logits(model, tokens), alone)


@TUNERS
@pytest.mark.parametrize("order", [("ours", "lora"), ("lora", "ours")])
def test_unloading_beside_lora_keeps_the_function(tuner, order, tokens):
    model = with_lora(tuner, order)
    together = logits(model, tokens)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), together)


@TUNERS
@NOISE
def test_ours_are_merged_first_and_never_left_beside_weights_that_others_filled(tuner, tokens):
    model = with_lora(tuner)
    together = logits(model, tokens)
    with pytest.raises(ValueError, match=r"'ours' is active in '.*q_proj' and would stay unmerged, .* Merge all"):
        model.base_model.merge_adapter(["lora"])
    torch.testing.assert_close(logits(model, tokens), together)
    for name in ("ours", "lora"):
        model.base_model.merge_adapter([name])
        torch.testing.assert_close(logits(model, tokens), together)


@pytest.mark.parametrize("first", ["mask", "scaled"])
@NOISE
def test_both_tuners_on_one_weight_are_merged_in_any_order(first, tokens):
    model, base = with_both(), pruned()
    together = logits(model, tokens)
    for names in ([first], None):
        model.base_model.merge_adapter(names)
        torch.testing.assert_close(logits(model, tokens), together)
    zeros = {name: base.get_parameter(name) == 0 for name in adapted_weights(model)}
    assert all((weight[zeros[name]] == 0).all() for name, weight in adapted_weights(model).items())
    unmerged = merged_state_dict(model, merge=False)
    assert all(torch.equal(unmerged[name], tensor) for name, tensor in base.state_dict().items())
    copied = copy.deepcopy(model)
    with copied.disable_adapter():
        torch.testing.assert_close(logits(copied, tokens), logits(base, tokens))
    model.base_model.unmerge_adapter()
    assert_unchanged(model, base)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), together)


@TUNERS
def test_a_second_adapter_joins_the_layer_of_the_first_within_that_of_lora(tuner, tokens):
    model = with_lora(tuner)
    model.add_adapter("second", tuner(target_modules=["q_proj"], r=2, init_weights=False))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert set(layer.A) == {"ours", "second"}
    model.set_adapter("second")
    found = logits(model.eval(), tokens)
    plain = pruned()
    for index, block in enumerate(plain.model.layers):
        adapted = model.base_model.model.model.layers[index].self_attn.q_proj.base_layer
        block.self_attn.q_proj.weight.data += adapted.get_delta_weight("second")
    torch.testing.assert_close(found, logits(plain, tokens))


@TUNERS
@NOISE
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("outer", ["ours", "lora"])
def test_a_model_of_peft_around_another_is_merged_and_unmerged(tuner, outer, tokens):
    configs = [
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
        tuner(target_modules=OURS, init_weights=False),
    ]
    inner, around = configs if outer == "ours" else reversed(configs)
    model, base = get_peft_model(get_peft_model(pruned(), inner), around).eval(), pruned()
    together = logits(model, tokens)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), together)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, tokens), together)
    weights = [p for name, p in model.named_parameters() if name.endswith("layers.0.mlp.down_proj.base_layer.weight")]
    assert torch.equal(weights[0], base.get_parameter("model.layers.0.mlp.down_proj.weight"))
