import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_sparse import MaskLoRAConfig
from peft_sparse.model.blocks import (
    active_experts,
    base_layer,
    block_of,
    find_blocks,
    find_stacks,
    hidden_size,
    norm_names,
    prunable_weights,
    tied_to_embedding,
)

from checks import layers_of
from conftest import EXPERTS, tiny


ATTENTION = {f"self_attn.{kind}_proj" for kind in "qkvo"}
GATED = ATTENTION | {f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
FUSED = {f"mlp.experts.{kind}.{expert}" for kind in ("gate_up_proj", "down_proj") for expert in range(4)}
T5 = {f"layer.0.SelfAttention.{kind}" for kind in "qkvo"}
T5_CROSS = {f"layer.1.EncDecAttention.{kind}" for kind in "qkvo"}
OPT = {f"self_attn.{kind}_proj" for kind in "qkv"} | {"self_attn.out_proj", "fc1", "fc2"}
BART_CROSS = {name.replace("self_attn", "encoder_attn") for name in OPT if "attn" in name}
# The stacks of every family: where they are, how many blocks they have, which weights each of these holds.
STACKS = dict.fromkeys(("llama", "qwen3", "gemma3"), {"model.layers": (3, GATED)})
STACKS |= dict.fromkeys(("mistral", "qwen2", "gemma2"), {"model.layers": (2, GATED)})
STACKS |= dict.fromkeys(("mixtral", "gpt_oss"), {"model.layers": (2, ATTENTION | FUSED)})
STACKS |= {
    "opt": {"model.decoder.layers": (3, OPT)},
    "gpt2": {"transformer.h": (3, {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"})},
    "gpt_neox": {
        "gpt_neox.layers": (
            2,
            {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        )
    },
    "phi": {"model.layers": (2, ATTENTION - {"self_attn.o_proj"} | {"self_attn.dense", "mlp.fc1", "mlp.fc2"})},
    "qwen2_moe": {
        "model.layers": (2, ATTENTION | FUSED | {f"mlp.shared_expert.{kind}_proj" for kind in ("gate", "up", "down")})
    },
    "t5": {
        "encoder.block": (2, T5 | {"layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"}),
        "decoder.block": (2, T5 | T5_CROSS | {"layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"}),
    },
    "bart": {"model.encoder.layers": (2, OPT), "model.decoder.layers": (2, OPT | BART_CROSS)},
    "vit": {"vit.layers": (2, {f"attention.{kind}_proj" for kind in "qkvo"} | {"mlp.fc1", "mlp.fc2"})},
}
LEFT_ALONE = {
    "mixtral": {"gate"},
    "qwen2_moe": {"gate", "shared_expert_gate"},
    "gpt_oss": {"router", "gate_up_proj_bias", "down_proj_bias"},
    "t5": {"relative_attention_bias"},
}


def test_blocks_and_weights_of_every_family(family):
    model = tiny(family)
    stacks = STACKS[family]
    blocks = [[f"{place}.{index}" for index in range(count)] for place, (count, _) in stacks.items()]
    weights = prunable_weights(model)
    assert [list(stack) for stack in find_stacks(model)] == blocks
    assert list(find_blocks(model)) == sum(blocks, [])
    assert hidden_size(model) == 16
    assert set(weights) == {
        f"{place}.{index}.{kind}"
        for place, (count, kinds) in stacks.items()
        for index in range(count)
        for kind in kinds
    }
    # Of the other matrices in the blocks, each is a router or a table.
    taken = {id(weight.storage) for weight in weights.values()}
    left = {
        name.rpartition(".")[0].rpartition(".")[2] if name.endswith("weight") else name.rpartition(".")[2]
        for name, parameter in model.named_parameters()
        if block_of(name, find_blocks(model)) and parameter.dim() > 1 and id(parameter) not in taken
    }
    assert left == LEFT_ALONE.get(family, set())


def test_every_expert_is_a_matrix_of_outputs_by_inputs():
    for family, inner in (("mixtral", 24), ("qwen2_moe", 8), ("gpt_oss", 24)):
        weights = prunable_weights(tiny(family))
        for expert in range(4):
            assert weights[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"].shape == (2 * inner, 16)
            assert weights[f"model.layers.1.mlp.experts.down_proj.{expert}"].shape == (16, inner)


def test_experts_are_chosen_by_their_parameter():
    model = tiny("mixtral")
    down = [f"model.layers.{block}.mlp.experts.down_proj.{expert}" for block in range(2) for expert in range(4)]
    assert list(prunable_weights(model, ["down_proj"])) == down
    assert list(prunable_weights(model, r".*experts\.down_proj")) == down
    assert not set(down) & set(prunable_weights(model, None, ["down_proj"]))
    assert {name.rpartition(".")[2] for name in prunable_weights(model, "all-linear")} == {
        f"{kind}_proj" for kind in "qkvo"
    }
    assert len(prunable_weights(model, ["lm_head", "gate_up_proj"])) == 1 + 8


def test_weights_are_found_below_an_adapter():
    for family in ("gpt2", "qwen2_moe"):
        plain = tiny(family)
        names = {name: weight.matrix().clone() for name, weight in prunable_weights(plain).items()}
        config = MaskLoRAConfig(target_modules=["c_attn", "c_fc"], r=2)
        if family in EXPERTS:
            config = MaskLoRAConfig(target_modules=["q_proj"], target_parameters=["down_proj"], r=2)
        found = prunable_weights(get_peft_model(plain, config))
        assert list(found) == list(names)
        assert all(torch.equal(weight.matrix(), names[name]) for name, weight in found.items())


def test_of_a_module_that_an_adapter_copies_the_one_that_runs_is_found(llama):
    original = llama.model.layers[0].mlp.down_proj
    model = get_peft_model(llama, MaskLoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]))
    name = "model.layers.0.mlp.down_proj"
    copy = llama.model.layers[0].mlp.modules_to_save["default"].down_proj
    assert prunable_weights(model)[name].layer is copy
    with model.disable_adapter():
        assert prunable_weights(model)[name].layer is original
    model.add_adapter("other", MaskLoRAConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert prunable_weights(model)[name].layer is original


def test_active_experts_are_the_share_that_sees_a_token():
    assert active_experts(tiny("llama")) == 1
    assert active_experts(tiny("mixtral")) == active_experts(tiny("gpt_oss")) == 2 / 4


def test_names_lie_in_the_block_whose_name_they_begin_with():
    blocks = dict.fromkeys(["layers.1", "layers.11"])
    assert block_of("layers.11.mlp.up", blocks) == "layers.11"
    assert block_of("layers.1.mlp.up", blocks) == block_of("layers.1", blocks) == "layers.1"
    assert block_of("layers.2.mlp.up", blocks) is block_of("head", blocks) is None


def test_weights_that_are_embeddings_too_are_told():
    gpt2, llama = (prunable_weights(tiny(family), ["lm_head"]) for family in ("gpt2", "llama"))
    assert tied_to_embedding(tiny("llama"), llama) == []
    model = tiny("gpt2")
    assert tied_to_embedding(model, prunable_weights(model, ["lm_head"])) == ["lm_head"]
    assert tied_to_embedding(model, gpt2) == []


@pytest.mark.parametrize(
    "config",
    [MaskLoRAConfig(target_modules="all-linear", train_norms=True), LoraConfig(target_modules=["q_proj"])],
    ids=["MaskLoRA", "LoRA"],
)
def test_names_do_not_change_when_adapters_are_attached(llama, config):
    layers, norms = list(layers_of(llama)), norm_names(llama)
    wrapped = get_peft_model(llama, config)
    assert list(layers_of(wrapped)) == layers
    assert all(isinstance(base_layer(layer), nn.Linear) for layer in layers_of(wrapped).values())
    assert norm_names(wrapped) == norms


def test_targets_follow_peft(llama):
    assert set(layers_of(llama, ["q_proj"])) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    assert len(layers_of(llama, r".*\.1\..*", ["down_proj"])) == 6
    assert layers_of(llama, "all-linear").keys() == layers_of(llama).keys()
    assert list(layers_of(llama, ["lm_head"])) == ["lm_head"]
    assert len(layers_of(llama, None, r".*mlp.*")) == 12


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


def test_tiny_models_start_equal():
    assert torch.equal(tiny("llama").lm_head.weight, tiny("llama").lm_head.weight)
