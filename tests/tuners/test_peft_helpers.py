"""Functions of PEFT that take a model: they work with the tuners, or say what they refuse."""

import peft
import pytest
import torch
from peft import LoraConfig, get_layer_status, get_model_status
from peft.helpers import DoraCaching, check_if_peft_model, disable_input_dtype_casting

from peft_sparse import MaskLoRAConfig

from test_layer_kinds import KINDS, TUNERS, adapted, config_of, output, saved, tuner_layers


@pytest.fixture(params=TUNERS, ids=["MaskLoRA", "ScaledLoRA"])
def tuner(request):
    return request.param


def test_the_status_tells_adapters_and_scalings(tuner):
    kind = KINDS["llama"]
    model = adapted(kind, tuner)
    model.add_adapter("other", config_of(kind, tuner, target_modules=["q_proj"]))
    status = get_model_status(model)
    assert (status.adapter_model_type, status.active_adapters) == (type(model.base_model).__name__, ["default"])
    assert status.requires_grad == {"default": True, "other": False}
    assert status.num_adapter_layers == len(get_layer_status(model)) == len(tuner_layers(model))
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]


def test_a_saved_adapter_is_recognised(tuner, tmp_path):
    assert check_if_peft_model(str(saved(adapted(KINDS["mlp"], tuner), tmp_path)))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_casting_of_inputs_can_be_switched_off(name):
    kind = KINDS[name]
    model = adapted(kind, MaskLoRAConfig, masking="merge").double()
    for layer in tuner_layers(model):
        layer.A.float()
        layer.B.float()
    inputs = {key: x.double() for key, x in kind.inputs.items()}
    assert model(**inputs).dtype == torch.float64
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype|type"):
        model(**inputs)
    assert model(**inputs).dtype == torch.float64


def test_caches_of_dora_change_nothing(tuner):
    kind = KINDS["mlp"]
    model = adapted(kind, tuner)
    before = output(model, kind)
    with DoraCaching():
        assert torch.equal(output(model, kind), before)


def test_a_conversion_to_lora_is_refused_by_name(tuner, tmp_path):
    model = adapted(KINDS["mlp"], tuner)
    assert not model.base_model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion: .*peft_sparse.tuners"):
        peft.convert_to_lora(model, rank=2)
    with pytest.raises(TypeError, match="do not support LoRA conversion: .*peft_sparse.tuners"):
        peft.save_as_lora(tmp_path, model, rank=2)


def test_a_conversion_of_an_initialisation_is_refused_by_name(tuner, tmp_path):
    model = adapted(KINDS["mlp"], tuner)
    with pytest.raises(ValueError, match=f"not supported for {type(model.base_model).__name__}"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "initial")


def test_adapters_of_lora_are_not_added_to_the_tuner(tuner):
    model = adapted(KINDS["mlp"], tuner)
    with pytest.raises(ValueError, match="different peft types. Found PeftType.*_LORA and PeftType.LORA"):
        model.add_adapter("other", LoraConfig(target_modules=["0"]))


def test_a_new_initialisation_of_the_base_leaves_the_adapters_alone(tuner):
    kind = KINDS["llama"]
    model = kind.sparse()
    model.add_adapter(config_of(kind, tuner, init_weights=False))
    before = output(model, kind)
    model.init_weights()
    assert torch.equal(output(model, kind), before)
