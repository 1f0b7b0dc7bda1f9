"""Metrics of structured pruning: (W, statistics) -> one number per input channel of an output projection.

All metrics are pure functions of one signature. `unit_scores` makes the channels of different layers comparable.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Statistics


def ifv(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return S_j = Var(X_j) over tokens, (in,): the input feature variance. An et al. 2023, arXiv:2312.11983."""
    assert statistics.input_variance is not None, "calibration measures what the metric needs"
    return statistics.input_variance


def wifv(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return S_j = Var(X_j) · ||W_:j||_2², (in,): FLAP's fluctuation metric. An et al. 2023, arXiv:2312.11983."""
    return ifv(weight, statistics) * weight.float().square().sum(0)


def wifn(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return S_j = mean_i |W_ij| · ||X_j||_2, (in,): the weighted input norm. An et al. 2023, arXiv:2312.11983."""
    assert statistics.input_norm is not None, "calibration measures what the metric needs"
    return weight.abs().float().mean(0) * statistics.input_norm


def magnitude_sp(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return S_j = ||W_:j||_2, (in,). It needs no calibration."""
    return torch.linalg.vector_norm(weight.float(), dim=0)


@dataclass(frozen=True)
class Metric:
    """A metric and how it is used.

    Args:
        score: function (W (out, in), `Statistics`) -> S (in,); channels with a higher number are kept.
        needs_inputs: whether the function needs statistics, and therefore calibration.
        squared_in_attention: whether S is squared for the output projection of an attention.
    """

    score: Callable[[Tensor, Statistics], Tensor]
    needs_inputs: bool = True
    squared_in_attention: bool = False


# The authors' code squares the metric for attention. The paper does not mention this, but its numbers include it.
METRICS = {
    "wifv": Metric(wifv, squared_in_attention=True),
    "wifn": Metric(wifn, squared_in_attention=True),
    "ifv": Metric(ifv, squared_in_attention=True),
    "wanda_sp": Metric(wifn),
    "magnitude_sp": Metric(magnitude_sp, needs_inputs=False),
}


def standardised(channels: Tensor) -> Tensor:
    """Return (S - mean(S)) / std(S) over the channels of one layer, with the unbiased std; 0 if all are equal."""
    centred = channels - channels.mean()
    deviation = centred.square().sum().div(max(len(channels) - 1, 1)).sqrt()
    return centred / deviation if deviation > 0 else torch.zeros_like(centred)


def unit_scores(channels: Tensor, count: int) -> Tensor:
    """Return the score of each unit of one layer, (count,): the mean of its standardised channels.

    Args:
        channels: the metric S (in,) of the output projection.
        count: number of units; each has in / count consecutive channels.
    """
    return standardised(channels).view(count, -1).mean(1)
