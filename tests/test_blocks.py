import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig

from peft_sparse import MaskLoRAConfig
from peft_sparse.blocks import base_layer, find_blocks, fused_experts, norm_names, prunable_layers

from conftest import tiny


def test_blocks_and_layers_of_every_family(model):
    assert len(find_blocks(model)) == 3
    layers = prunable_layers(model)
    per_block = {"LlamaForCausalLM": 7, "Qwen3ForCausalLM": 7, "Gemma3ForCausalLM": 7, "OPTForCausalLM": 6}
    assert len(layers) == 3 * per_block.get(type(model).__name__, 4)
    # Everything 2-D in a block, nothing outside.
    inside = {name for block in find_blocks(model).values() for name, p in block.named_parameters() if p.dim() == 2}
    assert {name.split(".", maxsplit=_depth(model))[-1] + ".weight" for name in layers} == inside


def _depth(model):
    return next(iter(find_blocks(model))).count(".") + 1


def test_names_do_not_change_when_adapters_are_attached(llama):
    before = list(prunable_layers(llama))
    wrapped = get_peft_model(llama, MaskLoRAConfig(target_modules="all-linear", train_norms=True))
    assert list(prunable_layers(wrapped)) == before
    assert all(isinstance(base_layer(layer), nn.Linear) for layer in prunable_layers(wrapped).values())
    assert len(norm_names(wrapped)) == 7


def test_adapters_are_no_prunable_layers(llama):
    wrapped = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    assert not [name for name in prunable_layers(wrapped) if "lora" in name]


def test_targets_follow_peft(llama):
    assert set(prunable_layers(llama, ["q_proj"])) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    assert len(prunable_layers(llama, r".*\.1\..*", ["down_proj"])) == 6
    assert prunable_layers(llama, "all-linear").keys() == prunable_layers(llama).keys()
    assert list(prunable_layers(llama, ["lm_head"])) == ["lm_head"]
    assert len(prunable_layers(llama, None, r".*mlp.*")) == 12


def test_every_norm_is_recognised(model):
    expected = {name for name, module in model.named_modules() if "norm" in name.rpartition(".")[2] or "ln_" in name}
    assert set(norm_names(model)) == expected


def test_norms_are_recognised_by_what_they_are():
    class StrangeRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class NormedMixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    tree = nn.ModuleDict(
        {"a": StrangeRMSNorm(), "b": NormedMixer(), "c": nn.BatchNorm2d(4), "d": nn.GroupNorm(2, 4), "e": nn.PReLU(4)}
    )
    assert norm_names(tree) == ["a", "c", "d"]


def test_routers_are_left_alone_and_fused_experts_are_seen():
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    mixtral = AutoModelForCausalLM.from_config(
        MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    )
    qwen = AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_experts=4, moe_intermediate_size=8)
    )
    assert {name.rpartition(".")[2] for name in prunable_layers(mixtral)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not [name for name in prunable_layers(qwen) if "gate" in name.rpartition(".")[2] and "proj" not in name]
    assert len(fused_experts(mixtral)) == 4


def test_a_router_beside_a_list_of_experts_is_left_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(4))

    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    assert len(prunable_layers(model)) == 8
    assert not [name for name in prunable_layers(model) if name.endswith("gate")]


def test_tiny_models_start_equal():
    assert torch.equal(tiny("llama").lm_head.weight, tiny("llama").lm_head.weight)
