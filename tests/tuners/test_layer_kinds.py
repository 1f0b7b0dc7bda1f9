"""What both tuners do on every kind of layer and model, and PEFT's features around them."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.func import functional_call

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, prune
from peft_sparse.model.blocks import base_model
from peft_sparse.tuners import merged_state_dict, trainable_shares

from conftest import SIZES, VOCABULARY, tiny


TUNERS = [MaskLoRAConfig, ScaledLoRAConfig]
TOKENS = torch.randint(0, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(1))
EXPERTS = ["gate_up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


# -- kinds of models -----------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """A model, what it reads, and which of its weights are pruned and adapted."""

    build: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    config: dict[str, Any]

    def dense(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def sparse(self) -> nn.Module:
        model = self.dense()
        prune(model, 0.5, target_modules=self.config["target_modules"])
        for name, parameter in model.named_parameters():
            if name.endswith(tuple(self.config.get("target_parameters", ()))):
                parameter.data[parameter.abs() < parameter.abs().median()] = 0
        return model


class Net(nn.Sequential):
    """Names its input, as transformers' models do."""

    def forward(self, input):
        return super().forward(input)


def mlp():
    return Net(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))


def cnn(**options):
    return Net(nn.Conv2d(4, 8, 3, **{"padding": 1} | options), nn.GELU(), nn.Conv2d(8, 6, (3, 2), stride=2))


class Normalised(nn.Linear):
    """Computes with another weight than it stores, as weight-standardised convolutions do."""

    def forward(self, input):
        return F.linear(input, self.weight / self.weight.norm(), self.bias)


class Attention(nn.MultiheadAttention):
    """Reads the weight of `out_proj`, and never calls this layer."""

    def forward(self, input):
        return super().forward(input, input, input)[0]


def encoder():
    """In evaluation mode its layers read the weights of their children, and in training they call them."""
    return Net(*(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True) for _ in range(2)))


def sequences():
    return {"input": torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))}


def mixtral():
    return transformers.AutoModelForCausalLM.from_config(
        transformers.MixtralConfig(
            **SIZES | {"num_hidden_layers": 2}, intermediate_size=24, num_key_value_heads=2, num_local_experts=4
        )
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    )


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES | {"num_hidden_layers": 2}, intermediate_size=24, num_labels=3)
    )


def images(**options):
    x = torch.randn(4, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    return {"inputs": {"input": x.to(**options)}, "config": {"target_modules": ["0", "2"]}}


def decoder(family):
    return Kind(
        lambda: tiny(family), {"input_ids": TOKENS}, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    )


CHANNELS_LAST = {"memory_format": torch.channels_last}
KINDS = {
    "mlp": Kind(mlp, {"input": images()["inputs"]["input"].flatten()[:24].view(4, 6)}, {"target_modules": ["0", "2"]}),
    "conv": Kind(cnn, **images()),
    "conv-grouped": Kind(lambda: cnn(groups=2, bias=False), **images()),
    "conv-depthwise": Kind(lambda: cnn(groups=4, stride=2, dilation=2, padding=3), **images()),
    "conv-same": Kind(lambda: cnn(padding="same", dilation=2), **images()),
    "conv-reflect": Kind(lambda: cnn(padding=2, padding_mode="reflect"), **images()),
    "conv-channels-last": Kind(lambda: cnn().to(**CHANNELS_LAST), **images(**CHANNELS_LAST)),
    "own-forward": Kind(
        lambda: Net(Normalised(8, 8), nn.GELU(), Normalised(8, 6)), sequences(), {"target_modules": ["0", "2"]}
    ),
    "attention": Kind(
        lambda: Net(*(Attention(8, 2, batch_first=True) for _ in range(2))),
        sequences(),
        {"target_modules": ["out_proj"]},
    ),
    "encoder": Kind(encoder, sequences(), {"target_modules": ["out_proj", "linear1", "linear2"]}),
    "llama": decoder("llama"),
    "opt": decoder("opt"),
    "gpt2": decoder("gpt2"),
    "mixtral": Kind(
        mixtral,
        {"input_ids": TOKENS},
        {"target_modules": ATTENTION, "target_parameters": EXPERTS, "task_type": "CAUSAL_LM"},
    ),
    "t5": Kind(
        t5,
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(1)},
        {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"},
    ),
    "bert": Kind(
        bert, {"input_ids": TOKENS}, {"target_modules": ["query", "key", "value", "dense"], "task_type": "SEQ_CLS"}
    ),
}


@pytest.fixture(params=TUNERS, ids=["MaskLoRA", "ScaledLoRA"])
def tuner(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


# -- helpers -------------------------------------------------------------------------------------------------------


def config_of(kind, tuner, **options):
    return tuner(**{"r": 3} | kind.config | options)


def product_form(**options):
    """The configuration of ScaledLoRA that trains W ⊙ (BA)."""
    return ScaledLoRAConfig(residual=False, **options)


def adapted(kind, tuner, model=None, **options):
    """An adapter on a sparse model of `kind`; not the identity, unless `init_weights` says so."""
    model = kind.sparse() if model is None else model
    return get_peft_model(model, config_of(kind, tuner, **{"init_weights": False} | options)).eval()


def output(model, kind, **options):
    result = model(**kind.inputs, **options)
    return result if isinstance(result, torch.Tensor) else result.logits


def train(model, kind, steps=3, lr=1e-2):
    target = torch.randn_like(output(model, kind))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        F.mse_loss(output(model, kind), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def base_weights(model):
    """The parameters of the base model by the names they had before PEFT, without what adapters add."""
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): parameter.detach()
        for name, parameter in base_model(model).named_parameters()
        if "_lora_" not in name and ".modules_to_save." not in name
    }


def sparse_weights(kind):
    """The weights of the sparse model that have zeros; a test that found none would test nothing."""
    found = {name: weight for name, weight in base_weights(kind.sparse()).items() if is_half_zero(weight)}
    assert len(found) >= 2
    return found


def is_half_zero(weight):
    return weight.dim() > 1 and 0.4 < float((weight == 0).float().mean()) < 0.6


def assert_zeros_kept(model, kind):
    weights = base_weights(model)
    for name, before in sparse_weights(kind).items():
        assert not weights[name][before == 0].any(), name


def assert_base_untouched(model, kind):
    weights, expected = base_weights(model), base_weights(kind.sparse())
    assert weights.keys() == expected.keys()
    for name, before in expected.items():
        assert torch.equal(weights[name], before), name
        assert weights[name].stride() == before.stride(), name


def saved(model, folder):
    model.save_pretrained(folder)
    assert (Path(folder) / "adapter_model.safetensors").exists()
    return folder


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


# -- the life of an adapter ----------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_the_identity(kind, tuner):
    wrapped = adapted(kind, tuner, init_weights=True)
    assert len(tuner_layers(wrapped)) == len(sparse_weights(kind))
    torch.testing.assert_close(output(wrapped, kind), output(kind.sparse(), kind))


def test_training_changes_the_function_by_every_adapter_and_not_the_base(kind, tuner):
    wrapped = adapted(kind, tuner, init_weights=True)
    before = output(wrapped, kind)
    factors = {name: p.clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("_lora_" in name for name in factors if "modules_to_save" not in name)
    train(wrapped, kind)
    assert (output(wrapped, kind) - before).abs().max() > 1e-3
    assert not [name for name, factor in factors.items() if torch.equal(wrapped.get_parameter(name), factor)]
    assert_base_untouched(wrapped, kind)


def test_merging_keeps_zeros_and_function_and_unmerging_restores_every_bit(kind, tuner):
    wrapped = adapted(kind, tuner)
    train(wrapped, kind)
    trained, weights = output(wrapped, kind), base_weights(wrapped)
    before = {name: weight.clone() for name, weight in weights.items()}
    wrapped.merge_adapter()
    assert_zeros_kept(wrapped, kind)
    merged, adapted_ones = base_weights(wrapped), sparse_weights(kind).keys()
    assert {name for name in before if not torch.equal(merged[name], before[name])} == adapted_ones
    torch.testing.assert_close(output(wrapped, kind), trained)
    wrapped.unmerge_adapter()
    assert_base_untouched(wrapped, kind)
    assert torch.equal(output(wrapped, kind), trained)
    unloaded = wrapped.merge_and_unload(safe_merge=True)
    assert not tuner_layers(unloaded)
    assert_zeros_kept(unloaded, kind)
    torch.testing.assert_close(output(unloaded, kind), trained)


def test_an_adapter_survives_saving_and_loading(kind, tuner, tmp_path):
    wrapped = adapted(kind, tuner)
    train(wrapped, kind)
    loaded = PeftModel.from_pretrained(kind.sparse(), saved(wrapped, tmp_path))
    with torch.no_grad():
        assert torch.equal(output(loaded, kind), output(wrapped, kind))
    assert_base_untouched(loaded, kind)
    assert_zeros_kept(loaded.merge_and_unload(), kind)


# `test_verbs` rescales linear layers.
@pytest.mark.parametrize("name", ["conv", "mixtral"])
def test_a_scale_of_zero_gives_the_base_model(name, tuner):
    kind = KINDS[name]
    wrapped = adapted(kind, tuner)
    expected, trained = output(kind.sparse(), kind), output(wrapped, kind)
    with rescale_adapter_scale(wrapped, 0.0):
        torch.testing.assert_close(output(wrapped, kind), expected)
    assert torch.equal(output(wrapped, kind), trained)
    assert not torch.allclose(trained, expected, atol=1e-3)


# -- kinds with something of their own -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "conv-reflect", "conv-same"])
def test_a_convolution_takes_one_image(name, tuner):
    kind = KINDS[name]
    wrapped, x = adapted(kind, tuner), kind.inputs["input"]
    torch.testing.assert_close(wrapped(x[0]), wrapped(x)[0])


@pytest.mark.parametrize("name", ["mlp", "gpt2", "conv-channels-last", "mixtral"])
def test_the_stored_weight_can_be_read_and_replaced_in_place(name):
    wrapped = adapted(KINDS[name], MaskLoRAConfig)
    for layer in tuner_layers(wrapped):
        parameter = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
        stride, address, doubled = parameter.stride(), parameter.data_ptr(), 2 * parameter.detach()
        assert torch.equal(layer.read_weight(), parameter)
        layer.write_weight(doubled)
        assert torch.equal(layer.read_weight(), doubled)
        assert torch.equal(parameter, doubled)
        assert (parameter.stride(), parameter.data_ptr()) == (stride, address)


def test_a_merged_kernel_keeps_its_memory_format(tuner):
    unloaded = adapted(KINDS["conv-channels-last"], tuner).merge_and_unload()
    assert unloaded[0].weight.is_contiguous(**CHANNELS_LAST)


def experts_with_plain_lora(**options):
    """A dense Mixtral with adapters on its experts, and the same adapters of PEFT's LoRA on a copy."""
    kind = KINDS["mixtral"]
    shared = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": EXPERTS}
    model = kind.sparse() if options else kind.dense()
    ours = get_peft_model(copy.deepcopy(model), MaskLoRAConfig(**shared, init_weights=False, **options))
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(**shared, init_lora_weights=False))
    state = {name.replace("mask_lora_", "lora_"): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict({name: value for name, value in state.items() if "_proof" not in name})
    return kind, ours.eval(), theirs.eval()


def test_experts_without_zeros_get_plain_lora():
    kind, ours, theirs = experts_with_plain_lora()
    torch.testing.assert_close(output(ours, kind), output(theirs, kind))


def test_every_expert_has_an_adapter_of_its_own(tuner):
    wrapped = adapted(KINDS["mixtral"], tuner)
    layers = [layer for layer in tuner_layers(wrapped) if hasattr(layer, "parameter_name")]
    assert len(layers) == 2 * len(EXPERTS)
    for layer in layers:
        weight, delta = getattr(layer.get_base_layer(), layer.parameter_name), layer.get_delta_weight("default")
        # What all experts share would show in the ratio that ScaledLoRA multiplies by, whatever the weights.
        ratio = delta / weight if tuner is ScaledLoRAConfig else delta
        assert delta.shape == weight.shape == (4, *weight.shape[1:])
        for one in range(4):
            for other in range(one):
                both = (weight[one] != 0) & (weight[other] != 0)
                assert (ratio[one] - ratio[other])[both].abs().max() > 1e-3


# -- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "conv", "own-forward"])
def test_dropout_acts_in_training_only(name, tuner):
    kind = KINDS[name]
    wrapped = adapted(kind, tuner, lora_dropout=0.1)
    assert torch.equal(output(wrapped, kind), output(wrapped, kind))
    torch.testing.assert_close(output(wrapped, kind), output(adapted(kind, tuner), kind))
    # The layers alone, for the model has dropout of its own.
    for layer in tuner_layers(wrapped):
        layer.train()
    assert not torch.allclose(output(wrapped, kind), output(wrapped, kind))


@pytest.mark.parametrize("masking", ["always", "merge", None])
@pytest.mark.parametrize("name", ["mlp", "conv", "conv-grouped", "conv-same", "conv-reflect", "conv-channels-last"])
def test_dropout_drops_the_input_of_the_adapter_alone(name, masking):
    kind = KINDS[name]
    tuner, options = (MaskLoRAConfig, {"masking": masking}) if masking else (ScaledLoRAConfig, {"lora_alpha": 2})
    layer = adapted(kind, tuner, lora_dropout=0.1, **options).get_submodule("base_model.model.0").train()
    base = layer.get_base_layer()
    A, B = layer.A.default.weight, layer.B.default.weight
    scaling = layer.lora_alpha["default"] / 3
    unbiased = copy.deepcopy(base)
    unbiased.bias = None
    x = kind.inputs["input"].clone().requires_grad_()

    def formula():
        product = (B @ A).view(base.weight.shape)
        factors = {"always": (base.weight != 0) * product, "merge": product, None: base.weight * product}
        return base(x) + functional_call(unbiased, {"weight": scaling * factors[masking]}, F.dropout(x, 0.1))

    results = []
    for function in (lambda: layer(x), formula):
        torch.manual_seed(5)
        y = function()
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, A, B))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0][0], layer.eval()(x))


class Twice(nn.Module):
    """Uses one weight, or one layer, in two places."""

    def __init__(self, shared):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.again = nn.ModuleList([self.first])
        if shared == "weight":
            self.second.weight = self.first.weight

    def forward(self, input):
        return self.second(self.again[0](input))


@pytest.mark.parametrize("shared", ["weight", "layer"])
@pytest.mark.parametrize("targets", [["first"], ["first", "second"]])
def test_a_merge_changes_no_other_layer_of_a_shared_weight(shared, targets, tuner):
    kind = Kind(lambda: Twice(shared), sequences(), {"target_modules": targets})
    wrapped = adapted(kind, tuner)
    trained = output(wrapped, kind)
    assert not torch.allclose(trained, output(kind.sparse(), kind))
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert not tuner_layers(merged)
    torch.testing.assert_close(output(merged, kind), trained)
    expected = merged.state_dict()
    for name, tensor in merged_state_dict(wrapped).items():
        torch.testing.assert_close(tensor, expected[name])
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    assert torch.equal(output(wrapped, kind), trained)


def test_an_adapter_on_zeros_alone_is_told_of(caplog):
    kind = KINDS["mlp"]
    model = kind.sparse()
    model[2].weight.data.zero_()
    adapted(kind, MaskLoRAConfig, model)
    assert "1 of 2 adapted weights consist of zeros (first '2')" in caplog.text


def test_an_adapter_that_is_refused_leaves_the_model_as_it_was(tuner):
    class Last(nn.Conv1d):
        """A layer that is met after others, and cannot be adapted."""

    def dense():
        torch.manual_seed(0)
        return Net(nn.Linear(6, 6), Last(6, 6, 1))

    model = dense()
    with pytest.raises(TypeError, match="is not supported"):
        get_peft_model(model, tuner(target_modules=["0", "1"]))
    assert not tuner_layers(model)
    wrapped = get_peft_model(model, tuner(target_modules=["0"]))
    with pytest.raises(TypeError, match="is not supported"):
        wrapped.add_adapter("other", tuner(target_modules=["0", "1"]))
    assert [list(layer.A) for layer in tuner_layers(wrapped)] == [["default"]]


def test_base_weights_that_are_trained_beside_an_adapter_are_told_of(tuner, tmp_path, caplog):
    wrapped = adapted(KINDS["mlp"], tuner, modules_to_save=["1"])
    saved(wrapped, tmp_path)
    assert "is saved without" not in caplog.text
    wrapped.base_model.model[0].base_layer.weight.requires_grad_(True)
    saved(wrapped, tmp_path)
    assert "1 parameters of the base model are trained beside it" in caplog.text


# -- LoRA-Prune ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "conv"])
def test_lora_prune_is_lora_until_it_is_merged(name):
    kind = KINDS[name]
    ours = adapted(kind, MaskLoRAConfig, masking="merge", lora_alpha=6)
    fan_in_fan_out = {"fan_in_fan_out": True} if name == "gpt2" else {}
    theirs = get_peft_model(
        kind.sparse(), LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **kind.config | fan_in_fan_out)
    ).eval()
    for mine, other in zip(tuner_layers(ours), tuner_layers(theirs), strict=True):
        other.lora_A.default.weight.data = mine.A.default.weight.data.view_as(other.lora_A.default.weight)
        other.lora_B.default.weight.data = mine.B.default.weight.data.view_as(other.lora_B.default.weight)
    torch.testing.assert_close(output(ours, kind), output(theirs, kind), rtol=1e-4, atol=1e-5)
    changes = []
    for mine, other in zip(tuner_layers(ours), tuner_layers(theirs), strict=True):
        pruned = mine.get_base_layer().weight == 0
        changes.append((pruned, -pruned.float() * other.get_delta_weight("default")))
    trained = output(ours, kind)
    ours.merge_adapter()
    theirs.merge_adapter()
    assert_zeros_kept(ours, kind)
    assert not torch.allclose(output(ours, kind), trained, atol=1e-3)
    for mine, other, (pruned, change) in zip(tuner_layers(ours), tuner_layers(theirs), changes, strict=True):
        merged = mine.get_base_layer().weight
        torch.testing.assert_close(merged - other.get_base_layer().weight, change)
        assert change[pruned].all()
    ours.unmerge_adapter()
    assert torch.equal(output(ours, kind), trained)


def test_lora_prune_of_experts_is_lora_until_it_is_merged():
    kind, ours, theirs = experts_with_plain_lora(masking="merge")
    torch.testing.assert_close(output(ours, kind), output(theirs, kind))
    ours.merge_adapter()
    assert_zeros_kept(ours, kind)


# -- several adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv", "own-forward", "llama", "gpt2", "t5", "bert"])
def test_every_sample_of_a_mixed_batch_gets_its_adapter(name, tuner):
    kind = KINDS[name]
    wrapped = adapted(kind, tuner)
    wrapped.add_adapter("other", config_of(kind, tuner, r=2, init_weights=False, lora_dropout=0.1))
    wrapped.eval()
    alone = {}
    for adapter in ("default", "other"):
        wrapped.set_adapter(adapter)
        alone[adapter] = output(wrapped, kind)
    with wrapped.disable_adapter():
        alone["__base__"] = output(wrapped, kind)
    names = ["other", "__base__", "default", "other"]
    mixed = output(wrapped, kind, adapter_names=names)
    for row, adapter in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[adapter][row])
        assert not any(torch.allclose(mixed[row], alone[wrong][row]) for wrong in alone.keys() - {adapter})


def test_hotswap_puts_another_adapter_in_place(tuner, tmp_path):
    kind = KINDS["llama"]
    outputs = []
    for alpha in (3, 12):
        wrapped = adapted(kind, tuner, lora_alpha=alpha)
        saved(wrapped, tmp_path / str(alpha))
        outputs.append(output(wrapped, kind))
    model = PeftModel.from_pretrained(kind.sparse(), tmp_path / "3")
    torch.testing.assert_close(output(model, kind), outputs[0])
    hotswap_adapter(model, tmp_path / "12", "default", torch_device="cpu")
    torch.testing.assert_close(output(model, kind), outputs[1])
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(output(model, kind), outputs[1])
    assert_zeros_kept(model, kind)


def test_lora_stands_beside_the_tuner_in_a_mixed_model(tuner):
    kind = KINDS["mlp"]
    model = get_peft_model(kind.sparse(), config_of(kind, tuner, init_weights=False), mixed=True).eval()
    alone = output(model, kind)
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    first, last = model.base_model.model[0], model.base_model.model[2]
    base, x = kind.sparse(), kind.inputs["input"]
    update = {"default": None, "lora": None}
    for layer in tuner_layers(first):
        update |= {name: layer.get_delta_weight(name) for name in update if name in layer.scaling}
    hidden = F.linear(x, base[0].weight + update["default"] + update["lora"], base[0].bias)
    expected = F.linear(F.gelu(hidden), base[2].weight + last.get_delta_weight("default"), base[2].bias)
    torch.testing.assert_close(output(model, kind), expected, rtol=1e-4, atol=1e-5)
    model.delete_adapter("lora")
    torch.testing.assert_close(output(model, kind), alone)
    assert_zeros_kept(model, kind)


# -- masks that travel with the adapter ----------------------------------------------------------------------------


MASKED = ["mlp", "conv-channels-last", "llama", "gpt2", "mixtral"]


@pytest.mark.parametrize("name", MASKED)
def test_an_adapter_with_its_mask_makes_the_dense_base_sparse(name, tuner, tmp_path):
    kind = KINDS[name]
    wrapped = adapted(kind, tuner, save_mask=True)
    loaded = PeftModel.from_pretrained(kind.dense(), saved(wrapped, tmp_path))
    torch.testing.assert_close(output(loaded, kind), output(wrapped, kind))
    assert_base_untouched(loaded, kind)
    assert_zeros_kept(loaded.merge_and_unload(), kind)


FIRST_USES = [
    *((use, tuner, {}) for use in ("disabled", "merged", "mixed batch") for tuner in TUNERS),
    *(("training", tuner, {"lora_dropout": 0.1}) for tuner in TUNERS),
    ("evaluation", MaskLoRAConfig, {"masking": "merge"}),
]


def use(model, kind, first_use):
    if first_use == "disabled":
        with model.disable_adapter():
            return output(model, kind)
    if first_use == "merged":
        model.merge_adapter()
    if first_use == "mixed batch":
        return output(model, kind, adapter_names=["__base__", "__base__", "default", "default"])
    if first_use == "training":
        model.train()
        torch.manual_seed(5)
    return output(model, kind)


@pytest.mark.parametrize(("first_use", "tuner", "options"), FIRST_USES)
def test_the_mask_is_there_whatever_the_first_use(first_use, tuner, options, tmp_path):
    kind = KINDS["llama"]
    wrapped = adapted(kind, tuner, save_mask=True, **options)
    loaded = PeftModel.from_pretrained(kind.dense(), saved(wrapped, tmp_path))
    torch.testing.assert_close(use(loaded, kind, first_use), use(wrapped, kind, first_use))


def test_transformers_loads_the_mask_too(tuner, tmp_path):
    kind = KINDS["llama"]
    wrapped = adapted(kind, tuner, save_mask=True)
    dense = kind.dense()
    dense.load_adapter(str(saved(wrapped, tmp_path)), "one")
    torch.testing.assert_close(output(dense, kind), output(wrapped, kind))
    assert_base_untouched(dense, kind)


# -- initialisation of ScaledLoRA ----------------------------------------------------------------------------------


def products(model):
    return [(layer.B.default.weight @ layer.A.default.weight).detach() for layer in tuner_layers(model)]


def second_singular_value(matrix):
    values = torch.linalg.svdvals(matrix)
    return float(values[1] / values[0])


@pytest.mark.parametrize("form", [ScaledLoRAConfig, product_form])
@pytest.mark.parametrize("name", ["mlp", "conv", "llama", "mixtral"])
def test_scaled_lora_starts_at_exactly_the_base_weight(name, form):
    for layer in tuner_layers(adapted(KINDS[name], form, init_weights=True)):
        assert not layer.get_delta_weight("default").any()


def test_every_component_of_scaled_lora_is_trained():
    kind = KINDS["llama"]
    wrapped = adapted(kind, ScaledLoRAConfig, init_weights=True)
    # B = 0 gives A no gradient in the first step.
    train(wrapped, kind, steps=2)
    wrapped.zero_grad()
    output(wrapped, kind).square().sum().backward()
    for layer in tuner_layers(wrapped):
        assert layer.A.default.weight.grad.any(1).all()
        assert layer.B.default.weight.grad.any(0).all()


@pytest.mark.parametrize(
    ("options", "residual"),
    [
        ({}, True),
        ({"r": 1}, False),
        ({"r": 1, "residual": True}, True),
        ({"residual": False}, False),
        ({"init_weights": "paper"}, False),
        # An adapter that was saved before the field existed.
        ({"format_version": 1}, False),
        ({"format_version": 1, "residual": True}, True),
    ],
)
def test_the_configuration_decides_which_formula_is_trained(options, residual, tmp_path):
    kind = KINDS["mlp"]
    config = config_of(kind, ScaledLoRAConfig, **{"init_weights": False} | options)
    wrapped = get_peft_model(kind.sparse(), config).eval()
    config = PeftConfig.from_pretrained(saved(wrapped, tmp_path))
    assert config.residual is residual
    layer = wrapped.base_model.model[0]
    factor = layer.B.default.weight @ layer.A.default.weight + residual
    expected = F.linear(kind.inputs["input"], layer.weight * factor, layer.bias)
    torch.testing.assert_close(layer(kind.inputs["input"]), expected)
    loaded = PeftModel.from_pretrained(kind.sparse(), tmp_path)
    torch.testing.assert_close(output(loaded, kind), output(wrapped, kind))


def test_an_adapter_of_format_version_1_computes_what_it_did(tmp_path):
    kind = KINDS["mlp"]
    wrapped = adapted(kind, product_form)
    path = Path(saved(wrapped, tmp_path)) / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config.pop("residual") is False
    path.write_text(json.dumps(config | {"format_version": 1}))
    for _ in range(2):
        loaded = PeftModel.from_pretrained(kind.sparse(), tmp_path)
        torch.testing.assert_close(output(loaded, kind), output(wrapped, kind))
        loaded.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_the_papers_initialisation_stays_at_rank_one_and_the_default_does_not(name):
    kind = KINDS[name]
    for options, stays in (({"init_weights": "paper"}, True), ({}, False), ({"residual": False}, False)):
        wrapped = adapted(kind, ScaledLoRAConfig, **{"init_weights": True} | options)
        before = output(wrapped, kind)
        train(wrapped, kind, steps=10)
        assert not torch.allclose(output(wrapped, kind), before, atol=1e-3)
        for product in products(wrapped):
            assert second_singular_value(product) < 1e-5 if stays else second_singular_value(product) > 1e-3


# -- parameter groups ----------------------------------------------------------------------------------------------


def test_trainable_shares_count_every_group(tuner):
    kind = KINDS["gpt2"]
    fresh = dict(kind.dense().named_parameters())
    total = sum(p.numel() for p in fresh.values())
    wrapped = adapted(kind, tuner, bias="all", train_norms=True)
    shares = trainable_shares(wrapped)
    layers = {name: p for name, p in fresh.items() if p.dim() == 2 and "wte" not in name and "wpe" not in name}
    assert shares["adapters"] * total == pytest.approx(sum(3 * sum(p.shape) for p in layers.values()))
    assert shares["norms"] * total == pytest.approx(sum(p.numel() for name, p in fresh.items() if "ln_" in name))
    biases = sum(fresh[name.replace(".weight", ".bias")].numel() for name in layers if name != "lm_head.weight")
    assert shares["biases"] * total == pytest.approx(biases)
    assert shares["other"] == 0
    assert shares["all"] * total == pytest.approx(sum(p.numel() for p in wrapped.parameters() if p.requires_grad))


@pytest.mark.parametrize("train_head", ["adapter", "full"])
def test_a_trained_head_survives_saving_loading_and_merging(train_head, tuner, tmp_path):
    kind = KINDS["llama"]
    wrapped = adapted(kind, tuner, train_head=train_head, train_norms=True)
    train(wrapped, kind)
    trained = output(wrapped, kind)
    loaded = PeftModel.from_pretrained(kind.sparse(), saved(wrapped, tmp_path))
    assert torch.equal(output(loaded, kind), trained)
    assert_base_untouched(loaded, kind)
    merged = loaded.merge_and_unload()
    assert_zeros_kept(merged, kind)
    assert not torch.equal(merged.lm_head.weight, kind.sparse().lm_head.weight)
    torch.testing.assert_close(output(merged, kind), trained)
    shares = trainable_shares(wrapped)
    assert (shares["other"] > 0) == (train_head == "full")


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
RESNET = Kind(resnet, PIXELS, {"target_modules": r".*layer\.\d\.convolution"})


@pytest.mark.parametrize("train_head", ["adapter", "full"])
def test_a_classifier_is_trained_as_an_output_head(train_head, tmp_path):
    wrapped = adapted(RESNET, MaskLoRAConfig, train_head=train_head, train_norms=True)
    train(wrapped, RESNET)
    loaded = PeftModel.from_pretrained(RESNET.sparse(), saved(wrapped, tmp_path))
    assert torch.equal(output(loaded, RESNET), output(wrapped, RESNET))
    merged = loaded.merge_and_unload()
    assert not torch.equal(merged.classifier[1].weight, RESNET.sparse().classifier[1].weight)


@pytest.mark.parametrize("train_norms", [True, False])
def test_statistics_that_are_not_saved_with_the_adapter_are_told_of(train_norms, tmp_path, caplog):
    wrapped = adapted(RESNET, MaskLoRAConfig, train_norms=train_norms)
    saved(wrapped, tmp_path)
    assert "running statistics" not in caplog.text
    train(wrapped, RESNET)
    loaded = PeftModel.from_pretrained(RESNET.sparse(), saved(wrapped, tmp_path))
    told = "6 running statistics of norms have changed" in caplog.text
    assert told != train_norms
    assert told != torch.equal(output(loaded, RESNET), output(wrapped, RESNET))


# -- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tuner", "r"), [("llama", MaskLoRAConfig, 3), ("mlp", ScaledLoRAConfig, 3), ("mlp", ScaledLoRAConfig, 1)]
)
def test_a_training_step_compiles_without_a_break(name, tuner, r):
    kind = KINDS[name]
    if name == "llama":
        sizes = SIZES | {"num_hidden_layers": 1, "intermediate_size": 24, "num_key_value_heads": 2}
        kind = replace(kind, build=lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    wrapped = adapted(kind, tuner, r=r)
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=True)
    gradients = []
    for model in (wrapped, compiled):
        wrapped.zero_grad()
        output(model, kind).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    assert all(gradient.any() for gradient in gradients[0].values())


def test_trainable_shares_know_the_adapters_of_other_methods():
    kind = KINDS["llama"]
    shares = trainable_shares(get_peft_model(kind.sparse(), LoraConfig(r=4, target_modules="all-linear")))
    assert shares["adapters"] == shares["all"] > 0
