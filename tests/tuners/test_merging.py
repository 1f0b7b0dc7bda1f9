"""The base model of a model with adapters as a plain model, however the adapters were attached."""

import copy

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftMixedModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, merged_state_dict, prune
from peft_sparse.tuners.merging import plain_model

from checks import assert_zeros_kept, zeros_of
from conftest import tiny


TUNERS = pytest.mark.parametrize("tuner", [MaskLoRAConfig, ScaledLoRAConfig])


def pruned(family="llama"):
    model = tiny(family)
    prune(model, 0.5)
    return model


def by_peft(model, config):
    return get_peft_model(model, config).eval()


def by_mixed(model, config):
    return PeftMixedModel(model, config).eval()


def by_transformers(model, config):
    model.add_adapter(config)
    return model.eval()


def by_injection(model, config):
    return inject_adapter_in_model(config, model).eval()


ATTACHING = pytest.mark.parametrize("attach", [by_peft, by_mixed, by_transformers, by_injection])


def stir(model):
    """Give what is trained values that training could give it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def assert_plain(model, tokens, family="llama", atol=1e-6):
    """Both functions give a model that computes what `model` computes, and `model` stays as it is."""
    # Where adapters are disabled, the forward pass unmerges them.
    expected = model(input_ids=tokens).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, state = plain_model(model), merged_state_dict(model)
    assert not any(type(module).__module__.startswith("peft") for module in plain.modules())
    assert plain.state_dict().keys() == state.keys()
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in state.items())
    fresh = tiny(family)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(tokens).logits, expected, atol=atol, rtol=1e-5)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(input_ids=tokens).logits, expected)
    return fresh


@TUNERS
@ATTACHING
def test_adapters_are_merged_however_they_were_attached(attach, tuner, tokens):
    model = pruned()
    zeros = zeros_of(model)
    adapted = attach(model, tuner(r=4, target_modules="all-linear", init_weights=False))
    assert_zeros_kept(assert_plain(adapted, tokens), zeros)


@TUNERS
@ATTACHING
def test_the_base_is_that_from_before_the_adapters_and_before_a_merge(attach, tuner):
    model = pruned()
    base = copy.deepcopy(model.state_dict())
    adapted = attach(model, tuner(r=4, target_modules="all-linear", init_weights=False, modules_to_save=["norm"]))
    stir(adapted)
    for merged in (False, True):
        if merged:
            for module in adapted.modules():
                if hasattr(module, "saved_masks"):
                    module.merge()
        for found in (merged_state_dict(adapted, merge=False), plain_model(adapted, merge=False).state_dict()):
            assert found.keys() == base.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in base.items())


@TUNERS
def test_whole_modules_and_merged_adapters_are_taken_as_the_model_computes(tuner, tokens):
    model = stir(by_peft(pruned(), tuner(r=4, target_modules=["q_proj"], init_weights=False, train_norms=True)))
    assert_plain(model, tokens)
    model.merge_adapter()
    assert_plain(model, tokens)
    with model.disable_adapter():
        base = merged_state_dict(model, merge=False)
        assert all(torch.equal(base[name], tensor) for name, tensor in merged_state_dict(model).items())
        assert_plain(model, tokens)


@pytest.mark.parametrize("active", [["a"], ["b"], ["a", "b"]])
def test_the_active_adapters_are_merged(active, tokens):
    model = PeftMixedModel(pruned(), MaskLoRAConfig(target_modules=["q_proj", "v_proj"], init_weights=False), "a")
    model.add_adapter("b", ScaledLoRAConfig(target_modules=["q_proj", "up_proj"], init_weights=False))
    model.set_adapter(active)
    assert_plain(model.eval(), tokens)


def test_experts_are_merged(tokens):
    config = MaskLoRAConfig(
        target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"], init_weights=False
    )
    assert_plain(by_peft(pruned("mixtral"), config), tokens, "mixtral", atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_merged_and_tied_weights_stay_tied(tied, tokens):
    config = copy.deepcopy(tiny("llama").config)
    config.tie_word_embeddings = tied
    model = type(tiny("llama"))(config)
    base = copy.deepcopy(model.state_dict())
    adapted = stir(by_peft(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5])))
    expected = adapted(tokens).logits
    for merged in (False, True):
        if merged:
            adapted.merge_adapter()
        plain, state = plain_model(adapted), merged_state_dict(adapted)
        for found in (plain.state_dict(), state):
            shares = found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()
            assert shares == tied
            fresh = type(model)(config)
            fresh.load_state_dict(found)
            torch.testing.assert_close(fresh(tokens).logits, expected)
        unmerged = merged_state_dict(adapted, merge=False)
        assert all(torch.equal(unmerged[name], tensor) for name, tensor in base.items())


def test_adapters_of_others_are_merged_where_no_zero_is_filled(tokens):
    assert_plain(by_peft(tiny("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)), tokens)
    model = pruned()
    zeros = zeros_of(model)
    hira = by_peft(model, HiraConfig(target_modules=["q_proj"], init_weights=False))
    assert_zeros_kept(assert_plain(hira, tokens), zeros)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_a_tied_head_with_an_adapter_keeps_both_weights(tokens):
    config = copy.deepcopy(tiny("llama").config)
    config.tie_word_embeddings = True
    model = type(tiny("llama"))(config)
    embedding = model.model.embed_tokens.weight.clone()
    adapted = by_peft(model, MaskLoRAConfig(target_modules=["lm_head"], init_weights=False))
    for found in (plain_model(adapted).state_dict(), merged_state_dict(adapted)):
        assert torch.equal(found["model.embed_tokens.weight"], embedding)
        assert not torch.equal(found["lm_head.weight"], embedding)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_blocks_have_the_names_of_the_model(tokens):
    adapted = by_peft(pruned(), MaskLoRAConfig(target_modules=["q_proj"], init_weights=False))
    names = merged_state_dict(adapted).keys()
    blocks = adapted.base_model.model.model.layers
    blocks[0] = torch.compile(blocks[0])
    assert merged_state_dict(adapted).keys() == names
    assert plain_model(adapted).state_dict().keys() == names


def test_unchanged_weights_are_not_copied():
    adapted = by_peft(pruned(), MaskLoRAConfig(target_modules=["q_proj"], init_weights=False))
    plain, base = plain_model(adapted), adapted.get_base_model()
    assert plain.model.layers[0].mlp.up_proj.weight is base.model.layers[0].mlp.up_proj.weight
    assert plain.model.layers[0].self_attn.q_proj.weight.device.type == "cpu"
    assert plain_model(adapted, values=False).model.layers[0].self_attn.q_proj.weight.is_meta


def test_a_module_without_a_configuration_is_merged_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 8)
    adapted = by_injection(model, MaskLoRAConfig(target_modules=["0"], init_weights=False))
    torch.testing.assert_close(nn.Sequential(*plain_model(adapted))(x), adapted(x))


def test_a_model_of_peft_inside_another_model_is_merged_too(tokens):
    class WithValueHead(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.pretrained_model, self.v_head = model, nn.Linear(16, 1)

    model = pruned()
    outer = WithValueHead(by_peft(model, MaskLoRAConfig(target_modules=["q_proj"], init_weights=False)))
    expected = outer.pretrained_model(tokens).logits
    fresh = WithValueHead(tiny("llama"))
    for found in (plain_model(outer).state_dict(), merged_state_dict(outer)):
        fresh.load_state_dict(found)
        torch.testing.assert_close(fresh.pretrained_model(tokens).logits, expected)
