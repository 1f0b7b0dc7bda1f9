"""Every refusal of `structured/`, with its words."""

import pytest
import torch
from torch import nn

from peft_sparse import compact
from peft_sparse.structured import saving
from peft_sparse.structured.saving import CompactConfig

from conftest import tiny
from refusing import adapted, flap, llama


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


def tie(model):
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight


REFUSALS = [
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
        lambda: saving.CompactNothing,
        AttributeError,
        "Expected a name of this module or Compact<class of Transformers>, got 'CompactNothing'",
    ),
    (
        lambda: CompactConfig.from_dict({"layer_widths": []}),
        ValueError,
        "Expected `dense_model_type` to be a model type of Transformers, got None. Restore",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
