"""What prune_structured and compact show before they change a model: on models that look right and are not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel, WhisperConfig, WhisperModel

from peft_sparse import compact, prune_structured
from peft_sparse.structured.examples import example_inputs
from peft_sparse.structured.proof import prove_units
from peft_sparse.structured.units import Units, find_units

from checks import assert_same_weights
from conftest import FAMILIES, SIZES, tiny


OPTIONS = {"metric": "magnitude_sp", "compensate": False}


def remove(model, ratio=0.4, calibration=None, **options):
    return prune_structured(model, ratio, calibration, **OPTIONS | options)


def with_mlp(forward, block=1):
    """A tiny Llama in which the MLP of one block computes forward(mlp, x)."""
    model = tiny("llama")
    mlp = model.model.layers[block].mlp
    mlp.forward = lambda x: forward(mlp, x)
    return model


def gated(mlp, x):
    return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)


def normed(mlp, x):
    return mlp.down_proj(F.rms_norm(gated(mlp, x), (24,)))


def softmaxed(mlp, x):
    return mlp.down_proj(mlp.gate_proj(x).softmax(-1) * mlp.up_proj(x))


def rolled(mlp, x):
    """A mixture along the neurons, such as a convolution."""
    hidden = gated(mlp, x)
    return mlp.down_proj(hidden + hidden.roll(1, -1))


def seen_elsewhere(mlp, x):
    return mlp.down_proj(gated(mlp, x)) + mlp.up_proj(x).mean(-1, keepdim=True)


@pytest.mark.parametrize("forward", [normed, softmaxed, rolled, seen_elsewhere])
def test_neurons_that_see_each_other_are_refused(forward):
    model = with_mlp(forward)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="neurons that do not see each other, but in 'model.layers.1' the others"):
        remove(model)
    assert_same_weights(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    report = remove(model, exclude_modules=["model.layers.1.mlp"])
    assert report.parameters_removed


def test_a_chain_of_square_layers_is_no_gate():
    """Of three layers of equal shape the second reads the first."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="in 'model.layers.0' the others compute something else"):
        remove(model)


def with_attention(forward):
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (forward(attention, hidden_states), None)
    return model


def heads_of(attention, x, *, interleave=True, norm=False, mix=None):
    def split(layer):
        values = layer(x)
        return (F.rms_norm(values, values.shape[-1:]) if norm else values).unflatten(-1, (-1, 4)).transpose(1, 2)

    query, key, value = split(attention.q_proj), split(attention.k_proj), split(attention.v_proj)
    groups = query.shape[1] // key.shape[1]
    if interleave:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    else:
        key, value = key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1)
    scores = query @ key.mT
    if mix is not None:
        scores = torch.einsum("hg,bgij->bhij", mix, scores)
    return attention.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def test_heads_of_an_attention_written_by_hand_are_removed():
    remove(with_attention(heads_of), 0.3)


@pytest.mark.parametrize(
    "options",
    [{"interleave": False}, {"norm": True}, {"mix": torch.randn(4, 4)}],
    ids=["another order of groups", "a norm over all heads", "talking heads"],
)
def test_heads_that_see_each_other_are_refused(options):
    model = with_attention(lambda attention, x: heads_of(attention, x, **options))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="in 'model.layers.1' the others compute something else .* `exclude_modules`"):
        remove(model)
    assert_same_weights(model, before)


def test_layers_whose_weight_is_used_without_a_call_are_refused():
    model = with_mlp(lambda mlp, x: mlp.down_proj(F.linear(x, mlp.gate_proj.weight) * mlp.up_proj(x)))
    with pytest.raises(ValueError, match="No input reaches all layers of 'model.layers.1.mlp'"):
        remove(model)


# -- compact ----------------------------------------------------------------------------------------------------------


def scaled(mlp, x):
    """A factor that depends on the number of neurons, as the scale of a mean does."""
    return mlp.down_proj(gated(mlp, x)) / mlp.gate_proj.out_features


def of_fixed_size(mlp, x):
    return mlp.down_proj(gated(mlp, x).view(*x.shape[:-1], 24))


def by_configuration(mlp, x):
    return mlp.down_proj(gated(mlp, x)) / mlp.config.intermediate_size


@pytest.mark.parametrize(
    ("forward", "structure", "what"),
    [
        (scaled, "al-am", "computes something else"),
        (scaled, "ul-um", "computes something else"),
        (of_fixed_size, "al-am", "fails with RuntimeError: shape"),
        # Layers of equal width are described by the configuration, which layers may read.
        (by_configuration, "ul-um", "computes something else"),
    ],
)
def test_a_compact_model_that_differs_is_put_back(forward, structure, what, tokens):
    model = with_mlp(forward)
    remove(model, structure=structure)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.model.layers[0].mlp.up_proj.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    optimizer.step()
    # Zeros that have moved would not be cut out.
    remove(model, structure=structure)
    before, config, expected = copy.deepcopy(model), model.config.to_dict(), model(tokens).logits
    objects = {id(value): value for value in (model.config, *model.modules(), *model.parameters())}
    with pytest.raises(ValueError, match=f"but 'model.layers.1' {what}.* The model is as it was before"):
        compact(model)
    assert {id(value) for value in (model.config, *model.modules(), *model.parameters())} == set(objects)
    assert_same_weights(model, before)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert type(model) is type(before)
    assert model.config.to_dict() == config
    assert str(model) == str(before)
    assert [vars(m).get("num_key_value_groups") for m in model.modules()] == [
        vars(m).get("num_key_value_groups") for m in before.modules()
    ]
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert torch.equal(model(tokens).logits, expected)
    optimizer.step()
    assert not torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float64])
def test_rounding_is_no_difference(precision):
    model = tiny("llama").to(precision)
    remove(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    compact(model)
    assert sum(parameter.numel() for parameter in model.parameters()) < size


def test_training_mode_and_hooks_stay():
    model = tiny("llama").train()
    remove(model)
    compact(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_while_the_sizes_are_written_puts_the_model_back(monkeypatch):
    model = tiny("llama")
    remove(model)
    before = copy.deepcopy(model)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_sparse.structured.saving._widths", fail)
    with pytest.raises(KeyboardInterrupt):
        compact(model)
    assert_same_weights(model, before)
    assert (type(model), model.config.to_dict()) == (type(before), before.config.to_dict())


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_an_input_that_is_made_for_it(family):
    model = tiny(family)
    for inputs in example_inputs(model):
        try:
            model(**inputs)
            return
        except ValueError:
            continue
    pytest.fail("none of the inputs runs")


BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
IMAGE = {"image_size": 8, "patch_size": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIDES = {f"{side}_{size}": n for side in ("encoder", "decoder")
         for size, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
OTHERS = {
    "vit": lambda: ViTModel(ViTConfig(**BLOCKS | IMAGE)),
    "clip": lambda: CLIPModel(
        CLIPConfig(text_config=SIZES | BLOCKS | SPECIAL, vision_config=BLOCKS | IMAGE, projection_dim=8)
    ),
    "whisper": lambda: WhisperModel(
        WhisperConfig(
            vocab_size=61,
            num_mel_bins=8,
            d_model=16,
            max_source_positions=20,
            max_target_positions=20,
            decoder_start_token_id=1,
            **SIDES | SPECIAL,
        )
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_images_sounds_and_models_within_models_need_no_calibration(family):
    torch.manual_seed(0)
    model = OTHERS[family]().eval()
    # Whisper's decoder has two attentions in a block, which are refused whatever the input is.
    excluded = r"decoder\..*" if family == "whisper" else None
    report = remove(model, 0.3, exclude_modules=excluded)
    assert [layer.name for layer in report.layers] == [u.name for u in find_units(model, exclude_modules=excluded)]
    size = sum(parameter.numel() for parameter in model.parameters())
    compact(model)
    assert sum(parameter.numel() for parameter in model.parameters()) < size


class Unknown(nn.Module):
    """A model whose input has a name of its own."""

    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, features):
        return self.layers[0](features)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Identity(), nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, hidden):
        return hidden + self.mlp(hidden)


def test_a_model_that_takes_no_known_input_needs_calibration():
    block = Block()
    model, mlp = Unknown(block), block.mlp
    units = Units("layers.0", "layers.0.mlp", "mlp", mlp, {"layers.0.mlp.0": mlp[0]}, "layers.0.mlp.2", mlp[2], 12)
    with pytest.raises(ValueError, match="No input reaches all layers of 'layers.0.mlp', .* Pass `calibration`"):
        prove_units(model, [units], [])
    prove_units(model, [units], [{"features": torch.randn(2, 3, 8)}])
