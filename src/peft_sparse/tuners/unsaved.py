"""What the file of an adapter needs and the state dict of its model lacks, and what the file cannot hold.

The mean and variance of a BatchNorm are buffers of the base model, unless the adapter trains the norms. A forward pass
in training mode changes them, also where all weights are frozen. And a user may unfreeze weights of the base model.
`model` remembers the statistics when an adapter is attached, and looks for both when it is saved.

A state dict holds merged weights while adapters are merged, and no values where accelerate has offloaded them.
"""

import logging
from collections.abc import Container, Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..model.blocks import base_model
from ..model.offload import is_offloaded, loaded_layer
from .base_weight import adapted_parameter
from .config import SparseLoraConfig
from .layer import SparseLoraLayer


logger = logging.getLogger(__name__)


def remember_statistics(model: nn.Module, config: SparseLoraConfig) -> None:
    """Note the running statistics of `model` in the configuration of an adapter that was just attached."""
    config._statistics = {name: mean.clone() for name, mean in _running_means(model)}


def unmerged_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base weights in `state_dict` into which adapters are merged, as they were before, by their names."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = {}
    for layer in model.modules():
        if isinstance(layer, SparseLoraLayer) and layer.merged_adapters and layer.quantization_backend is None:
            key = f"{paths[id(layer.get_base_layer())]}.{adapted_parameter(layer)}"
            if key in state_dict:
                found[key] = layer._stored_unmerged().detach()
    return found


def offloaded_values(model: nn.Module, prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what an adapter saves and `state_dict` has on the meta device, because accelerate has offloaded it.

    Args:
        model: the model with adapters.
        prefix: what the names of the factors hold.
        state_dict: the state dict of `model`.
    """
    found = {}
    for key, tensor in state_dict.items():
        owner, _, name = key.rpartition(".")
        if tensor.is_meta and (f".{prefix}" in key or ".modules_to_save." in key):
            module = model.get_submodule(owner)
            if is_offloaded(module):
                with loaded_layer(module):
                    found[key] = getattr(module, name).detach().cpu().clone()
    return found


def warn_of_unsaved(model: nn.Module, config: SparseLoraConfig, adapter_name: str, saved: Container[str]) -> None:
    """Log a warning if running statistics have changed, or base weights are trained, that are not saved.

    It tells of changed statistics once.

    Args:
        model: the model with adapters.
        config: configuration of the adapter.
        adapter_name: name of the adapter.
        saved: the names of the tensors that are saved, as `model` has them.
    """
    known = config._statistics
    changed = [name for name, now in _running_means(model) if name in known and _differs(known[name], now)]
    trained = [name for name in _trained_names(model) if name not in saved]
    if changed:
        config._statistics = {}
        _warn(changed, "running statistics of norms have changed since it was attached", adapter_name)
    if trained:
        _warn(trained, "parameters of the base model are trained beside it", adapter_name)


def _warn(names: list[str], what: str, adapter_name: str) -> None:
    logger.warning(
        "The adapter %r is saved without what training changes in the base model, so that it computes something else "
        "when it is loaded: %d %s (first %r). Train norms by `train_norms=True` and other modules by "
        "`modules_to_save`, or save the merged model.",
        adapter_name,
        len(names),
        what,
        names[0],
    )


def _running_means(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and running mean of each norm of the base model. The copies of `modules_to_save` are left out."""
    for name, module in base_model(model).named_modules():
        mean = module._buffers.get("running_mean")
        if mean is not None and not mean.is_meta and ".modules_to_save." not in f".{name}.":
            yield name.replace(".original_module", ""), mean


def _differs(before: Tensor, now: Tensor) -> bool:
    return not torch.equal(before.to(now), now)


def _trained_names(model: nn.Module) -> Iterator[str]:
    """Yield the names of the trained parameters of `model` that belong to no adapter."""
    of_adapters: set[int] = set()
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            own = {id(parameter) for parameter in module.parameters()}
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            of_adapters |= own - {id(parameter) for parameter in base.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in of_adapters:
            yield name
