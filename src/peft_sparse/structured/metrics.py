"""Metrics of structured pruning: (W, statistics) -> one number per input channel of an output projection.

Pure functions of one signature; `standardised` and `unit_scores` make channels of different layers comparable.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Statistics


def ifv(weight: Tensor, statistics: Statistics) -> Tensor:
    """S_j = Var(X_j) over tokens, (in,). Input feature variance, An et al. 2023, arXiv:2312.11983."""
    assert statistics.input_variance is not None, "the calibration engine supplies what a metric needs"
    return statistics.input_variance


def wifv(weight: Tensor, statistics: Statistics) -> Tensor:
    """S_j = Var(X_j) · ||W_:j||_2², (in,): FLAP's fluctuation metric. An et al. 2023, arXiv:2312.11983."""
    return ifv(weight, statistics) * weight.float().square().sum(0)


def wifn(weight: Tensor, statistics: Statistics) -> Tensor:
    """S_j = mean_i |W_ij| · ||X_j||_2, (in,): weighted input feature norm. An et al. 2023, arXiv:2312.11983."""
    assert statistics.input_norm is not None, "the calibration engine supplies what a metric needs"
    return weight.abs().float().mean(0) * statistics.input_norm


def magnitude_sp(weight: Tensor, statistics: Statistics) -> Tensor:
    """S_j = ||W_:j||_2, (in,)."""
    return torch.linalg.vector_norm(weight.float(), dim=0)


@dataclass(frozen=True)
class Metric:
    """How a metric is used.

    Args:
        score: (W (out, in), `Statistics`) -> (in,), higher = kept.
        needs_inputs: whether it needs calibration.
        squared_in_attention: whether the score of an attention's channels is squared.
    """

    score: Callable[[Tensor, Statistics], Tensor]
    needs_inputs: bool = True
    squared_in_attention: bool = False


# The authors' code squares what it takes of attention, which their paper does not say; its numbers are published so.
METRICS = {
    "wifv": Metric(wifv, squared_in_attention=True),
    "wifn": Metric(wifn, squared_in_attention=True),
    "ifv": Metric(ifv, squared_in_attention=True),
    "wanda_sp": Metric(wifn),
    "magnitude_sp": Metric(magnitude_sp, needs_inputs=False),
}


def standardised(channels: Tensor) -> Tensor:
    """Return (S - mean(S)) / std(S) over the channels of one layer, std unbiased; 0 where all are equal."""
    centred = channels - channels.mean()
    deviation = centred.square().sum().div(max(len(channels) - 1, 1)).sqrt()
    return centred / deviation if deviation > 0 else torch.zeros_like(centred)


def unit_scores(channels: Tensor, count: int) -> Tensor:
    """Return the mean over each unit's channels, (count,), of the standardised channels (in,) of one layer."""
    return standardised(channels).view(count, -1).mean(1)
