"""Every refusal of `structured/`, with its words."""

import pytest
import torch
import transformers
from peft import inject_adapter_in_model
from torch import nn

from peft_sparse import MaskLoRAConfig, compact, prune_structured
from peft_sparse.structured import saving
from peft_sparse.structured.saving import CompactConfig

from conftest import GATED, SIZES, tiny
from refusing import TOKENS, adapted, flap, llama


def heads(edit):
    """Structured pruning of a model whose first attention is built otherwise."""
    model = llama()
    edit(model.model.layers[0].self_attn)
    flap(model)


def narrow_values(attention):
    attention.v_proj = nn.Linear(16, 4)


def wide_norm(attention):
    attention.q_norm = nn.LayerNorm(16)


def other_head_size(attention):
    attention.head_dim = 3


def third_matrix(model):
    model.model.layers[0].mlp.inner = nn.Linear(24, 16)


def norm_of_neurons(model):
    model.model.layers[0].mlp.norm = nn.LayerNorm(24)


def lone_matrix(model):
    model.model.layers[0].mlp = nn.Linear(16, 16)


def by_hand(forward):
    """A model in which the MLP of the first block computes forward(mlp, inputs)."""

    def edit(model):
        mlp = model.model.layers[0].mlp
        mlp.forward = lambda x: forward(mlp, x)

    return llama(edit)


def normed(mlp, x):
    return mlp.down_proj(nn.functional.rms_norm(mlp.gate_proj(x) * mlp.up_proj(x), (24,)))


def without_a_call(mlp, x):
    return mlp.down_proj(nn.functional.linear(x, mlp.gate_proj.weight) * mlp.up_proj(x))


def scaled(mlp, x):
    return mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x)) / mlp.up_proj.out_features


def of_fixed_size(mlp, x):
    return mlp.down_proj((mlp.gate_proj(x) * mlp.up_proj(x)).view(-1, 24)).view_as(x)


def asserting(mlp, x):
    # Pytest would give a plain assertion a text.
    if mlp.up_proj.out_features != 24:
        raise AssertionError
    return mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x))


def compacted(forward):
    model = by_hand(forward)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :5] = 0
    compact(model)


def reap(model=None, ratio=0.5, calibration=TOKENS, **options):
    return prune_structured(model or tiny("mixtral"), ratio, calibration, metric="reap", **options)


def mixture(edit):
    """Expert pruning of a Mixtral whose first mixture is built otherwise."""
    model = tiny("mixtral")
    edit(model.model.layers[0].mlp)
    reap(model)


def without_router(mlp):
    mlp.gate = nn.Identity()


def squared_weights(mlp):
    own = mlp.experts.forward
    mlp.experts.forward = lambda states, chosen, weights: own(states, chosen, weights.square())


def one_call_at_a_time(mlp):
    own = mlp.experts.forward

    def forward(states, chosen, weights):
        if len(states) > 24:
            raise RuntimeError("too many")
        return own(states, chosen, weights)

    mlp.experts.forward = forward


def without_experts(mlp):
    mlp.forward = lambda x: x


def chosen_by_place(mlp):
    own = mlp.gate.forward
    mlp.gate.forward = lambda x: (*own(x)[:2], torch.arange(2).expand(x.reshape(-1, 16).shape[0], 2))


def scaled_by_number(mlp):
    own = mlp.gate.forward

    def forward(x):
        scores, weights, chosen = own(x)
        return scores, weights * mlp.gate.weight.shape[0], chosen

    mlp.gate.forward = forward


def shared_experts(model):
    first, second = model.model.layers[0].mlp.experts, model.model.layers[1].mlp.experts
    second.down_proj = first.down_proj
    reap(model)


def infinite(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = torch.inf
    reap(model, calibration=[{"input_ids": TOKENS[:1] % 50}, {"input_ids": torch.tensor([[1, 2, 60]])}])


def of_family(family, **settings):
    config = getattr(transformers, f"{family}Config")(**SIZES, **GATED, **settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def switch():
    config = transformers.SwitchTransformersConfig(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, num_experts=4, decoder_start_token_id=0
    )
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def llama4():
    return of_family("Llama4Text", num_local_experts=4, head_dim=4, intermediate_size_mlp=24, num_experts_per_tok=1)


def with_means():
    model = tiny("mixtral")
    reap(model, compensate=True)
    return model


def share(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def tie(model):
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight


LONGCAT = {
    "n_routed_experts": 8,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 12,
    "ffn_hidden_size": 24,
    "zero_expert_num": 2,
    "num_layers": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "head_dim": 4,
}


class Convolutions(nn.Module):
    """Two convolutions, and what `between` makes of the channels of the first."""

    def __init__(self, between=None, second=None):
        super().__init__()
        self.first, self.between, self.second = (
            nn.Conv2d(3, 4, 3),
            between or nn.Identity(),
            second or nn.Conv2d(4, 2, 3),
        )

    def forward(self, pixel_values):
        return self.second(self.between(self.first(pixel_values))).mean((2, 3))


class Rescaled(nn.Conv2d):
    """A convolution whose filters are computed from all entries of its weight."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.std(), self.bias)


class FixedWidth(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 4, *x.shape[2:])


class Divided(nn.Module):
    """Computes with the width of a layer before it."""

    def __init__(self, before):
        super().__init__()
        self.before = [before]

    def forward(self, x):
        return x / self.before[0].out_channels


def filters(model=None, ratio=0.5, **options):
    return prune_structured(model or Convolutions(), ratio, **{"metric": "l1"} | options)


def cut_filters(model):
    filters(model)
    compact(model)


def divided():
    model = Convolutions()
    model.between = Divided(model.first)
    return model


def computed():
    model = Convolutions()
    nn.utils.parametrizations.weight_norm(model.first)
    return model


def with_an_adapter():
    model = Convolutions()
    inject_adapter_in_model(MaskLoRAConfig(target_modules=["first"]), model)
    return model


def infinite_images():
    return [{"pixel_values": torch.ones(1, 3, 8, 8)}, {"pixel_values": torch.full((1, 3, 8, 8), torch.inf)}]


REFUSALS = [
    (
        lambda: flap(llama(share)),
        ValueError,
        "no other layer has, got that of 'model.layers.0.mlp.gate_proj', which 'model.layers.1' has too",
    ),
    (
        lambda: flap(llama(tie)),
        ValueError,
        "no other layer has, got that of 'model.layers.0.mlp.up_proj', which 'model.layers.1.mlp.up_proj' has too",
    ),
    (lambda: flap(by_hand(normed)), ValueError, "not see each other, but in 'model.layers.0' the others compute"),
    (
        lambda: flap(by_hand(without_a_call)),
        ValueError,
        "No input reaches all layers of 'model.layers.0.mlp', so .* Pass `calibration` with model inputs",
    ),
    (
        lambda: compacted(without_a_call),
        ValueError,
        "No input reaches all layers of 'model.layers.0.mlp', so .* Pass `calibration` with model inputs",
    ),
    (lambda: compacted(scaled), ValueError, "but 'model.layers.0' computes something else.* as it was before"),
    (
        lambda: compacted(of_fixed_size),
        ValueError,
        "but 'model.layers.0' fails with RuntimeError: .* as it was before",
    ),
    (
        lambda: compacted(asserting),
        ValueError,
        "but 'model.layers.0' fails with AssertionError. Its sizes are .* as it was before: use it with its zeros",
    ),
    (lambda: flap(ratio=1.0), ValueError, r"`ratio` must be in \[0, 1\), got 1.0. Use 0.2"),
    (lambda: flap(ratio=-0.1), ValueError, r"`ratio` must be in \[0, 1\), got -0.1"),
    (lambda: flap(metric="flap"), ValueError, "`metric` must be one of 'wifv', .* got 'flap'"),
    (lambda: flap(structure="al"), ValueError, "`structure` must be one of 'al-am', .* got 'al'"),
    (
        lambda: flap(target_modules=["q_proj"], exclude_modules=["self_attn"]),
        ValueError,
        r"`target_modules=\['q_proj'\]` with `exclude_modules=\['self_attn'\]` leaves no attention and no",
    ),
    (
        lambda: compact(tiny("gpt2")),
        ValueError,
        "cannot find the heads or neurons of 'transformer.h.0.attn': expected",
    ),
    (lambda: flap(attention_ratio=0.2), ValueError, "`attention_ratio` must be in .* got 0.2 with 'al-am'. Leave it"),
    (lambda: flap(structure="al-mm", attention_ratio=1.0), ValueError, "`attention_ratio` must be .* got 1.0 with"),
    (lambda: flap(calibration=None), ValueError, "Metric 'wifv' needs statistics of the inputs .* Pass token ids"),
    (
        lambda: flap(calibration=None, metric="magnitude_sp"),
        ValueError,
        "`compensate=True` needs statistics of the inputs .* Pass token ids",
    ),
    (
        lambda: flap(ratio=0.95),
        ValueError,
        "`ratio=0.95` would remove every head or neuron of a layer. .* so at most 0.775 can be removed. Use a",
    ),
    (
        lambda: flap(ratio=0.6, structure="ul-um"),
        ValueError,
        "every head or neuron of a layer of 'model.layers.0'. .* at most 0.5 .* `structure=\"al-am\"`",
    ),
    (lambda: flap(llama().to("meta")), ValueError, "needs loaded .* is torch.float32 on meta. Load the model"),
    (lambda: compact(llama().to("meta")), ValueError, "needs loaded .* is torch.float32 on meta. Load the model"),
    (lambda: flap(adapted()), ValueError, "without adapters, but layer 'model.layers.0.self_attn.q_proj' has an"),
    (lambda: compact(adapted()), ValueError, r"without adapters, .* Call `merge_and_unload\(\)` first"),
    (lambda: compact(nn.Linear(2, 2)), TypeError, "Expected a model of Transformers, .* got Linear"),
    (lambda: flap(nn.Sequential(nn.Linear(2, 2))), ValueError, "Expected a model with blocks .* heads and neurons of"),
    (lambda: flap(tiny("gpt2")), ValueError, "'transformer.h.0.attn': expected separate query, .* got c_attn, c_proj"),
    (
        lambda: flap(tiny("gpt_neox")),
        ValueError,
        "neurons of 'gpt_neox.layers.0.attention': .* got query_key_value, de",
    ),
    (
        lambda: flap(tiny("mixtral")),
        ValueError,
        "'model.layers.0.mlp': expected a dense MLP, got experts. Leave it out",
    ),
    (lambda: flap(tiny("bart")), ValueError, "'model.decoder.layers.0': expected one attention .* got 2 attentions"),
    (
        lambda: heads(narrow_values),
        ValueError,
        "as many query rows as output columns, and as many key .* got 16, 16, 8 and 4",
    ),
    (
        lambda: heads(wide_norm),
        ValueError,
        "expected no parameters except projections, norms .* got model.layers.0.self_attn.q_norm.weight of LayerNorm",
    ),
    (
        lambda: flap(tiny("gpt_oss"), target_modules=["self_attn"]),
        ValueError,
        "norms of the output, got model.layers.0.self_attn.sinks of ",
    ),
    (lambda: heads(other_head_size), ValueError, "expected a `head_dim` that divides 8 key rows, got 3"),
    (
        lambda: flap(llama(third_matrix)),
        ValueError,
        "expected layers of 24 rows before the output layer, got 24, 24, 16",
    ),
    (
        lambda: flap(llama(norm_of_neurons)),
        ValueError,
        "expected an MLP of nn.Linear layers, .* got model.layers.0.mlp.norm.weight of LayerNorm. Leave it out",
    ),
    (lambda: flap(llama(lone_matrix)), ValueError, "expected an MLP of at least two nn.Linear layers, got 1 of"),
    (
        lambda: reap(structure="al-am"),
        ValueError,
        "Expected `structure=\"ul-um\"` or none .* got 'al-am'. Leave it out",
    ),
    (lambda: reap(calibration=None), ValueError, "Metric 'reap' needs statistics .* Pass token ids"),
    (lambda: reap(llama()), ValueError, 'Expected a model with experts for `metric="reap"`, .* Use another metric'),
    (lambda: reap(exclude_modules=["gate"]), ValueError, "leaves no experts to remove. .* Change one of the two"),
    (lambda: reap(adapted(tiny("mixtral"))), ValueError, "without adapters, but .* after experts are cut out. Call"),
    (lambda: reap(tiny("mixtral").to("meta")), ValueError, "Removing experts needs loaded .* on meta. Load the model"),
    (
        lambda: reap(ratio=0.6),
        ValueError,
        "`ratio=0.6` would leave 1 of the 4 experts of 'model.layers.0.mlp', .* to 2 of them. Use .* at most 0.5",
    ),
    (
        lambda: reap(ratio=0.8, compensate=True),
        ValueError,
        "`ratio=0.8` would leave 0 of the 4 .* at most 0.75",
    ),
    (
        lambda: reap(switch()),
        ValueError,
        "cannot be removed: expected parameters with one matrix per expert, got a module for each expert. Leave them",
    ),
    (lambda: mixture(without_router), ValueError, "expected a router with 4 outputs in 'model.layers.0.mlp', one for"),
    (lambda: reap(with_means()), ValueError, "expected a router with 2 outputs in 'model.layers.0.mlp', one"),
    (
        lambda: reap(of_family("LongcatFlash", **LONGCAT)),
        ValueError,
        r"expected parameters \(experts, ., .\) with one matrix per expert, got shapes \(10, 24, 16\), \(8, 16, 12\)",
    ),
    (
        lambda: shared_experts(tiny("mixtral")),
        ValueError,
        "expected tensors of their own, got 'down_proj', which is",
    ),
    (
        lambda: reap(llama4()),
        ValueError,
        r"that they are called with states .* got torch.float32 \(\d+, 16\). Leave them out with `exclude_modules`",
    ),
    (
        lambda: mixture(squared_weights),
        ValueError,
        "that their output is the sum .* but it is something else. Leave them",
    ),
    (
        lambda: mixture(one_call_at_a_time),
        ValueError,
        "expected calls with one expert .* fail with RuntimeError. Le",
    ),
    (lambda: mixture(without_experts), ValueError, "No input reaches the experts of 'model.layers.0.mlp.experts', so"),
    (
        lambda: mixture(chosen_by_place),
        ValueError,
        "expected that the router chooses no expert .* Use a smaller",
    ),
    (lambda: mixture(scaled_by_number), ValueError, "but 'model.layers.0.mlp' computes something else. .* as it was"),
    (
        lambda: infinite(tiny("mixtral")),
        ValueError,
        "Expected finite outputs of the experts of 'model.layers.0.mlp",
    ),
    (
        lambda: saving.CompactNothing,
        AttributeError,
        "Expected a name of this module or Compact<class of Transformers>, got 'CompactNothing'",
    ),
    (
        lambda: CompactConfig.from_dict({"layer_widths": []}),
        ValueError,
        "Expected `dense_model_type` to be a model type of Transformers, got None. Restore",
    ),
    (
        lambda: filters(llama()),
        ValueError,
        "cannot be run on images that were made for it, .*: it has no `nn.Conv2d`. Pass `calibration` with",
    ),
    (
        lambda: filters(calibration=torch.ones(2, 5, 8, 8)),
        ValueError,
        r"cannot be run on the first batch of `calibration`, .*: on \(1, 5, 8, 8\) it fails with RuntimeError",
    ),
    (
        lambda: filters(nn.Sequential(nn.Conv2d(3, 4, 3))),
        ValueError,
        "found none. For example, the filters of '0' stay: the model returns them. Choose other layers",
    ),
    (lambda: flap(ratio="50%"), ValueError, "`ratio` must be in .*, got .50%.. Use 0.2 to remove"),
    (lambda: filters(exclude_modules=["first"]), ValueError, "the filters of 'first' stay: excluded. Choose other"),
    (lambda: filters(with_an_adapter()), ValueError, "without adapters, which would not fit .* `merge_and_unload"),
    (
        lambda: filters(computed()),
        ValueError,
        "cannot be removed while the weight of 'first' is computed .* `torch.nn.utils.parametrize.remove_par",
    ),
    (lambda: filters(Convolutions().to("meta")), ValueError, "the weight of 'first' is on the meta device"),
    (
        lambda: filters(Convolutions(second=Rescaled(4, 2, 3))),
        ValueError,
        "removed one by one, but the model computes something else .* `exclude_modules`, .* Nothing was changed.",
    ),
    (lambda: filters(metric="bn_scale"), ValueError, "needs a normalisation .* and 'first' has none. Leave .* \"l1\""),
    (
        lambda: filters(metric="wanda"),
        ValueError,
        "Metric 'wanda' needs statistics .* To remove filters, `metric=\"l1",
    ),
    (
        lambda: filters(metric="wanda", calibration=infinite_images()),
        ValueError,
        "Expected finite inputs of 'first' on the calibration data, .* float32 or bfloat16",
    ),
    (lambda: filters(structure="al-mm"), ValueError, 'Expected `structure="ul-um"` or "al-am" .* got \'al-mm\''),
    (lambda: filters(compensate=True), ValueError, "is for heads, neurons and experts, got `metric='l1'`. Leave it"),
    (
        lambda: filters(ratio=0.8),
        ValueError,
        "would remove every filter of a layer of 'first'. Each layer keeps one unit, so at most 0.75 .*al-am",
    ),
    (
        lambda: cut_filters(Convolutions(FixedWidth())),
        ValueError,
        "but it fails with RuntimeError: .* as it was before: use it with its zeros, or leave out",
    ),
    (lambda: cut_filters(divided()), ValueError, "but it computes something else. Its widths are also used"),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
