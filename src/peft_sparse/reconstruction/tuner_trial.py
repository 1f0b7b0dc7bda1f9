"""Refuses a tuner whose merge fills zeros, before a region is fitted with it."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..model.weights import WeightView, stored_weight
from ..tuners.merge_trial import merge_trials
from .fit import Tuner
from .trainable import adapted_weights, attach


def check_tuner_keeps_zeros(tuner: Tuner, weights: dict[str, WeightView]) -> None:
    """Attach `tuner` to a new layer like the smallest that it adapts, and try whether its merge fills zeros.

    Args:
        tuner: "full", or the configuration of a PEFT tuner.
        weights: the weights that are pruned, by name. Only their shapes are read.

    Raises:
        ValueError: the tuner fills zeros.
    """
    adapted = adapted_weights(tuner, weights)
    if not adapted:
        return
    smallest = min(adapted.values(), key=lambda weight: weight.storage.numel())
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        layer = _like(smallest)
        with torch.no_grad():
            stored_weight(layer).flatten()[::2] = 0
        block = nn.ModuleDict({"layer": layer})
        region: Any = SimpleNamespace(blocks={"block": block})
        # All at once, because the tuners are attached while the iterator runs.
        list(attach(region, ["block.layer"], tuner))
        trials = merge_trials(block, {"layer": stored_weight(layer)})
    if any(trial.fills for trial in trials):
        raise ValueError(
            f"Merging {type(tuner).__name__} fills zeros of the weights, such as {next(iter(adapted))!r}, and a "
            "region is merged when it is fitted. Use a tuner that keeps them, such as MaskLoRAConfig or "
            "ScaledLoRAConfig."
        )


def _like(weight: WeightView) -> nn.Module:
    """Return a new layer of the shape of `weight`, with values that are not zero."""
    layer = weight.layer
    if not isinstance(layer, nn.Conv2d):
        rows, columns = weight.shape
        return nn.Linear(columns, rows, bias=layer.bias is not None)
    size: Any = layer.kernel_size
    return nn.Conv2d(layer.in_channels, layer.out_channels, size, groups=layer.groups)
