"""What PEFT fills in, pads or leaves out must have no effect: B = 0, or BA = 1 for ScaledLoRA W ⊙ (BA)."""

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig

from test_layer_kinds import (
    KINDS,
    TUNERS,
    adapted,
    assert_zeros_kept,
    config_of,
    output,
    product_form,
    saved,
    train,
    tuner_layers,
)


KINDS_OF_LAYERS = pytest.mark.parametrize("name", ["mlp", "conv", "llama", "gpt2", "mixtral"])


@pytest.fixture(params=[*TUNERS, product_form], ids=["MaskLoRA", "ScaledLoRA", "ScaledLoRA, product"])
def tuner(request):
    return request.param


def alone(kind, tuner, folder, **options):
    """Save an adapter; return what the model computes with it and nothing else."""
    wrapped = adapted(kind, tuner, **options)
    saved(wrapped, folder)
    return output(wrapped, kind)


def swapped(kind, tuner, tmp_path, before, after):
    """A model in which the adapter `before` was exchanged for `after`, and what `after` computes alone."""
    alone(kind, tuner, tmp_path / "before", **before)
    torch.manual_seed(1)
    expected = alone(kind, tuner, tmp_path / "after", **after)
    model = PeftModel.from_pretrained(kind.sparse(), tmp_path / "before")
    assert not torch.allclose(output(model, kind), expected, atol=1e-3)
    hotswap_adapter(model, tmp_path / "after", "default", torch_device="cpu")
    return model, expected


# The second adapter has a rank and a scaling of its own.
OTHERS = {
    "smaller": {"r": 2, "lora_alpha": 3},
    "larger": {"r": 5, "lora_alpha": 3},
    "neutral": {"r": 5},
}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *(("llama", other) for other in OTHERS),
        *((name, other) for name in ("mlp", "gpt2") for other in ("smaller", "larger")),
        ("conv", "smaller"),
        ("mixtral", "larger"),
    ],
)
def test_an_adapter_of_another_rank_is_swapped_in(name, other, tuner, tmp_path):
    kind = KINDS[name]
    model, expected = swapped(kind, tuner, tmp_path, {"lora_alpha": 12}, OTHERS[other])
    torch.testing.assert_close(output(model, kind), expected)
    again = PeftModel.from_pretrained(kind.sparse(), saved(model, tmp_path / "again"))
    torch.testing.assert_close(output(again, kind), expected)
    for layer in tuner_layers(model):
        layer.set_scale("default", 1.0)
    torch.testing.assert_close(output(model, kind), expected)
    model.merge_adapter()
    torch.testing.assert_close(output(model, kind), expected)
    assert_zeros_kept(model, kind)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
def test_rank_one_is_swapped_for_more_and_more_for_rank_one(before, after, tuner, tmp_path):
    kind = KINDS["llama"]
    # ScaledLoRA trains another formula at rank 1.
    model, expected = swapped(kind, tuner, tmp_path, {"r": before}, {"r": after})
    torch.testing.assert_close(output(model, kind), expected)
    again = PeftModel.from_pretrained(kind.sparse(), saved(model, tmp_path / "again"))
    torch.testing.assert_close(output(again, kind), expected)


def test_every_layer_gets_the_rank_and_the_scaling_of_the_new_adapter(tuner, tmp_path):
    kind = KINDS["llama"]
    patterns = {"rank_pattern": {"q_proj": 1, "layers.0.mlp.up_proj": 5}, "alpha_pattern": {"k_proj": 7}}
    model, expected = swapped(kind, tuner, tmp_path, {}, patterns)
    torch.testing.assert_close(output(model, kind), expected)
    hotswap_adapter(model, tmp_path / "before", "default", torch_device="cpu")
    again = PeftModel.from_pretrained(kind.sparse(), saved(model, tmp_path / "again"))
    before = PeftModel.from_pretrained(kind.sparse(), tmp_path / "before")
    torch.testing.assert_close(output(model, kind), output(before, kind))
    torch.testing.assert_close(output(again, kind), output(before, kind))


@KINDS_OF_LAYERS
def test_layers_that_the_new_adapter_lacks_have_no_adapter(name, tuner, tmp_path):
    kind = KINDS[name]
    few = {
        "target_modules": {"llama": ["up_proj"], "gpt2": ["c_fc"], "mixtral": ["q_proj"]}.get(name, ["0"]),
        "target_parameters": None,
    }
    model, expected = swapped(kind, tuner, tmp_path, {}, few)
    torch.testing.assert_close(output(model, kind), expected)
    # They can be trained from there.
    for layer in tuner_layers(model):
        for factor in (layer.A, layer.B):
            factor.requires_grad_(True)
    train(model, kind)
    assert not torch.allclose(output(model, kind), expected, atol=1e-3)
    assert_zeros_kept(model, kind)


def test_hotswap_leaves_adapters_with_similar_names_alone(tuner, tmp_path):
    kind = KINDS["mlp"]
    expected = alone(kind, tuner, tmp_path / "new", r=2)
    model = get_peft_model(kind.sparse(), config_of(kind, tuner, init_weights=False), adapter_name="default_too")
    model.add_adapter("default", config_of(kind, tuner, init_weights=False))
    model.add_adapter("0", config_of(kind, tuner, init_weights=False))
    model.eval()
    others = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("default_too", "0")}
    others = {name: {key: value.clone() for key, value in state.items()} for name, state in others.items()}
    model.set_adapter("default")
    hotswap_adapter(model, tmp_path / "new", "default", torch_device="cpu")
    torch.testing.assert_close(output(model, kind), expected)
    for name, state in others.items():
        for key, value in get_peft_model_state_dict(model, adapter_name=name).items():
            assert torch.equal(value, state[key]), (name, key)


def test_a_swap_of_lora_beside_the_tuner_leaves_it_alone(tuner, tmp_path):
    kind = KINDS["mlp"]
    lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    get_peft_model(kind.sparse(), lora).save_pretrained(tmp_path)
    model = get_peft_model(kind.sparse(), config_of(kind, tuner, init_weights=False), mixed=True).eval()
    before = output(model, kind)
    # PEFT takes every parameter for LoRA's whose name holds "lora_" and the name of the adapter.
    model.add_adapter("a", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    state = hotswap._insert_adapter_name_into_state_dict(
        load_file(tmp_path / "adapter_model.safetensors"), "a", ".lora_"
    )
    state = {key.removeprefix("base_model."): value for key, value in state.items()}
    hotswap.hotswap_adapter_from_state_dict(model.base_model, state, "a", lora)
    model.set_adapter(["default"])
    torch.testing.assert_close(output(model, kind), before)


@KINDS_OF_LAYERS
def test_a_swapped_adapter_brings_its_mask(name, tuner, tmp_path):
    kind = KINDS[name]
    model, expected = swapped(kind, tuner, tmp_path, {"save_mask": True}, {"save_mask": True, "r": 2})
    torch.testing.assert_close(output(model, kind), expected)
    again = PeftModel.from_pretrained(kind.sparse(), saved(model, tmp_path / "again"))
    torch.testing.assert_close(output(again, kind), expected)


def test_an_adapter_of_other_zeros_is_not_swapped_in(tuner, tmp_path):
    kind = KINDS["llama"]
    alone(kind, tuner, tmp_path)
    model = adapted(kind, tuner, model=kind.dense())
    before = output(model, kind)
    with pytest.raises(ValueError, match="was trained on other zeros"):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    assert torch.equal(output(model, kind), before)


# -- before compilation --------------------------------------------------------------------------------------------


@KINDS_OF_LAYERS
def test_ranks_padded_before_compilation_change_no_output(name, tuner, tmp_path):
    kind = KINDS[name]
    expected = alone(kind, tuner, tmp_path / "new", r=2, lora_alpha=5)
    model = adapted(kind, tuner, lora_alpha=12)
    before = output(model, kind)
    parameters = [p for layer in tuner_layers(model) for p in (*layer.A.parameters(), *layer.B.parameters())]
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    torch.testing.assert_close(output(model, kind), before)
    assert (model.peft_config["default"].r, model.peft_config["default"].rank_pattern) == (6, {})
    again = PeftModel.from_pretrained(kind.sparse(), saved(model, tmp_path / "again"))
    torch.testing.assert_close(output(again, kind), before)
    addresses = [p.data_ptr() for p in parameters]
    hotswap_adapter(model, tmp_path / "new", "default", torch_device="cpu")
    torch.testing.assert_close(output(model, kind), expected)
    assert [p.data_ptr() for p in parameters] == addresses


def test_padded_ranks_are_saved_and_loaded_whatever_the_scaling(tuner, tmp_path):
    kind = KINDS["llama"]
    model = adapted(kind, tuner, init_weights=False, use_rslora=True, r=4, alpha_pattern={"up_proj": 3})
    before = output(model, kind)
    # The scaling is 3 / sqrt(4), which is not bit for bit sqrt(12) * 3 / sqrt(4) / sqrt(12).
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=12)
    loaded = PeftModel.from_pretrained(kind.sparse(), saved(model, tmp_path))
    torch.testing.assert_close(output(loaded, kind), before)


@pytest.mark.parametrize(("tuner", "r"), [(MaskLoRAConfig, 3), (ScaledLoRAConfig, 1)])
def test_a_compiled_model_computes_what_was_swapped_in(tuner, r, tmp_path):
    kind = KINDS["mlp"]
    expected = alone(kind, tuner, tmp_path / "new", r=2, lora_alpha=5, target_modules=["0"])
    model = adapted(kind, tuner, r=r)
    before = output(model, kind)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(output(compiled, kind), before)
    hotswap_adapter(compiled, tmp_path / "new", "default", torch_device="cpu")
    torch.testing.assert_close(output(compiled, kind), expected)


def test_a_model_with_a_compiled_block_receives_an_adapter(tuner, tmp_path):
    kind = KINDS["llama"]
    expected = alone(kind, tuner, tmp_path / "new", r=2, rank_pattern={"layers.1.mlp.up_proj": 1})
    model = adapted(kind, tuner)
    layers = model.base_model.model.model.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    hotswap_adapter(model, tmp_path / "new", "default", torch_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(output(model, kind), expected)


def test_a_compiled_model_is_prepared_as_the_caller_says():
    model = torch.compile(adapted(KINDS["mlp"], MaskLoRAConfig), backend="eager")
    with pytest.warns(UserWarning, match="The model is compiled already"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4, check_compiled="warn")
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4, check_compiled="ignore")


def test_lora_is_prepared_as_before():
    model = get_peft_model(KINDS["mlp"].sparse(), LoraConfig(r=2, target_modules=["0"]))
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
    assert model.base_model.model[0].lora_A["default"].weight.shape[0] == model.peft_config["default"].r == 4


# -- loading -------------------------------------------------------------------------------------------------------


def without(folder, *parts):
    """Remove the tensors whose names hold one of `parts` from a saved adapter."""
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    kept = {key: value for key, value in state.items() if not any(part in key for part in parts)}
    assert len(kept) < len(state)
    save_file(kept, path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("init_weights", [True, "paper", False])
def test_layers_that_a_file_lacks_have_no_adapter(low_cpu_mem_usage, init_weights, tuner, tmp_path):
    if init_weights == "paper" and tuner is MaskLoRAConfig:
        return
    kind = KINDS["llama"]
    wrapped = adapted(kind, tuner, init_weights=init_weights)
    train(wrapped, kind)
    saved(wrapped, tmp_path)
    without(tmp_path, "q_proj", "layers.1.mlp.up_proj.{}_A".format(wrapped.base_model.prefix.removesuffix("_")))
    for name, module in wrapped.named_modules():
        if name.endswith("q_proj") or name.endswith("layers.1.mlp.up_proj"):
            module.reset_parameters("default", True)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(kind.sparse(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(output(loaded, kind), output(wrapped, kind))


@pytest.mark.parametrize("wrong", ["A", "B", "both"])
def test_layers_whose_shapes_differ_have_no_adapter_if_that_is_asked(wrong, tuner, tmp_path):
    kind = KINDS["mlp"]
    wrapped = adapted(kind, tuner, init_weights=False)
    saved(wrapped, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    wrapped.base_model.model[2].reset_parameters("default", True)
    for key in state:
        if ".2." in key and any(f"lora_{letter}" in key for letter in ("AB" if wrong == "both" else wrong)):
            state[key] = torch.ones(5, 5)
    save_file(state, path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(kind.sparse(), tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"), pytest.warns(UserWarning, match="missing ada"):
        loaded = PeftModel.from_pretrained(kind.sparse(), tmp_path, ignore_mismatched_sizes=True)
    torch.testing.assert_close(output(loaded, kind), output(wrapped, kind))


def test_transformers_leaves_layers_that_a_file_lacks_without_an_effect(tuner, tmp_path):
    kind = KINDS["llama"]
    wrapped = adapted(kind, tuner, init_weights=False)
    saved(wrapped, tmp_path)
    without(tmp_path, "q_proj")
    for name, module in wrapped.named_modules():
        if name.endswith("q_proj"):
            module.reset_parameters("default", True)
    model = kind.sparse()
    model.load_adapter(str(tmp_path))
    torch.testing.assert_close(output(model, kind), output(wrapped, kind))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_second_adapter_from_transformers_leaves_the_first_alone(tuner, tmp_path):
    kind = KINDS["llama"]
    expected = {
        name: alone(kind, tuner, tmp_path / name, init_weights=False, r=r) for name, r in (("one", 4), ("two", 2))
    }
    model = kind.sparse()
    for name in expected:
        model.load_adapter(str(tmp_path / name), name)
    for name in expected:
        model.set_adapter(name)
        torch.testing.assert_close(output(model, kind), expected[name])


def test_a_bare_state_dict_without_some_layers_leaves_them_as_they_are(tuner):
    kind = KINDS["llama"]
    model, other = adapted(kind, tuner), adapted(kind, tuner)
    state = get_peft_model_state_dict(other)
    own = {key: value for key, value in get_peft_model_state_dict(model).items() if "q_proj" in key}
    expected = adapted(kind, tuner)
    set_peft_model_state_dict(expected, state | own)
    set_peft_model_state_dict(model, {key: value for key, value in state.items() if "q_proj" not in key})
    torch.testing.assert_close(output(model, kind), output(expected, kind))


# -- scale and restart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "tuner"),
    [
        *(("llama", options, tuner) for options in ({"r": 1}, {"lora_alpha": 5}) for tuner in TUNERS),
        *((name, {"r": 1}, ScaledLoRAConfig) for name in ("mlp", "conv", "gpt2", "mixtral")),
        *((name, {"lora_alpha": 5}, MaskLoRAConfig) for name in ("mlp", "conv", "gpt2", "mixtral")),
        *((name, {"init_weights": "paper"}, ScaledLoRAConfig) for name in ("mlp", "conv", "gpt2", "mixtral")),
    ],
)
def test_no_scale_is_the_base_model(name, options, tuner):
    kind = KINDS[name]
    model = adapted(kind, tuner, **options)
    train(model, kind)
    base, trained = output(kind.sparse(), kind), output(model, kind)
    layers = tuner_layers(model)
    for layer in layers:
        layer.set_scale("default", 0)
    torch.testing.assert_close(output(model, kind), base)
    for layer in layers:
        layer.unscale_layer()
    torch.testing.assert_close(output(model, kind), trained)
    with rescale_adapter_scale(model, 0):
        torch.testing.assert_close(output(model, kind), base)
    for layer in layers:
        layer.scale_layer(0.5)
        layer.unscale_layer(0.5)
    torch.testing.assert_close(output(model, kind), trained)
    for layer in layers:
        layer.scale_layer(0)
    model.merge_adapter()
    torch.testing.assert_close(output(model, kind), base)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(output(model, kind), base)


@pytest.mark.parametrize("init_weights", [True, "paper", False])
def test_a_restart_begins_as_the_configuration_says(init_weights):
    kind = KINDS["mlp"]
    model = adapted(kind, ScaledLoRAConfig, init_weights=init_weights)
    train(model, kind)
    before = output(model, kind)
    for layer in tuner_layers(model):
        layer.restart()
    torch.testing.assert_close(output(model, kind), before)
    assert not any(layer.get_delta_weight("default").abs().max() > 1e-6 for layer in tuner_layers(model))
    first = model.base_model.model[0].A["default"].weight
    assert torch.equal(first, torch.full_like(first, 3**-0.5)) == (init_weights == "paper")
