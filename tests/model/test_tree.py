"""Adapters are found, switched off and taken out by what they are, however they were attached."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model

from peft_sparse import MaskLoRAConfig
from peft_sparse.model.tree import adapters_off, base_model, has_adapters, without_adapters

from checks import assert_same_weights, named
from conftest import tiny


def added(model, config):
    model.add_adapter(config)
    return model


def mixed(model, config):
    return PeftMixedModel(model, config)


def injected(model, config):
    return inject_adapter_in_model(config, model)


WAYS = [get_peft_model, added, mixed, injected]
CONFIGS = {
    "lora": LoraConfig(target_modules=["q_proj"]),
    "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "bias": LoraConfig(target_modules=["fc1"], bias="all"),
    "mask_lora": MaskLoRAConfig(target_modules=["q_proj"]),
    "parameters": LoraConfig(target_parameters=["experts.down_proj"]),
}
FAMILIES = {"bias": "opt", "parameters": "mixtral"}
CASES = [(way, name) for way in WAYS for name in CONFIGS if way is not mixed or name == "lora"]


def adapted(way, name):
    plain = tiny(FAMILIES.get(name, "llama"))
    model = way(copy.deepcopy(plain), copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter))
    return plain, model


def raise_with_adapters_off(model, tokens, expected):
    with adapters_off(model):
        assert torch.equal(model(tokens).logits, expected)
        raise RuntimeError("stopped")


def settings(model):
    layers = {
        n: (m._disable_adapters, m._active_adapter) for n, m in model.named_modules() if hasattr(m, "_active_adapter")
    }
    return layers, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("way", "name"), CASES, ids=named)
def test_adapters_of_any_kind_are_found_switched_off_and_taken_out(way, name, tokens):
    plain, model = adapted(way, name)
    assert has_adapters(model)
    assert not has_adapters(plain)
    expected, computed = plain(tokens).logits, model(tokens).logits
    assert not torch.equal(computed, expected)
    base_model(model).get_input_embeddings().weight.requires_grad_(True)
    first = next(p for n, p in model.named_parameters() if p.requires_grad and "embed" not in n)
    first.requires_grad_(False)
    before = settings(model)
    with pytest.raises(RuntimeError, match="stopped"):
        raise_with_adapters_off(model, tokens, expected)
    assert settings(model) == before
    assert torch.equal(model(tokens).logits, computed)
    left = without_adapters(model)
    assert not has_adapters(left)
    assert_same_weights(left, plain)


def test_adapters_that_were_off_stay_off_and_filters_of_warnings_are_kept(llama, tokens):
    expected = llama(tokens).logits
    llama.add_adapter(copy.deepcopy(CONFIGS["lora"]))
    llama.disable_adapters()
    before = settings(llama)
    filters = list(warnings.filters)
    with adapters_off(llama):
        assert warnings.filters == filters
    assert settings(llama) == before
    assert torch.equal(llama(tokens).logits, expected)


def test_a_merged_adapter_leaves_the_base_weights(llama):
    plain = copy.deepcopy(llama)
    llama.add_adapter(copy.deepcopy(CONFIGS["mask_lora"]))
    for module in llama.modules():
        if hasattr(module, "merge"):
            module.merge()
    assert_same_weights(without_adapters(llama), plain)


def test_prompts_are_adapters_that_are_switched_off(llama, tokens):
    expected = llama(tokens).logits
    model = get_peft_model(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    assert has_adapters(model)
    with adapters_off(model):
        assert torch.equal(model(tokens).logits, expected)
    assert model(tokens).logits.shape != expected.shape
    assert without_adapters(model) is llama
