"""What a tuner trains of a region: adapters on its weights, its norms and biases, or all of its parameters."""

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn

from ..model.blocks import is_norm
from ..model.masks import mask_of
from ..model.weights import WeightView
from .fit import Tuner
from .fitting import TrainableRegion
from .parameters import without_gradients
from .regions import Region


@contextlib.contextmanager
def trainable(region: Region, weights: dict[str, WeightView], tuner: Tuner) -> Iterator[TrainableRegion]:
    """Make the parameters that `tuner` trains trainable within the context.

    If an error leaves the context, the weights get back the values that they had before.

    Args:
        region: the region.
        weights: the pruned weights of the region, by name. Adapters are attached to these.
        tuner: "full", or the configuration of a PEFT tuner.
    """
    adapted = adapted_weights(tuner, weights)
    plain = plain_parameters(region, tuner, adapted)
    changed = {id(p): p for p in (*plain, *(weight.storage for weight in adapted.values()))}
    before = [(parameter, parameter.detach().clone()) for parameter in changed.values()]
    modules = [_Children.of(module) for block in region.blocks.values() for module in block.modules()]
    adapters: list[BaseTuner] = []

    def merge() -> None:
        while adapters:
            adapters.pop().merge_and_unload()

    def undo() -> None:
        adapters.clear()
        # Not the tuners' `unload`: one that was interrupted while it attached or merged cannot finish the rest.
        for module in modules:
            module.put_back()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)

    # Gradients of the caller would be added to those of the first step.
    with without_gradients(*region.blocks.values()):
        try:
            adapters.extend(attach(region, list(adapted), tuner))
            for parameter in plain:
                parameter.requires_grad_(True)
            # All matrices have a mask, because a matrix that is not pruned in this run may have been pruned before.
            masks = {p: mask_of(p.detach()) for p in plain if p.dim() > 1}
            # Blocks of one region may share parameters.
            trained = {id(p): p for block in region.blocks.values() for p in block.parameters() if p.requires_grad}
            yield TrainableRegion(region, list(trained.values()), masks, merge, undo)
        except BaseException:
            undo()
            raise


def adapted_weights(tuner: Tuner, weights: dict[str, WeightView]) -> dict[str, WeightView]:
    """Return those of `weights` that `tuner` puts adapters on, by its `target_modules`. "full" puts them on none."""
    if tuner == "full":
        return {}
    wanted: Any = copy.copy(tuner)
    names = [name for name, weight in weights.items() if weight.expert is None]
    if wanted.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        # A set, because PEFT ignores `layers_to_transform` beside a regular expression.
        wanted.target_modules = {name.rpartition(".")[2] for name in names}
    hits = {name: check_target_module_exists(wanted, name) for name in names}
    return {name: weights[name] for name, hit in hits.items() if hit and not isinstance(hit, _ExcludedModule)}


def attach(region: Region, names: list[str], config: PeftConfig) -> Iterator[BaseTuner]:
    """Put adapters on the weights of these names, block by block, and yield the tuners."""
    for block_name, block in region.blocks.items():
        inside = {name.removeprefix(f"{block_name}."): name for name in names if name.startswith(f"{block_name}.")}
        if inside:
            own: Any = copy.copy(config)
            own.target_modules = set(inside)
            # Norms and biases are trained in place, and the layers have been chosen by the names of the whole model.
            for option, off in (("train_norms", False), ("bias", "none"), ("exclude_modules", None),
                                ("layers_to_transform", None), ("layers_pattern", None)):  # fmt: skip
                if hasattr(own, option):
                    setattr(own, option, off)
            for option in ("rank_pattern", "alpha_pattern"):
                values = getattr(config, option, None) or {}
                keys = {local: get_pattern_key(list(values), name) for local, name in inside.items()}
                if values:
                    setattr(own, option, {re.escape(n): values[key] for n, key in keys.items() if key in values})
            # PEFT makes adapters on the default device of the caller, and moves them to that of their layer.
            with torch.device("meta" if next(block.parameters()).is_meta else "cpu"):
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](block, own, "default")
            yield tuner


def plain_parameters(region: Region, tuner: Tuner, adapted: dict[str, WeightView]) -> list[nn.Parameter]:
    """Return the region's parameters that are trained in place: all, or the norms and biases that `tuner` trains."""
    if tuner == "full":
        return [p for p in region.parameters.values() if p.is_floating_point()]
    bias = getattr(tuner, "bias", "none")
    layers = [weight.layer for weight in adapted.values()]
    chosen: set[int] = set()
    for module in (module for block in region.blocks.values() for module in block.modules()):
        if getattr(tuner, "train_norms", False) and is_norm(module):
            chosen |= {id(parameter) for parameter in module.parameters()}
        # As in PEFT: "all" means the biases of all modules, "..._only" those of the layers that have adapters.
        if bias == "all" or (bias != "none" and any(module is layer for layer in layers)):
            chosen.add(id(getattr(module, "bias", None)))
    return [parameter for parameter in region.parameters.values() if id(parameter) in chosen]


@dataclass(frozen=True)
class _Children:
    """The children of a module before adapters were attached to it."""

    module: nn.Module
    children: dict[str, nn.Module | None]
    has_config: bool

    @classmethod
    def of(cls, module: nn.Module) -> "_Children":
        return cls(module, dict(module._modules), hasattr(module, "peft_config"))

    def put_back(self) -> None:
        self.module._modules.clear()
        self.module._modules.update(self.children)
        # PEFT keeps the configurations of its adapters there.
        if not self.has_config and hasattr(self.module, "peft_config"):
            del self.module.peft_config
