"""Every way in which adapter tensors come into a model compares masks. No adapter changes what another computes."""

import copy
import itertools
import logging
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, prune, sparsity
from peft_sparse.model.blocks import base_model

from conftest import Samples, tiny


TUNERS = pytest.mark.parametrize("config_cls", [MaskLoRAConfig, ScaledLoRAConfig])


def base(share=0.0):
    """The same dense weights every time, pruned by magnitude: the zeros of different shares are nested."""
    model = tiny("llama")
    if share:
        prune(model, share)
    return model


def adapter(config_cls, **options):
    return config_cls(**{"r": 3, "target_modules": "all-linear", "init_weights": False} | options)


def saved(folder, config_cls, share=0.5, seed=0, **options):
    """Save an adapter that was attached to a pruned base. Return what it computes."""
    model = base(share)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, adapter(config_cls, **options), adapter_name=folder.name).eval()
    wrapped.save_pretrained(folder.parent)
    return logits(wrapped)


TOKENS = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


def assert_computes(model, expected):
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


# -- doors: each takes a model with an adapter "default", and puts the saved adapter into it -----------------------


def by_name(model, folder, name="default"):
    model.load_adapter(folder, name)


def by_state_dict(model, folder, name="default"):
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), name)


def by_bare_tensors(model, folder, name="default"):
    # Not PEFT's function, which compares: the plain one of torch.
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {key.replace("_lora_mask", f"_lora_mask.{name}"): value for key, value in tensors.items()}
    named = {key.replace("_lora_proof", f"_lora_proof.{name}"): value for key, value in named.items()}
    named = {key.replace(".weight", f".{name}.weight"): value for key, value in named.items()}
    assert not model.load_state_dict(named, strict=False).unexpected_keys
    model(input_ids=TOKENS)


def by_resuming(model, folder, name="default"):
    arguments = TrainingArguments(str(folder / "out"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=Samples())
    trainer._load_from_checkpoint(str(folder))


def by_hotswap(model, folder, name="default"):
    hotswap_adapter(model, folder, name, torch_device="cpu")


DOORS = [by_name, by_state_dict, by_bare_tensors, by_resuming, by_hotswap]


@TUNERS
@pytest.mark.parametrize("door", DOORS)
def test_an_existing_adapter_gets_no_tensors_that_were_trained_on_other_zeros(config_cls, door, tmp_path):
    expected = saved(tmp_path / "default", config_cls)
    right = get_peft_model(base(0.5), adapter(config_cls))
    door(right, tmp_path)
    assert_computes(right, expected)
    wrong = get_peft_model(base(), adapter(config_cls))
    before = copy.deepcopy(wrong.state_dict())
    if door in (by_name, by_state_dict, by_resuming):
        # A Trainer loads the adapter before a callback prunes the base, so that these doors wait for the first use.
        door(wrong, tmp_path)
    with pytest.raises(ValueError, match="trained on other zeros"):
        door(wrong, tmp_path) if door in (by_bare_tensors, by_hotswap) else logits(wrong)
    for use in (wrong.merge_adapter, lambda: wrong.save_pretrained(tmp_path / "again")):
        if door is not by_hotswap:
            with pytest.raises(ValueError, match="trained on other zeros"):
                use()
    if door is by_hotswap:
        assert all(torch.equal(before[name], value) for name, value in wrong.state_dict().items())


def test_a_base_that_is_pruned_between_loading_and_the_first_use_is_accepted(tmp_path):
    expected = saved(tmp_path / "default", MaskLoRAConfig)
    model = get_peft_model(base(), adapter(MaskLoRAConfig))
    model.load_adapter(tmp_path, "default")
    prune(model, 0.5)
    assert_computes(model, expected)


@pytest.mark.parametrize("door", DOORS)
def test_a_saved_mask_prunes_a_dense_base_through_every_door(door, tmp_path):
    expected = saved(tmp_path / "default", MaskLoRAConfig, save_mask=True)
    model = get_peft_model(base(), adapter(MaskLoRAConfig, save_mask=True))
    door(model, tmp_path)
    if door is by_bare_tensors:
        # The mask came past PEFT, so that nothing says that it is another.
        return
    assert_computes(model, expected)
    assert sparsity(model) == pytest.approx(0.5)


def test_transformers_loader_compares_the_fingerprints_too(tmp_path):
    expected = saved(tmp_path / "default", MaskLoRAConfig)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for share in (0.5, 0.0):
        model = base(share)
        # Without the configuration of the adapter, only the tensors tell.
        model.load_adapter(None, peft_config=adapter(MaskLoRAConfig), adapter_state_dict=dict(tensors))
        if share:
            assert_computes(model, expected)
        else:
            with pytest.raises(ValueError, match="trained on other zeros"):
                logits(model)


def test_an_adapter_without_fingerprints_is_still_loaded(tmp_path):
    expected = saved(tmp_path / "default", MaskLoRAConfig)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    old = {name: value for name, value in tensors.items() if "_proof" not in name}
    model = get_peft_model(base(0.5), adapter(MaskLoRAConfig))
    assert not [key for key in set_peft_model_state_dict(model, old).missing_keys if "mask_lora_" in key]
    assert_computes(model, expected)


def test_the_choice_of_the_configuration_counts_at_every_door(tmp_path):
    saved(tmp_path / "default", MaskLoRAConfig)
    for choice, said in (("warn", 1), ("ignore", 0)):
        model = get_peft_model(base(), adapter(MaskLoRAConfig, on_mask_mismatch=choice))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            by_state_dict(model, tmp_path)
        assert sum("other zeros" in str(w.message) for w in warned) == said


def test_a_base_that_was_pruned_after_saving_is_noticed(tmp_path):
    saved(tmp_path / "default", MaskLoRAConfig)
    model = PeftModel.from_pretrained(base(0.5), tmp_path)
    prune(model, 0.7)
    model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match="a weight of 16 x 16 has sparsity 0.69.*, and in the adapter 0.5000"):
        logits(model)


# -- several adapters with masks of their own ----------------------------------------------------------------------

SHARES = {"fifty": 0.5, "seventy": 0.7}


@pytest.fixture(params=[MaskLoRAConfig, ScaledLoRAConfig])
def nested(request, tmp_path):
    """Two adapters with nested masks, saved, and what each computes."""
    return {
        name: saved(tmp_path / name, request.param, share, seed, save_mask=True)
        for seed, (name, share) in enumerate(SHARES.items())
    }


def loaded(tmp_path, *names):
    first, *others = names
    model = PeftModel.from_pretrained(base(), tmp_path / first, adapter_name=first)
    for name in others:
        model.load_adapter(tmp_path / name, name)
    return model


@pytest.mark.parametrize("order", list(itertools.permutations(SHARES)))
def test_nested_masks_stay_their_adapters_own_in_any_order(nested, order, tmp_path):
    model = loaded(tmp_path, *order)
    for name in (*order, *reversed(order)):
        model.set_adapter(name)
        assert_computes(model, nested[name])
        model.merge_adapter()
        assert_computes(model, nested[name])
        model.unmerge_adapter()
    model.save_pretrained(tmp_path / "again")
    for name in order:
        alone = PeftModel.from_pretrained(base(), tmp_path / "again" / name)
        assert_computes(alone, nested[name])
        assert sparsity(alone) == pytest.approx(SHARES[name], abs=0.01)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["seventy"])
    assert_computes(merged, nested["seventy"])
    assert sparsity(merged) == pytest.approx(0.7, abs=0.01)
    model.set_adapter("fifty")
    model.delete_adapter("seventy")
    assert_computes(model, nested["fifty"])


def test_loading_a_narrower_mask_changes_nothing_of_the_first(nested, tmp_path):
    model = loaded(tmp_path, "fifty")
    assert_computes(model, nested["fifty"])
    assert sparsity(model) == pytest.approx(0.5)
    model.load_adapter(tmp_path / "seventy", "seventy")
    assert_computes(model, nested["fifty"])
    assert sparsity(model) == pytest.approx(0.5)
    model.delete_adapter("seventy")
    assert_computes(model, nested["fifty"])


def test_a_mask_that_needs_entries_that_are_gone_is_refused_before_it_is_attached(nested, tmp_path):
    model = loaded(tmp_path, "seventy")
    assert_computes(model, nested["seventy"])
    with pytest.raises(ValueError, match="other zeros .* adapter 0.5000, model 0.69"):
        model.load_adapter(tmp_path / "fifty", "fifty")
    assert list(model.peft_config) == ["seventy"]
    assert_computes(model, nested["seventy"])


def test_masks_of_equal_size_that_differ_are_refused_with_both_sparsities(tmp_path):
    saved(tmp_path / "one", MaskLoRAConfig, save_mask=True)
    other = base()
    prune(other, 0.5, criterion="random")
    get_peft_model(other, adapter(MaskLoRAConfig, save_mask=True), "two").save_pretrained(tmp_path)
    model = loaded(tmp_path, "one")
    expected = logits(model)
    with pytest.raises(ValueError, match="although they are zero. The mask has sparsity 0.5000, and .* 0.5000"):
        model.load_adapter(tmp_path / "two", "two")
    assert_computes(model, expected)


def test_adapters_with_different_masks_are_not_active_together(nested, tmp_path):
    model = loaded(tmp_path, "fifty", "seventy")
    model.base_model.set_adapter(["fifty", "seventy"])
    for use in (lambda: logits(model), model.merge_adapter):
        with pytest.raises(ValueError, match="'seventy' and 'fifty' have different masks"):
            use()


@TUNERS
def test_zeros_of_weights_that_are_not_adapted_are_proved_too(config_cls, tmp_path):
    expected = saved(tmp_path / "default", config_cls, save_mask=True, target_modules=["q_proj"])
    config = PeftConfig.from_pretrained(tmp_path)
    assert {round(share, 2) for share in config.other_sparsities.values()} == {0.5}
    assert not any("q_proj" in name for name in config.other_sparsities)
    assert_computes(PeftModel.from_pretrained(base(0.5), tmp_path), expected)
    words = "beside weights that it does not adapt and that are pruned. .* have fewer zeros in this base model, such"
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(base(), tmp_path)
    other = get_peft_model(base(), adapter(config_cls, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=words):
        hotswap_adapter(other, tmp_path, "default", torch_device="cpu")
    config.on_mask_mismatch = "warn"
    with pytest.warns(UserWarning, match=words):
        PeftModel.from_pretrained(base(), tmp_path, config=config)


@TUNERS
def test_whole_modules_bring_their_own_zeros(config_cls, tmp_path):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}
    saved(tmp_path / "default", config_cls, save_mask=True, **options)
    assert not any("down_proj" in name for name in PeftConfig.from_pretrained(tmp_path).other_sparsities)


def test_a_layer_that_only_one_adapter_adapts_stays_dense_for_the_other(tmp_path):
    expected = {
        "all": saved(tmp_path / "all", MaskLoRAConfig, save_mask=True),
        "some": saved(tmp_path / "some", MaskLoRAConfig, 0.0, 1, save_mask=True, target_modules=["q_proj"]),
    }
    for order in (("all", "some"), ("some", "all")):
        model = loaded(tmp_path, *order)
        for name in order:
            model.set_adapter(name)
            assert_computes(model, expected[name])


def test_a_new_adapter_counts_on_the_zeros_that_another_brought(tmp_path):
    saved(tmp_path / "default", MaskLoRAConfig, save_mask=True)
    model = PeftModel.from_pretrained(base(), tmp_path)
    model.add_adapter("fresh", adapter(MaskLoRAConfig))
    assert sparsity(model) == pytest.approx(0.5)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"masking": "merge"}, {"r": 1}])
def test_a_narrower_mask_is_trained_by_its_own_formula(options, tmp_path):
    for name, share in SHARES.items():
        saved(tmp_path / name, MaskLoRAConfig, share, save_mask=True, **options)
    both, alone = loaded(tmp_path, "fifty", "seventy"), loaded(tmp_path, "seventy")
    logits(both)
    both.set_adapter("seventy")
    gradients = []
    for model in (both, alone):
        model.set_adapter("seventy")
        assert_computes(model, logits(alone))
        model.train()
        torch.manual_seed(1)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if ".seventy." in n})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-6)


def test_narrower_masks_of_experts_and_convolutions(tmp_path):
    def conv(share):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding="same"))
        prune(model, share, target_modules=["0"])
        return model, torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)), {"target_modules": ["0"]}

    def experts(share):
        model = tiny("gpt_oss")
        prune(model, share, target_modules=["gate_up_proj"])
        return model, TOKENS, {"target_modules": [], "target_parameters": ["gate_up_proj"]}

    for build in (conv, experts):
        expected = {}
        for name, share in SHARES.items():
            model, x, targets = build(share)
            wrapped = get_peft_model(model, MaskLoRAConfig(r=2, save_mask=True, init_weights=False, **targets), name)
            wrapped.eval().save_pretrained(tmp_path)
            expected[name] = output(wrapped, x)
        dense, x, _ = build(0.3)
        model = PeftModel.from_pretrained(dense, tmp_path / "fifty", adapter_name="fifty")
        model.load_adapter(tmp_path / "seventy", "seventy")
        for name in expected:
            model.set_adapter(name)
            torch.testing.assert_close(output(model, x), expected[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def output(model, x):
    result = model(x)
    return getattr(result, "logits", result)


# -- half precision ------------------------------------------------------------------------------------------------


@TUNERS
def test_small_weights_that_half_precision_makes_zero_are_tolerated_and_counted(config_cls, tmp_path, caplog):
    model = base()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, :3] = 1e-9
    prune(model, 0.5, criterion="random")
    count = int((weight[:, :3] != 0).sum())
    get_peft_model(copy.deepcopy(model), adapter(config_cls)).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).sparsity == pytest.approx(0.5)
    with caplog.at_level(logging.WARNING):
        PeftModel.from_pretrained(model.half(), tmp_path).unload()
        assert f"{count} entries that the adapter was trained on are too small" in caplog.text
        caplog.clear()
        # A copy of the half-precision weights in another dtype has the same zeros.
        PeftModel.from_pretrained(model.float(), tmp_path).unload()
        assert "are too small" in caplog.text
    with torch.no_grad():
        kept = weight.nonzero()[-1]
        weight[kept[0], kept[1]] = 0
    with pytest.raises(ValueError, match="other zeros .* in 1 of 21 layers"):
        PeftModel.from_pretrained(model, tmp_path)


# -- what a layer is beside its weight -----------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 3])
@TUNERS
def test_a_base_weight_that_is_unfrozen_gets_the_gradient_of_the_formula(config_cls, r):
    wrapped = get_peft_model(base(0.5), adapter(config_cls, r=r, lora_alpha=6))
    layer = wrapped.base_model.model.model.layers[1].mlp.up_proj
    weight = layer.get_base_layer().weight.requires_grad_()
    x = torch.randn(4, 16)
    layer(x).square().sum().backward()
    found, factors = weight.grad.clone(), [p for f in (layer.A, layer.B) for p in f.parameters()]
    gradients = [p.grad.clone() for p in factors]
    A, B, s = factors[0], factors[1], layer.scaling["default"]
    mask = (weight != 0).float()
    H = mask if config_cls is MaskLoRAConfig else weight
    effective = weight + s * H * (B @ A - float(not layer.residual["default"]))
    expected = torch.autograd.grad(((x @ effective.T).square().sum()), [weight, *factors])
    for one, other in zip([found, *gradients], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_experts_that_are_unfrozen_get_their_gradient():
    model = tiny("mixtral")
    prune(model, 0.5)
    wrapped = get_peft_model(model, MaskLoRAConfig(r=2, target_modules=[], target_parameters=["gate_up_proj"]))
    plain = tiny("mixtral")
    prune(plain, 0.5)
    gradients = []
    for one in (wrapped, plain):
        experts = base_model(one).model.layers[0].mlp.experts
        parameter = (experts.get_base_layer() if one is wrapped else experts).gate_up_proj.requires_grad_()
        one(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append(parameter.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.filterwarnings(
    "ignore:Model (has|with) `tie_word_embeddings=True`", "ignore:Input and output embeddings are"
)
def test_a_tied_head_is_merged_without_its_embedding(tmp_path):
    model = base()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    before = embedding.detach().clone()
    wrapped = get_peft_model(model, adapter(MaskLoRAConfig, target_modules=["q_proj", "lm_head"]))
    expected = logits(wrapped)
    wrapped.merge_adapter()
    assert_computes(wrapped, expected)
    assert torch.equal(embedding, before)
    wrapped.unmerge_adapter()
    assert wrapped.base_model.model.lm_head.get_base_layer().weight is embedding
    assert_computes(wrapped, expected)
    merged = wrapped.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert_computes(type(merged).from_pretrained(tmp_path), expected)


@TUNERS
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"r": 1}])
def test_adapters_on_offloaded_weights_compute_the_same(config_cls, options):
    wrapped = get_peft_model(base(0.5), adapter(config_cls, **options))
    expected = logits(wrapped)
    assert_computes(cpu_offload(copy.deepcopy(wrapped), execution_device=torch.device("cpu")), expected)


@TUNERS
@pytest.mark.parametrize("save_mask", [False, True])
def test_a_state_dict_of_torch_proves_its_masks_too(config_cls, save_mask):
    trained = get_peft_model(base(0.5), adapter(config_cls, save_mask=save_mask)).eval()
    expected = logits(trained)
    tensors = {key: value for key, value in trained.state_dict().items() if "_lora_" in key}
    wrong = get_peft_model(base(), adapter(config_cls, save_mask=save_mask))
    logits(wrong)
    wrong.load_state_dict(tensors, strict=False)
    if save_mask:
        assert_computes(wrong, expected)
    else:
        with pytest.raises(ValueError, match="trained on other zeros"):
            logits(wrong)
    right = get_peft_model(base(0.5), adapter(config_cls, save_mask=save_mask))
    right.load_state_dict(tensors, strict=False)
    assert_computes(right, expected)


@TUNERS
def test_a_state_dict_of_torch_may_warn(config_cls):
    tensors = get_peft_model(base(0.5), adapter(config_cls)).state_dict()
    wrong = get_peft_model(base(), adapter(config_cls, on_mask_mismatch="warn"))
    wrong.load_state_dict({key: value for key, value in tensors.items() if "_lora_" in key}, strict=False)
    with pytest.warns(UserWarning, match="trained on other zeros"):
        logits(wrong)


@TUNERS
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_saved_mask_knows_entries_that_a_cast_turned_into_zeros(config_cls, share, dtype, tmp_path, caplog):
    def small(share):
        model = base(share)
        with torch.no_grad():
            for weight in model.model.layers.parameters():
                weight.view(-1)[::7] *= 1e-42
        return model

    wrapped = get_peft_model(small(0.5), adapter(config_cls, save_mask=True))
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        # An adapter leaves what underflows zero, so it is compared with the same adapter on the cast base.
        expected = logits(wrapped.to(dtype))
    found = PeftModel.from_pretrained(small(share).to(dtype), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=0.02)
    assert "are too small for the dtype of this base model" in caplog.text
    other = base(0.5)
    with torch.no_grad():
        for weight in other.model.layers.parameters():
            weight.view(-1)[3::7] = 0
    with pytest.raises(ValueError, match="other zeros|has the zeros of adapter"):
        PeftModel.from_pretrained(other.to(dtype), tmp_path)
