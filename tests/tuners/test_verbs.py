"""Random sequences of PEFT's methods. The expected outputs come from the formulas, written down a second time."""

import contextlib
import copy
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, prune


LAYERS = ("up", "mix", "down")
NAMES = ("first", "other", "third")
# None is the configuration's own default, which for ScaledLoRA follows the rank.
SHAPES = {"r": st.sampled_from([1, 2, 3]), "alpha": st.sampled_from([None, 2.0, 3.0]), "rslora": st.booleans()}
SCALES = st.sampled_from([0.0, 0.5, 1.0, 2.0])
# Derandomised, so that a failure belongs to the change that brought it; shrinking would only slow the expected one.
EXPLORATION = settings(max_examples=30, stateful_step_count=15, deadline=None, derandomize=True, database=None)


class Base(nn.Module):
    """Layers that store their weight as (out, in) and as (in, out)."""

    def __init__(self):
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(5, 8), Conv1D(7, 8), nn.Linear(7, 4, bias=False)

    def forward(self, x):
        return self.down(self.mix(self.up(x).tanh()).tanh())


def update_of_mask_lora(weight, product):
    return (weight != 0) * product


def update_of_scaled_lora(weight, product):
    return weight * product


def update_of_lora(weight, product):
    return product


class Verbs(RuleBasedStateMachine):
    """A subclass names the configuration and what a product BA adds, at scaling 1, to a weight."""

    config_cls: type
    update: staticmethod
    prefix: str

    # -- the state that the verbs should lead to -------------------------------------------------------------------

    @initialize(**SHAPES)
    def begin(self, r, alpha, rslora):
        torch.manual_seed(0)
        self.base = Base()
        nn.init.normal_(self.base.mix.weight)
        prune(self.base, 0.5, target_modules=list(LAYERS))
        self.x = torch.randn(3, 5)
        self.trained_scaling, self.start = {}, {}
        self.scale, self.active, self.merged = {"first": 1.0}, ["first"], {}
        self.model = get_peft_model(
            copy.deepcopy(self.base), self.config("first", r, alpha, rslora), adapter_name="first"
        )

    def config(self, name, r, alpha, rslora):
        chosen = {} if alpha is None else {"lora_alpha": alpha}
        init = {"init_lora_weights" if self.config_cls is LoraConfig else "init_weights": False}
        config = self.config_cls(r=r, use_rslora=rslora, target_modules=list(LAYERS), **chosen, **init)
        self.trained_scaling[name] = config.lora_alpha / (math.sqrt(r) if rslora else r)
        # ScaledLoRA of rank 1 trains the whole factor.
        self.start[name] = float(not getattr(config, "residual", True))
        return config

    def tuner_layers(self):
        return {name: getattr(self.model.get_base_model(), name) for name in LAYERS}

    def expected(self, scales):
        """The output of the untouched base, with weights that the formula gives for adapter: scale."""
        weights = {}
        for name, layer in self.tuner_layers().items():
            A, B = getattr(layer, f"{self.prefix}A"), getattr(layer, f"{self.prefix}B")
            weight = base = self.base.get_submodule(name).weight.detach()
            for adapter, scale in scales.items():
                product = B[adapter].weight @ A[adapter].weight
                product = product.T if name == "mix" else product
                update = self.update(base, product - self.start[adapter])
                weight = weight + scale * self.trained_scaling[adapter] * update
            weights[f"{name}.weight"] = weight
        return functional_call(self.base, weights, self.x)

    def assert_output(self, scales, model=None):
        torch.testing.assert_close((model or self.model)(self.x), self.expected(scales), rtol=1e-4, atol=1e-5)

    def active_scales(self):
        return {name: self.scale[name] for name in self.active}

    def warning(self, words, expected=True):
        return pytest.warns(UserWarning, match=words) if expected else contextlib.nullcontext()

    @invariant()
    def no_zero_is_lost(self):
        for name, layer in self.tuner_layers().items():
            assert isinstance(layer, BaseTunerLayer)
            pruned = self.base.get_submodule(name).weight == 0
            assert not layer.get_base_layer().weight[pruned].any(), f"{name} lost a zero"

    @invariant()
    def the_function_is_the_formulas(self):
        assert list(self.model.active_adapters) == self.active
        self.assert_output(self.merged or self.active_scales())

    @invariant()
    def an_unmerged_weight_is_the_base_weight_to_the_bit(self):
        for name, layer in self.tuner_layers().items():
            assert layer.merged == bool(self.merged)
            if not self.merged:
                assert torch.equal(layer.get_base_layer().weight, self.base.get_submodule(name).weight), name

    # -- verbs -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.scale) < len(NAMES))
    @rule(**SHAPES)
    def add(self, r, alpha, rslora):
        name = next(name for name in NAMES if name not in self.scale)
        with self.warning("Unmerging", self.merged):
            self.model.add_adapter(name, self.config(name, r, alpha, rslora))
        self.scale[name], self.merged = 1.0, {}

    @rule(data=st.data())
    def set_active(self, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.scale)), min_size=1, unique=True))
        with self.warning("Unmerging", self.merged):
            self.model.base_model.set_adapter(names)
        self.active, self.merged = names, {}

    @precondition(lambda self: len(self.scale) > 1 and not self.merged)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.scale)))
        del self.scale[name]
        replaced = self.active == [name]
        with self.warning("is now deleted", replaced):
            self.model.delete_adapter(name)
        self.active = sorted(self.scale)[:1] if replaced else [other for other in self.active if other != name]
        assert self.model.base_model.active_adapters == self.active
        # Where several stay active PEFT's outer model goes on to name the deleted one.
        self.model.set_adapter(self.active[0])
        self.model.base_model.set_adapter(self.active)

    @precondition(lambda self: not self.merged)
    @rule(safe_merge=st.booleans())
    def merge(self, safe_merge):
        self.model.merge_adapter(safe_merge=safe_merge)
        self.merged = self.active_scales()

    # Which scale an adapter counts with that was rescaled after its merge is nobody's promise.
    @precondition(lambda self: self.merged and self.scale.items() >= self.merged.items())
    @precondition(lambda self: self.scale.keys() > self.merged.keys())
    @rule()
    def merge_another(self):
        name = min(self.scale.keys() - self.merged.keys())
        with self.warning(f"additionally merging {name}"):
            self.model.merge_adapter([name])
        self.merged[name] = self.scale[name]

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = {}

    @rule()
    def disable(self):
        with self.model.disable_adapter():
            self.assert_output({})
        self.merged = {}

    @rule(data=st.data(), scale=SCALES)
    def set_scale(self, data, scale):
        name = data.draw(st.sampled_from(sorted(self.scale)))
        for layer in self.tuner_layers().values():
            layer.set_scale(name, scale)
        self.scale[name] = scale

    @rule(scale=SCALES)
    def rescale(self, scale):
        with rescale_adapter_scale(self.model, scale):
            self.assert_output(self.merged or {name: scale * kept for name, kept in self.active_scales().items()})

    @precondition(lambda self: not self.merged)
    @rule()
    def train(self):
        before = self.model(self.x)
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.model(self.x).square().sum().backward()
        optimizer.step()
        assert any(self.active_scales().values()) != torch.equal(self.model(self.x), before)

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            first, *others = self.scale
            assert (Path(folder) / first / "adapter_model.safetensors").exists()
            base = copy.deepcopy(self.base)
            loaded = PeftModel.from_pretrained(base, Path(folder) / first, adapter_name=first, is_trainable=True)
            for name in others:
                loaded.load_adapter(Path(folder) / name, name, is_trainable=True)
        loaded.base_model.set_adapter(self.active)
        self.model, self.merged, self.scale = loaded, {}, dict.fromkeys(self.scale, 1.0)

    @precondition(lambda self: not self.merged)
    @rule()
    def export(self):
        merged = copy.deepcopy(self.model).merge_and_unload()
        self.assert_output(self.active_scales(), merged)
        for name, weight in self.base.named_parameters():
            assert not merged.get_parameter(name)[weight == 0].any(), f"{name} lost a zero"


class MaskLoraVerbs(Verbs):
    config_cls, update, prefix = MaskLoRAConfig, staticmethod(update_of_mask_lora), "mask_lora_"


class ScaledLoraVerbs(Verbs):
    config_cls, update, prefix = ScaledLoRAConfig, staticmethod(update_of_scaled_lora), "scaled_lora_"


class LoraVerbs(Verbs):
    config_cls, update, prefix = LoraConfig, staticmethod(update_of_lora), "lora_"


@pytest.mark.parametrize("count", [8, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("machine", [MaskLoraVerbs, ScaledLoraVerbs])
def test_no_sequence_of_verbs_loses_a_zero_or_changes_the_function(machine, count):
    run_state_machine_as_test(machine, settings=settings(EXPLORATION, max_examples=count))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_same_verbs_show_that_plain_lora_loses_zeros():
    with pytest.raises(AssertionError, match="lost a zero"):
        run_state_machine_as_test(
            LoraVerbs, settings=settings(EXPLORATION, phases=[Phase.generate], report_multiple_bugs=False)
        )
