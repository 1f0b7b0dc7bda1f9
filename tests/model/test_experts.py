"""Which parameters are experts, how they are laid out, and which layers choose among them."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_sparse import prune
from peft_sparse.model.blocks import expert_layers, find_blocks, fused_experts, prunable_weights

from checks import layers_of
from conftest import tiny


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
}  # fmt: skip


def dbrx():
    config = transformers.DbrxConfig(
        vocab_size=64, d_model=32, n_heads=4, n_layers=1, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    return transformers.DbrxForCausalLM(config)


def afmoe():
    config = transformers.AfmoeConfig(
        **LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1,
        num_shared_experts=1, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return transformers.AfmoeForCausalLM(config)


def hunyuan():
    config = transformers.HunYuanMoEV1Config(**LLAMA, head_dim=8, num_experts=4, moe_topk=2)
    return transformers.HunYuanMoEV1ForCausalLM(config)


def jetmoe():
    config = transformers.JetMoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.JetMoeForCausalLM(config)


def switch():
    config = transformers.SwitchTransformersConfig(
        **T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb():
    config = transformers.NllbMoeConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_attention_heads=4, decoder_ffn_dim=48, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
    )  # fmt: skip
    return transformers.NllbMoeForConditionalGeneration(config)


def llama4():
    config = transformers.Llama4TextConfig(
        **LLAMA, head_dim=8, intermediate_size_mlp=48, num_local_experts=4, interleave_moe_layer_step=1
    )
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize("make", [dbrx, afmoe, hunyuan, jetmoe, switch, nllb, llama4])
def test_routers_at_any_depth_are_left_alone_and_experts_are_pruned(make):
    model = make()
    weights = prunable_weights(model)
    assert not [name for name in weights if "router" in name or name.endswith(("gate.wg", "classifier"))]
    experts = [name for name in weights if "expert" in name or "mlp." in name or ".ffn." in name]
    assert experts
    layers = expert_layers(model)
    assert all(id(weights[name].layer) in layers for name in experts if ".experts." in name)
    assert not [name for name in weights if "self_attn" in name and id(weights[name].layer) in layers]


def xlnet():
    return transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48)
    )


def recurrent_gemma():
    config = transformers.RecurrentGemmaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=8,
        intermediate_size=48, lru_width=32, attention_window_size=8,
    )  # fmt: skip
    return transformers.RecurrentGemmaModel(config)


@pytest.mark.parametrize("make", [xlnet, recurrent_gemma])
def test_other_parameters_of_three_dimensions_are_no_experts(make):
    model = make()
    parameters = dict(model.named_parameters())
    before = {n: p.clone() for n, p in parameters.items() if p.dim() == 3 and ("rel_attn" in n or "rg_lru" in n)}
    report = prune(model, 0.5)
    assert before
    assert all(torch.equal(parameters[name], value) for name, value in before.items())
    assert set(before) <= report.left_out.keys()
    assert fused_experts(model) == {}


class Experts(nn.Module):
    """Experts of a user: no interface, but their number is known, here or by a router beside."""

    def __init__(self, count, width, inner, in_first, says):
        super().__init__()
        up, down = ((width, inner), (inner, width)) if in_first else ((inner, width), (width, inner))
        self.up, self.down = (nn.Parameter(torch.randn(count, *shape)) for shape in (up, down))
        self.in_first, self.hidden_size = in_first, width
        if says:
            self.num_experts = count

    def forward(self, hidden, expert):
        up, down = self.up[expert], self.down[expert]
        return (hidden @ up).relu() @ down if self.in_first else (hidden @ up.T).relu() @ down.T


class Mixture(nn.Module):
    def __init__(self, experts, count, width, routed):
        super().__init__()
        self.experts = experts
        self.router = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, count if routed else width))
        self.shared_gate = nn.Linear(width, 1)


@given(st.integers(2, 5), st.integers(6, 8), st.integers(9, 12), st.booleans(), st.sampled_from(["says", "routed"]))
def test_the_layout_of_experts_is_read_off_what_reads_and_gives_hidden_states(count, width, inner, in_first, told):
    experts = Experts(count, width, inner, in_first, told == "says")
    mixture = Mixture(experts, count, width, told == "routed")
    if told == "routed":
        mixture.router = nn.Linear(width, count)
    weights = prunable_weights(nn.ModuleDict({"layers": nn.ModuleList([mixture])}))
    up, down = (weights[f"layers.0.experts.{name}.{count - 1}"].matrix() for name in ("up", "down"))
    hidden = torch.randn(3, width)
    torch.testing.assert_close((hidden @ up.T).relu() @ down.T, experts(hidden, count - 1))
    assert ("layers.0.router" in weights) is False
    assert ("layers.0.shared_gate" in weights) is (told == "says")


def test_a_router_may_be_a_network_and_its_gates_go_with_it():
    mixture = Mixture(Experts(4, 8, 12, False, True), 4, 8, routed=True)
    names = prunable_weights(nn.ModuleDict({"layers": nn.ModuleList([mixture])}))
    assert {name.rpartition(".")[0] for name in names} == {"layers.0.experts.up", "layers.0.experts.down"}


def test_stacked_experts_are_matrices_that_compute_what_the_module_computes():
    model = dbrx()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    name, weights = "transformer.blocks.0.ffn.experts.mlp", prunable_weights(model)
    w1, v1, w2 = (weights[f"{name}.{key}.2"] for key in ("w1", "v1", "w2"))
    hidden = torch.randn(5, 32)
    expected = model.transformer.blocks[0].ffn.experts(hidden[None], torch.full((5, 1), 2), torch.ones(5, 1))[0]
    inner = nn.functional.silu(hidden @ w1.matrix().T) * (hidden @ v1.matrix().T)
    torch.testing.assert_close(inner @ w2.matrix().T, expected)
    untouched = weights[f"{name}.w2.1"].matrix().clone()
    mask = torch.rand(w2.shape) > 0.5
    w2.write_zeros(mask)
    assert torch.equal(w2.matrix() != 0, mask)
    assert torch.equal(weights[f"{name}.w2.1"].matrix(), untouched)
    w2.write(torch.ones(w2.shape))
    assert torch.equal(w2.matrix(), torch.ones(w2.shape))


def test_the_experts_of_llama4_are_seen_as_the_model_multiplies_them():
    model = llama4()
    experts = model.model.layers[0].feed_forward.experts
    nn.init.normal_(experts.gate_up_proj)
    weights = prunable_weights(model)
    matrix = weights["model.layers.0.feed_forward.experts.gate_up_proj.1"].matrix()
    assert matrix.shape == (96, 32)
    assert torch.equal(matrix, experts.gate_up_proj[1].T)


@pytest.mark.parametrize(
    "box", [nn.ModuleList, lambda layers: nn.ModuleDict({str(i): e for i, e in enumerate(layers)})]
)
def test_a_router_beside_a_list_of_experts_is_left_alone(box):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.experts = box([nn.Sequential(nn.Linear(8, 8)) for _ in range(4)])
            self.proj = nn.Linear(8, 8)

    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    assert len(layers_of(model)) == 10
    assert not [name for name in layers_of(model) if name.endswith("gate")]
    inside = expert_layers(model)
    assert {name for name, layer in layers_of(model).items() if id(layer) in inside} == {
        name for name in layers_of(model) if "experts" in name
    }


def test_a_list_without_a_router_holds_no_experts():
    block = nn.ModuleDict({"parts": nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(4)])})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(block, nn.Linear(8, 8))])})
    assert len(find_blocks(model)) == 1
    assert expert_layers(model) == set()
    assert expert_layers(tiny("llama")) == set()
