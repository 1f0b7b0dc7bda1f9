"""prune_structured(metric="reap"): the outputs are those without the choice of the removed experts."""

import copy
import re

import pytest
import torch
import transformers
from peft import get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from peft_sparse import MaskLoRAConfig, SparseTrainer, compact, prune, prune_structured, sparsity
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.structured.experts import known_experts
from peft_sparse.structured.reap import select_experts

from checks import assert_same_weights
from conftest import GATED, SIZES, VOCABULARY, Samples
from trainers import arguments, in_two_processes


OF_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 1}
BEHIND_DENSE = ROUTED | {"first_k_dense_replace": 1, "head_dim": 4}
IN_GROUPS = BEHIND_DENSE | {"n_group": 2, "topk_group": 1}
IN_ONE_GROUP = BEHIND_DENSE | {"n_group": 1, "topk_group": 1}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
HEADS = {"head_dim": 4}
# The list of docs/details/structured.md. The first are tested in every run, the others with the slow tests.
SUPPORTED = {
    "Mixtral": LOCAL,
    "Qwen2Moe": EIGHT | {"shared_expert_intermediate_size": 12},
    "Qwen3Moe": EIGHT | HEADS,
    "Olmoe": EIGHT,
    "GraniteMoe": LOCAL,
    "GptOss": LOCAL | HEADS,
    "DeepseekV2": IN_GROUPS | LATENT | {"topk_method": "group_limited_greedy"},
    "DeepseekV3": IN_GROUPS | LATENT,
    "Ernie4_5_Moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 12,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "MiniMaxM2": LOCAL | HEADS,
}
SLOW = {
    "GraniteMoeShared": LOCAL | {"shared_intermediate_size": 12},
    "Glm4Moe": IN_ONE_GROUP,
    "Dots1": IN_ONE_GROUP,
    "MiniMax": LOCAL | HEADS,
    "Phimoe": LOCAL,
    "HunYuanMoEV1": {"num_experts": 8, "moe_topk": 2} | HEADS,
    "Lfm2Moe": EIGHT | {"num_dense_layers": 1, "layer_types": ["full_attention"] * 3},
    "Jamba": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "FlexOlmo": EIGHT,
    "Qwen3Next": EIGHT | HEADS | {"shared_expert_intermediate_size": 12, "layer_types": ["full_attention"] * 3},
    "Afmoe": EIGHT | HEADS | {"num_shared_experts": 1, "num_dense_layers": 1},
    "ExaoneMoe": EIGHT | HEADS,
    "SolarOpen": ROUTED | HEADS,
    "Gemma4Text": {
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
        "enable_moe_block": True,
        "head_dim": 4,
        "global_head_dim": 4,
        "hidden_size_per_layer_input": 0,
    },
    "NemotronH": ROUTED
    | HEADS
    | {
        "n_group": 1,
        "topk_group": 1,
        "layers_block_type": ["attention", "moe", "moe"],
        "moe_shared_expert_intermediate_size": 12,
    },
    "Laguna": EIGHT | HEADS,
    "HYV3": EIGHT | HEADS,
    "Cohere2Moe": EIGHT | HEADS,
}
ALL = [*SUPPORTED, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]


def moe(family="Mixtral", **options):
    """A tiny model with values in all parameters, and in the buffers by which routers correct their choice."""
    torch.manual_seed(0)
    settings = SIZES | GATED | OF_TOKENS | (SUPPORTED | SLOW)[family] | options
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**settings)).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for name, b in model.named_buffers() if "bias" in name)):
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return model


def reap(model, ratio, tokens, **options):
    return prune_structured(model, ratio, tokens, metric="reap", **options)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def without_choice(model, report, tokens, monkeypatch):
    """Logits of a dense model whose router logits of the removed experts are -inf, and their biases, too."""
    gone = {}
    model = copy.deepcopy(model)
    for layer in report.layers:
        removed = list(layer.removed_units)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            inside = name.startswith(f"{layer.name.removesuffix('.experts')}.")
            if not inside or not re.search("gate\\.|router|correction|expert_bias", name):
                continue
            if tensor.numel() == layer.units:
                tensor.data.view(-1)[removed] = -torch.inf
            elif tensor.dim() == 2 and tensor.shape[0] == layer.units:
                gone[tensor.data_ptr()] = removed
    plain = F.linear

    def linear(inputs, weight, bias=None):
        output = plain(inputs, weight, bias)
        if (removed := gone.get(weight.data_ptr())) is not None:
            output[..., removed] = -torch.inf
        return output

    with monkeypatch.context() as patched:
        patched.setattr(F, "linear", linear)
        return logits(model, tokens)


@pytest.mark.parametrize("family", ALL)
def test_outputs_are_those_without_the_choice_of_removed_experts(family, tokens, tmp_path, monkeypatch):
    dense = moe(family)
    model = copy.deepcopy(dense)
    report = reap(model, 0.5, tokens)
    assert all((layer.units, layer.kept, len(layer.removed_units)) == (8, 4, 4) for layer in report.layers)
    assert torch.allclose(logits(model, tokens), without_choice(dense, report, tokens, monkeypatch), atol=1e-5)
    buffers = sum(b.numel() for b in dense.buffers()) - sum(b.numel() for b in model.buffers())
    assert parameters(dense) - parameters(model) == report.parameters_removed > 0
    assert buffers % 4 == 0
    # Transformers alone loads it, because its configuration holds the new number.
    assert type(model) is type(dense)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(back) is type(dense)
    assert torch.equal(logits(back, tokens), logits(model, tokens))


@pytest.mark.parametrize("family", ALL)
def test_means_take_the_place_of_experts(family, tokens, tmp_path):
    dense = moe(family)
    model = copy.deepcopy(dense)
    report = reap(model, 0.5, tokens, compensate=True)
    assert report.compensated
    assert parameters(dense) - parameters(model) == report.parameters_removed - report.parameters_added > 0
    stand_in(dense, report, tokens)
    assert torch.allclose(logits(model, tokens), logits(dense, tokens), atol=1e-4)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(back) is type(model)
    # Weights may lie in memory otherwise than before, and kernels may then round otherwise.
    assert_same_weights(back, model)
    assert torch.allclose(logits(back, tokens), logits(model, tokens), atol=1e-5)


def stand_in(dense, report, tokens):
    """Let the removed experts of a dense model return the means of their outputs. By one call for each expert."""
    experts = {e.label: e.module for e in known_experts(dense)}
    calls = {name: [] for name in experts}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: calls[name].append(args))
        for name, module in experts.items()
    ]
    for row in tokens:
        logits(dense, row[None])
    for hook in hooks:
        hook.remove()
    for layer in report.layers:
        module, means = experts[layer.name], {}
        states, chosen = (torch.cat(parts) for parts in list(zip(*calls[layer.name], strict=True))[:2])
        for expert in layer.removed_units:
            own = states[(chosen == expert).any(1)]
            means[expert] = alone(module, own, expert).mean(0) if len(own) else torch.zeros(states.shape[1])

        def correct(module, args, output, means=means):
            states, chosen, weights = args
            for expert, mean in means.items():
                share = (weights * (chosen == expert)).sum(1, keepdim=True)
                output = output + share * (mean - alone(module, states, expert))
            return output

        module.register_forward_hook(correct)


@torch.no_grad()
def alone(module, states, expert):
    """The outputs of one expert for all states."""
    return module.forward(states, torch.full((len(states), 1), expert), torch.ones(len(states), 1))


def saliencies_by_hand(model, tokens):
    """S_j of the first mixture of a Mixtral, token by token, from its weights."""
    seen = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(lambda m, args, out: seen.append((args[0], *out[1:])))
    for row in tokens:
        logits(model, row[None])
    hook.remove()
    experts = model.model.layers[0].mlp.experts
    sums, counts = [0.0] * 8, [0] * 8
    for states, weights, chosen in seen:
        for x, g, experts_of_token in zip(states.reshape(-1, 16), weights, chosen, strict=True):
            for weight, j in zip(g.tolist(), experts_of_token.tolist(), strict=True):
                gate, up = (experts.gate_up_proj[j].detach() @ x).chunk(2)
                sums[j] += weight * (experts.down_proj[j].detach() @ (F.silu(gate) * up)).norm().item()
                counts[j] += 1
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def test_the_experts_of_lowest_saliency_go_first(tokens):
    expected = saliencies_by_hand(moe(), tokens)
    order = sorted(range(8), key=expected.__getitem__)
    for count in range(1, 7):
        report = reap(moe(), count / 8, tokens)
        assert report.layers[0].removed_units == tuple(sorted(order[:count]))


def test_padding_and_left_out_tokens_count_for_nothing(tokens):
    expected = reap(moe(), 0.5, [{"input_ids": row[None, :7]} for row in tokens])
    padded = {"input_ids": tokens.clone(), "attention_mask": torch.ones_like(tokens)}
    padded["attention_mask"][:, 7:] = 0
    marked = {"input_ids": tokens, "token_mask": padded["attention_mask"]}
    for calibration in (padded, marked):
        model = moe()
        report = reap(model, 0.5, calibration, batch_size=3)
        assert [layer.removed_units for layer in report.layers] == [layer.removed_units for layer in expected.layers]
    # Experts that only padding reaches are not reached.
    short = reap(moe(), 0.25, padded | {"attention_mask": (torch.arange(12) < 1).long().expand(6, 12)})
    assert any(layer.unreached_units for layer in short.layers)


@torch.no_grad()
def rarely_used(*experts):
    model = moe("GptOss")
    for layer in model.model.layers:
        layer.mlp.router.bias[list(experts)] = -1e4
        # They would be the last to go by their outputs.
        layer.mlp.experts.down_proj[list(experts)] *= 100
    return model


def test_experts_that_no_token_reaches_go_first_and_are_named(tokens):
    report = reap(rarely_used(1, 6), 0.25, tokens)
    for layer in report.layers:
        assert layer.removed_units == layer.unreached_units == (1, 6)
    assert "no token reached 6 of them" in str(report)
    assert report.to_dict()["layers"][0]["unreached_units"] == (1, 6)


@torch.no_grad()
def test_means_lower_the_error_where_outputs_vary_little(tokens):
    dense = moe("GptOss")
    for layer in dense.model.layers:
        layer.mlp.experts.down_proj *= 0.1
        layer.mlp.experts.down_proj_bias += torch.randn(8, 16)
    expected = logits(dense, tokens)
    errors = {}
    for compensate in (False, True):
        model = copy.deepcopy(dense)
        reap(model, 0.5, tokens, compensate=compensate)
        errors[compensate] = (logits(model, tokens) - expected).norm() / expected.norm()
    assert errors[True] < 0.5 * errors[False]


def test_each_group_of_experts_loses_equally_many(tokens):
    kept = select_experts(torch.arange(8.0), 0.5, groups=2)
    assert kept.tolist() == [False, False, True, True] * 2
    report = reap(moe("DeepseekV3", n_routed_experts=24, n_group=4, topk_group=2), 0.3, tokens)
    for layer in report.layers:
        assert sorted(expert // 6 for expert in layer.removed_units) == [0, 0, 1, 1, 2, 2, 3, 3]
    # The first block of this family has a dense MLP.
    assert [layer.name for layer in report.layers] == ["model.layers.1.mlp", "model.layers.2.mlp"]


@pytest.mark.parametrize("compensate", [False, True])
def test_some_layers_alone_are_pruned_and_load_with_the_package(compensate, tokens, tmp_path):
    model = moe()
    report = reap(model, 0.25, tokens, target_modules=["layers.0.mlp", "layers.2.mlp"], compensate=compensate)
    assert [layer.name for layer in report.layers] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert type(model).__name__ == "CompactMixtralForCausalLM"
    assert model.config.num_local_experts == 8
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(back, tokens), logits(model, tokens))
    prompt = tokens[:2, :4]
    cached = back.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_models_from_files_with_a_tensor_for_each_expert(family, compensate, tokens, tmp_path):
    moe(family).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    reap(model, 0.5, tokens, compensate=compensate)
    model.save_pretrained(tmp_path / "small")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert_same_weights(back, model)
    assert torch.allclose(logits(back, tokens), logits(model, tokens), atol=1e-5)


def test_heads_beside_experts_from_such_files(tokens, tmp_path):
    moe().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    prune_structured(model, 0.4, tokens, structure="ul-um", target_modules=["self_attn"])
    compact(model)
    assert type(model).__name__ == "CompactMixtralForCausalLM"
    model.save_pretrained(tmp_path / "small")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert_same_weights(back, model)


def test_a_number_in_the_configuration_of_a_part(tokens, tmp_path):
    heads = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}, "head_dim": 4}
    images = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    config = transformers.Qwen3VLMoeConfig(
        text_config=SIZES | GATED | EIGHT | heads,
        vision_config=images | {"deepstack_visual_indexes": [0]},
        image_token_id=58,
        video_token_id=59,
        vision_start_token_id=57,
        vision_end_token_id=56,
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    tokens = tokens % 50
    reap(model, 0.5, tokens)
    assert config.text_config.num_experts == 8, "another model may share it"
    assert model.model.language_model.config.num_experts == 4
    model.save_pretrained(tmp_path)
    back = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(back, tokens), logits(model, tokens))


def test_experts_are_removed_once_more(tokens, tmp_path):
    model = moe()
    reap(model, 0.5, tokens)
    model.save_pretrained(tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    reap(model, 0.25, tokens)
    model.save_pretrained(tmp_path / "smaller")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert back.config.num_local_experts == 3
    assert torch.equal(logits(back, tokens), logits(model, tokens))


def test_the_loss_of_the_router_counts_the_experts_that_are_left(tokens, tmp_path):
    model = moe(output_router_logits=True)
    reap(model, 0.5, tokens)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    losses = [m(tokens, labels=tokens) for m in (model, back)]
    assert losses[0].aux_loss == losses[1].aux_loss
    assert losses[0].loss == losses[1].loss


def test_nothing_is_removed_at_ratio_0(tokens):
    model = moe()
    report = reap(model, 0, tokens)
    assert report.removed == 0
    assert_same_weights(model, moe())


def test_a_refused_model_is_as_before(tokens):
    model = moe()
    parameters_before, config = dict(model.named_parameters()), copy.deepcopy(model.config)
    gate = model.model.layers[1].mlp.gate
    own = gate.forward
    # The scale depends on the number of experts.
    gate.forward = lambda x: (own(x)[0], own(x)[1] * gate.weight.shape[0] / 8, own(x)[2])
    with pytest.raises(ValueError, match="'model.layers.1.mlp' computes something else"):
        reap(model, 0.5, tokens)
    del gate.forward
    assert all(parameters_before[name] is parameter for name, parameter in model.named_parameters())
    assert_same_weights(model, moe())
    assert model.config.to_dict() == config.to_dict()


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_half_precision(family, tokens, tmp_path):
    # Kernels for groups of experts want rows of 16 bytes.
    model = moe(family, **({"moe_intermediate_size": 16} if family != "Mixtral" else {})).bfloat16()
    reap(model, 0.5, tokens)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert_same_weights(back, model)


def test_zeros_and_adapters_on_a_model_with_means(tokens):
    model = moe()
    reap(model, 0.5, tokens, compensate=True)
    names = prunable_weights(model)
    assert not any("gate" in name.split(".") for name in names), "routers are not pruned"
    prune(model, 0.5, criterion="wanda", calibration=tokens)
    assert sparsity(model) == pytest.approx(0.5, abs=0.01)
    compact(model)
    means = [module.novices for module in model.modules() if hasattr(module, "novices")]
    assert len(means) == 3
    assert all(mean.any() for mean in means)


@pytest.mark.parametrize("compensate", [False, True])
def test_routers_are_retrained(compensate, tokens, tmp_path):
    model = moe()
    reap(model, 0.5, tokens, compensate=compensate)
    before = copy.deepcopy(model)
    adapter = MaskLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, adapter)
    SparseTrainer(tuned, arguments(tmp_path), train_dataset=Samples()).train()
    merged = tuned.merge_and_unload()
    changed = {
        name.rpartition("layers.")[2].partition(".")[2]
        for (name, new), old in zip(merged.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert changed == {"mlp.gate.weight", "self_attn.q_proj.weight", "self_attn.v_proj.weight"}
    # Without adapters: the router alone is not frozen.
    for name, parameter in before.named_parameters():
        parameter.requires_grad_("gate.weight" in name)
    start = [layer.mlp.gate.weight.detach().clone() for layer in before.model.layers]
    SparseTrainer(before, arguments(tmp_path), train_dataset=Samples()).train()
    assert all(
        not torch.equal(layer.mlp.gate.weight, old) for layer, old in zip(before.model.layers, start, strict=True)
    )


def run(folder):
    """Prune in one of several processes, and write down what was removed."""
    torch.manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (5, 12))
    model = moe().double()
    model.set_experts_implementation("eager")
    report = reap(model, 0.5, [{"input_ids": row[None]} for row in rows], compensate=True)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
    torch.save(([layer.removed_units for layer in report.layers], logits(model, rows)), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_processes_share_the_batches(tmp_path):
    in_two_processes(tmp_path, __file__, f"begin_and_run({str(tmp_path)!r})")
    run(tmp_path)
    removed, expected = torch.load(tmp_path / "alone.pt")
    for rank in (0, 1):
        found, outputs = torch.load(tmp_path / f"{rank}.pt")
        assert found == removed
        assert torch.allclose(outputs, expected, atol=1e-6)


def begin_and_run(folder):
    torch.distributed.init_process_group("gloo")
    run(folder)
