"""Running statistics of norms, which training changes and an adapter does not hold, unless it trains the norms.

The mean and variance of a BatchNorm are buffers of the base model. A forward pass in training mode changes them, also
where all weights are frozen. `model` remembers them when an adapter is attached, and `proof` compares them when it is
saved.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..model.blocks import base_model
from .config import SparseLoraConfig


logger = logging.getLogger(__name__)


def remember_statistics(model: nn.Module, config: SparseLoraConfig) -> None:
    """Note the running statistics of `model` in the configuration of an adapter that was just attached."""
    config._statistics = {name: tensor.clone() for name, tensor in _statistics(model)}


def warn_of_statistics(model: nn.Module, config: SparseLoraConfig, adapter_name: str) -> None:
    """Log a warning, once, if running statistics that are not saved with the adapter have changed since it came.

    Args:
        model: the model with adapters.
        config: configuration of the adapter.
        adapter_name: name of the adapter.
    """
    known = config._statistics
    changed = [name for name, now in _statistics(model) if name in known and _differs(known[name], now)]
    if not changed:
        return
    logger.warning(
        "The running statistics of %d norms (first %r) have changed since the adapter %r was attached. It is saved "
        "without them, so that it computes something else when it is loaded. Train with `train_norms=True`, or save "
        "the merged model.",
        len(changed),
        changed[0],
        adapter_name,
    )
    config._statistics = {}


def _statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and running mean of each norm of the base model. The copies of `modules_to_save` are left out."""
    for name, module in base_model(model).named_modules():
        mean = module._buffers.get("running_mean")
        if mean is not None and not mean.is_meta and ".modules_to_save." not in f".{name}.":
            yield name.replace(".original_module", ""), mean


def _differs(before: Tensor, now: Tensor) -> bool:
    return not torch.equal(before.to(now), now)
