"""Tries on a copy of one layer whether merging an adapter of any PEFT tuner fills zeros of the weight below it."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..model.kinds import count_zeros
from ..model.sharding import has_shards
from ..model.weights import PRUNABLE_LAYERS, WeightView


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeTrial:
    """What came out of a trial of one kind of adapted layers.

    Args:
        tuner: the class of the adapter's configuration, or of its layers.
        adapter: the name of the adapter.
        weights: the names of the pruned weights below layers of this kind, one for each layer.
        fills: whether merging fills zeros. None if this could not be tried.
        why: why it could not be tried.
    """

    tuner: str
    adapter: str
    weights: tuple[str, ...]
    fills: bool | None
    why: str = ""


def warn_of_filling_merges(model: nn.Module, pruned: Mapping[str, Tensor]) -> None:
    """Log a warning for each kind of adapter whose merge fills zeros of pruned weights, or for which it is unknown.

    Args:
        model: the model, whose adapters may be those of a `PeftModel`, of `add_adapter` or of a mixed model.
        pruned: the parameters that have zeros, by name.
    """
    for trial in merge_trials(model, pruned):
        if trial.fills is False:
            continue
        found = "fills them" if trial.fills else f"may fill them, which could not be tried: {trial.why}"
        logger.warning(
            "The adapter %r (%s) is attached to %d pruned weights, the first of which is %r. Training keeps the zeros "
            "of the base weights, and merging %s. Use MaskLoRAConfig or ScaledLoRAConfig, or do not merge: keep the "
            "adapter beside the base.",
            trial.adapter,
            trial.tuner,
            len(trial.weights),
            trial.weights[0],
            found,
        )


def merge_trials(model: nn.Module, pruned: Mapping[str, Tensor]) -> list[MergeTrial]:
    """Try the active adapters on pruned weights, once for each kind of layer. The model does not change.

    Of each kind, which is a class of layers and an adapter, the smallest layer is copied. The copy's adapter gets
    random values and is merged, and the zeros of the copy's weight are counted. Kinds that cannot be merged at all
    are left out.

    Args:
        model: the model with its adapters.
        pruned: the parameters that have zeros, by name.
    """
    names = {id(parameter): name for name, parameter in pruned.items()}
    kinds: dict[tuple[Any, ...], list[tuple[BaseTunerLayer, dict[str, str]]]] = {}
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        stored: dict[str, Any] = layer.get_base_layer()._parameters
        # An adapter on a parameter of a module changes that parameter alone.
        only = getattr(layer, "parameter_name", None)
        found = {key: names[id(p)] for key, p in stored.items() if id(p) in names and only in (None, key)}
        for adapter in layer.active_adapters if found else ():
            if any(True for _ in _tensors_of(layer, adapter)):
                kinds.setdefault((type(layer), adapter, only), []).append((layer, found))
    configs: Any = getattr(model, "peft_config", {})
    trials = []
    for (kind, adapter, _), layers in kinds.items():
        smallest, found = min(layers, key=lambda each: sum(pruned[name].numel() for name in each[1].values()))
        try:
            fills, why = _fills_zeros(smallest, list(found), adapter)
        except NotImplementedError:
            # Nothing of this kind can be merged.
            continue
        except Exception as error:
            fills, why = None, str(error) or type(error).__name__
        config = configs.get(adapter) if isinstance(configs, Mapping) else None
        tuner = kind.__module__ + "." + kind.__qualname__ if config is None else type(config).__name__
        trials.append(MergeTrial(tuner, adapter, tuple(next(iter(each.values())) for _, each in layers), fills, why))
    return trials


@torch.no_grad()
def _fills_zeros(layer: BaseTunerLayer, parameters: list[str], adapter: str) -> tuple[bool | None, str]:
    """Return whether merging `adapter` into a copy of `layer` fills zeros of these parameters of its base layer.

    None if this cannot be tried, and why.

    Raises:
        NotImplementedError: the layer cannot be merged.
    """
    module: Any = layer
    if type(module).merge is BaseTunerLayer.merge:
        raise NotImplementedError
    if has_shards(module) or any(parameter.is_meta for parameter in module.parameters()):
        return None, "the weights of these layers are not in the memory of this process as a whole."
    device = next(module.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        # PEFT warns of what merging does to the model, which is not merged.
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        trial = copy.deepcopy(module)
        if trial.merged:
            trial.unmerge()
        for tensor in _tensors_of(trial, adapter):
            tensor.data = torch.randn_like(tensor, dtype=torch.float32).mul_(0.1).to(tensor.dtype)
        zeros = _zeros_of(trial.get_base_layer(), parameters)
        trial.merge(adapter_names=[adapter])
        # A merge may put another layer in the place of the base layer.
        return _zeros_of(trial.get_base_layer(), parameters) < zeros, ""


def _zeros_of(base: nn.Module, parameters: list[str]) -> int:
    if isinstance(base, PRUNABLE_LAYERS):
        # They may be quantised.
        return count_zeros({name: WeightView(base, name) for name in parameters})[0]
    return sum(int((base.get_parameter(name) == 0).sum()) for name in parameters)


def _tensors_of(layer: BaseTunerLayer, adapter: str) -> Iterator[Tensor]:
    """Yield the floating-point tensors that `adapter` trains in `layer`."""
    for name in layer.adapter_layer_names:
        container: Any = getattr(layer, name, None)
        if container is None or not hasattr(container, "__contains__") or adapter not in container:
            continue
        held = container[adapter]
        found = held.parameters() if isinstance(held, nn.Module) else [held]
        yield from (tensor for tensor in found if isinstance(tensor, Tensor) and tensor.is_floating_point())
