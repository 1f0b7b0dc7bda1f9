"""The effective weight that is kept between calls is never an old one."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, keep_effective_weights, prune

from checks import train_some
from conftest import tiny


TOKENS = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(2))
FAMILIES = {
    "llama": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_fc", "c_proj"]},
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
}


KINDS = [("llama", MaskLoRAConfig), ("gpt2", ScaledLoRAConfig), ("mixtral", MaskLoRAConfig)]


@pytest.fixture(params=KINDS, ids=["llama", "gpt2", "mixtral"])
def wrapped(request):
    family, config_cls = request.param
    model = tiny(family)
    prune(model, 0.5)
    config = config_cls(r=3, init_weights=False, **FAMILIES[family])
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("other", config_cls(r=3, init_weights=False, **FAMILIES[family]))
    return wrapped.eval()


def layers(model):
    return [module for module in model.modules() if hasattr(module, "keeps_effective_weight")]


def kept(model):
    return sum(layer._kept is not None for layer in layers(model))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


@torch.no_grad()
def fresh(model):
    """What a copy of the model computes that keeps nothing."""
    model = copy.deepcopy(model)
    keep_effective_weights(model, False)
    return logits(model)


def factors(model):
    return [p for name, p in model.named_parameters() if "_lora_" in name and ".default." in name]


def bases(model):
    names = ("base_layer.weight", "base_layer.gate_up_proj", "base_layer.down_proj")
    return [p for name, p in model.named_parameters() if name.endswith(names)]


@torch.no_grad()
def changed(tensors, how):
    for tensor in tensors:
        if how == "in place":
            tensor.mul_(1.5)
        elif how == "data in place":
            tensor.data.mul_(1.5)
        elif how == "data":
            tensor.data = tensor * 1.5
        elif how == "data again and again":
            # Python's allocator soon gives the memory that was freed to the next tensor.
            for _ in range(4):
                tensor.data = tensor * 1.5


HOWS = ("in place", "data in place", "data", "data again and again")
CHANGES = {
    **{f"A and B {how}": lambda m, how=how: changed(factors(m), how) for how in HOWS},
    **{f"W {how}": lambda m, how=how: changed(bases(m), how) for how in HOWS},
    "scaling": lambda m: [layer.set_scale("default", 0.3) for layer in layers(m)],
    "active adapter": lambda m: m.set_adapter("other"),
    "two adapters": lambda m: m.base_model.set_adapter(["default", "other"]),
    "dtype": lambda m: m.to(torch.bfloat16),
    "dtype there and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "merge": lambda m: m.merge_adapter(),
    "merge and unmerge": lambda m: (m.merge_adapter(), m.unmerge_adapter()),
    "another adapter of the name": lambda m: m.load_state_dict(
        {k: v * 2 for k, v in m.state_dict().items() if "_lora_A" in k or "_lora_B" in k}, strict=False
    ),
    "pruning": lambda m: prune(m, 0.8),
    "training": lambda m: train_some(m, TOKENS, 1),
    "deleted": lambda m: (m.set_adapter("other"), m.delete_adapter("default")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_seen_in_the_next_call(wrapped, change):
    first = logits(wrapped)
    assert kept(wrapped) == len(layers(wrapped))
    assert torch.equal(logits(wrapped), first)
    CHANGES[change](wrapped)
    assert torch.equal(logits(wrapped), fresh(wrapped))
    if change not in ("merge", "merge and unmerge", "dtype there and back"):
        assert not torch.allclose(logits(wrapped).float(), first, atol=1e-5)


@pytest.mark.parametrize("how", ["replaced", "parametrised", "called with another"])
def test_another_bias_is_seen(how):
    wrapped = get_peft_model(tiny("gpt2"), MaskLoRAConfig(r=2, init_weights=False, target_modules=["c_fc"])).eval()
    first, (layer, *_) = logits(wrapped), layers(wrapped)
    base, bias = layer.get_base_layer(), torch.nn.Parameter(torch.ones(64))
    if how == "called with another":
        x = torch.randn(2, 16)
        with torch.no_grad():
            found = torch.func.functional_call(layer, {"base_layer.bias": bias}, (x,)) - layer(x)
        torch.testing.assert_close(found, (bias - base.bias).expand(2, -1).detach())
        return
    if how == "replaced":
        base.bias = bias
    else:
        torch.nn.utils.parametrize.register_parametrization(base, "bias", torch.nn.Softplus())
    assert torch.equal(logits(wrapped), fresh(wrapped))
    assert not torch.equal(logits(wrapped), first)


@pytest.mark.parametrize("which", ["W", "A and B"])
def test_a_write_through_data_is_seen_by_a_single_row_of_a_small_layer(wrapped, which):
    layer, x = layers(wrapped)[0], torch.randn(16)
    with torch.no_grad():
        first = layer(x)
        changed([layer.base_layer.weight] if which == "W" else factors(layer), "data in place")
        found = layer(x)
        keep_effective_weights(layer, False)
        torch.testing.assert_close(found, layer(x))
        assert not torch.allclose(found, first)


def test_a_replica_for_another_device_computes_with_its_own_weight(wrapped):
    logits(wrapped)
    layer = layers(wrapped)[0]
    assert layer._kept is not None
    replica = layer._replicate_for_data_parallel()
    assert not replica._kept.serves(replica, torch.randn(2, 16))


def test_rescaling_and_disabling_are_seen(wrapped):
    first = logits(wrapped)
    with rescale_adapter_scale(wrapped, 0.5):
        assert torch.equal(logits(wrapped), fresh(wrapped))
    with wrapped.disable_adapter():
        assert not torch.allclose(logits(wrapped), first, atol=1e-5)
    assert torch.equal(logits(wrapped), first)


def test_autocast_and_its_end_are_seen(wrapped):
    first = logits(wrapped)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(wrapped), fresh(wrapped))
    assert torch.equal(logits(wrapped), first)


def test_a_call_that_needs_gradients_keeps_nothing(wrapped):
    logits(wrapped)
    loss = wrapped(input_ids=TOKENS, labels=TOKENS).loss
    assert kept(wrapped) == 0
    loss.backward()
    assert all(p.grad is not None for p in factors(wrapped))


def test_training_copies_and_pickles_drop_what_is_kept(wrapped):
    logits(wrapped)
    assert kept(copy.deepcopy(wrapped)) == kept(pickle.loads(pickle.dumps(wrapped))) == 0
    with torch.no_grad():
        wrapped.train()
        wrapped(input_ids=TOKENS)
    assert kept(wrapped) == 0


def test_the_switch_turns_it_off_and_on(wrapped):
    keep_effective_weights(wrapped, False)
    expected = logits(wrapped)
    assert kept(wrapped) == 0
    keep_effective_weights(wrapped)
    assert torch.equal(logits(wrapped), expected)
    assert kept(wrapped) == len(layers(wrapped))


def test_inference_mode_leaves_nothing_that_training_cannot_use(wrapped):
    with torch.inference_mode():
        wrapped(input_ids=TOKENS)
    train_some(wrapped, TOKENS, 1)
    assert torch.equal(logits(wrapped), fresh(wrapped))


def test_a_frozen_adapter_passes_gradients_to_its_input(wrapped):
    logits(wrapped)
    wrapped.requires_grad_(False)
    embedded = wrapped.get_input_embeddings()(TOKENS).requires_grad_()
    wrapped(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None


def test_a_merge_for_good_copies_no_base_weight(wrapped, monkeypatch):
    def refuse(self):
        raise AssertionError("the base weight was copied")

    for layer in layers(wrapped):
        monkeypatch.setattr(type(layer), "_keep_unmerged", refuse)
    expected = logits(wrapped)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def gradients(model, micro_steps=1):
    model.zero_grad()
    for part in TOKENS.chunk(micro_steps):
        model(input_ids=part, labels=part).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def kept_in_training(model):
    return [layer._kept_in_training.weight for layer in layers(model) if layer._kept_in_training is not None]


@pytest.fixture(params=[MaskLoRAConfig, ScaledLoRAConfig], ids=["MaskLoRA", "ScaledLoRA"])
def trained(request):
    model = tiny("llama")
    prune(model, 0.5)
    return get_peft_model(model, request.param(r=3, init_weights=False, target_modules="all-linear")).train()


def test_weights_that_are_kept_in_training_change_no_gradient(trained):
    expected = gradients(trained, 2)
    keep_effective_weights(trained, training_bytes=2**30)
    assert all(map(torch.equal, gradients(trained, 2), expected))
    # Both micro-steps computed with the same weights, and so does `Trainer`, which calls `train()` before each.
    before = kept_in_training(trained)
    assert len(before) == len(layers(trained))
    trained.train()
    gradients(trained)
    assert all(a is b for a, b in zip(kept_in_training(trained), before, strict=True))
    trained.eval()
    assert not kept_in_training(trained)


OPTIMISERS = {
    "in place": lambda tensor, grad: tensor.add_(grad, alpha=-0.1),
    "through data": lambda tensor, grad: tensor.data.add_(grad, alpha=-0.1),
}


@pytest.mark.parametrize("how", OPTIMISERS)
@torch.no_grad()
def test_a_step_of_an_optimiser_is_seen(trained, how):
    other = copy.deepcopy(trained)
    keep_effective_weights(trained, training_bytes=2**30)
    for model in (trained, other):
        for _ in range(3):
            with torch.enable_grad():
                gradients(model)
            for tensor in factors(model):
                OPTIMISERS[how](tensor, tensor.grad)
    for found, expected in zip(factors(trained), factors(other), strict=True):
        assert torch.equal(found, expected)
    with torch.enable_grad():
        assert all(map(torch.equal, gradients(trained), gradients(other)))


def test_kept_weights_take_no_more_bytes_in_training_than_allowed(trained):
    sizes = [layer.get_base_layer().weight.numel() * 4 for layer in layers(trained)]
    keep_effective_weights(trained, training_bytes=sum(sizes[:3]))
    gradients(trained)
    found = kept_in_training(trained)
    assert sum(weight.numel() * 4 for weight in found) <= sum(sizes[:3])
    assert len(found) >= 3
    keep_effective_weights(trained)
    gradients(trained)
    assert not kept_in_training(trained)


def test_dropout_keeps_no_weights_in_training():
    model = tiny("llama")
    prune(model, 0.5)
    config = MaskLoRAConfig(r=3, init_weights=False, target_modules="all-linear", lora_dropout=0.5)
    model = get_peft_model(model, config).train()
    keep_effective_weights(model, training_bytes=2**30)
    # Base layer and adapter run apart, because only the input of the adapter is dropped.
    assert gradients(model)
    assert not kept_in_training(model)


@pytest.mark.parametrize("how", ["autocast", "checkpointing", "eight bits", "unfrozen"])
def test_other_ways_to_train_use_kept_weights(how):
    model = tiny("llama")
    prune(model, 0.5)
    config = MaskLoRAConfig(
        r=3, init_weights=False, target_modules="all-linear", gradient_dtype="int8" if how == "eight bits" else None
    )
    model = get_peft_model(model, config).train()
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if how == "unfrozen":
        for tensor in bases(model):
            tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        expected = gradients(model)
        keep_effective_weights(model, training_bytes=2**30)
        found = gradients(model)
    assert len(kept_in_training(model)) == len(layers(model))
    assert all(map(torch.equal, found, expected))
