"""Metrics of filters: (W, statistics) -> one number per filter.

All metrics are pure functions of one signature. `scores_of_units` makes the filters of different convolutions
comparable.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.statistics import Statistics


def l1(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return S_f = Σ_j |W_fj|, (filters,). Li et al. 2016, arXiv:1608.08710."""
    return weight.float().abs().sum(1)


def l2(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return S_f = ||W_f:||_2, (filters,). He et al. 2018, arXiv:1808.06866."""
    return torch.linalg.vector_norm(weight.float(), dim=1)


def geometric_median(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return S_f = Σ_g ||W_f: - W_g:||_2, (filters,): how far a filter is from all others.

    The filter with the smallest sum is the one nearest to the geometric median of the filters. He et al. 2018 (FPGM),
    arXiv:1811.00250.
    """
    return torch.cdist(weight.float(), weight.float(), compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def bn_scale(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return S_f = |γ_f|, (filters,), for the weights γ (filters, 1) of a normalisation. Liu et al. 2017 (Network
    Slimming), arXiv:1708.06519.
    """
    return weight.float().abs().sum(1)


def wanda(weight: Tensor, statistics: Statistics) -> Tensor:
    """Return S_f = Σ_j |W_fj| · ||X_j||_2, (filters,): Wanda's scores (Sun et al. 2023, arXiv:2306.11695), summed."""
    assert statistics.input_norm is not None, "calibration measures what the metric needs"
    return weight.float().abs() @ statistics.input_norm


@dataclass(frozen=True)
class FilterMetric:
    """A metric of filters and how it is used.

    Args:
        score: function (W (filters, in · k · k), `Statistics`) -> S (filters,); filters with a higher number are kept.
            If it needs inputs, it gets the filters of one group of a convolution at a time.
        needs_inputs: whether the function needs statistics, and therefore calibration.
        of_norms: whether W is the weight γ (filters, 1) of the normalisations that scale the filters.
        normalised: whether S is divided by its mean over the filters of a convolution.
    """

    score: Callable[[Tensor, Statistics], Tensor]
    needs_inputs: bool = False
    of_norms: bool = False
    normalised: bool = True


FILTER_METRICS = {
    "l1": FilterMetric(l1),
    "l2": FilterMetric(l2),
    "fpgm": FilterMetric(geometric_median),
    # Network Slimming compares the scales of all layers as they are.
    "bn_scale": FilterMetric(bn_scale, of_norms=True, normalised=False),
    "wanda": FilterMetric(wanda, needs_inputs=True),
}


def scores_of_units(scores: Iterable[tuple[Tensor, list[int]]], count: int, normalised: bool) -> Tensor:
    """Return the score of each unit of one set, (count,): the mean over the layers that its filters are in.

    In each layer, a unit has the sum of the scores of its filters. If `normalised`, these are divided by their mean
    over the units of the layer. Fang et al. 2023 (DepGraph), arXiv:2301.12900, divide by the mean of the highest ones.

    Args:
        scores: for each layer S (filters,), and the unit of each filter, from 0. -1 is a filter of no unit.
        count: number of units.
        normalised: see above.
    """
    per_layer = []
    for values, units in scores:
        places = torch.tensor(units, device="cpu")
        own = torch.zeros(count, dtype=torch.float64, device="cpu")
        own.index_add_(0, places[places >= 0], values.double().cpu()[places >= 0])
        mean = own.mean()
        per_layer.append(own / mean if normalised and mean > 0 else own)
    return torch.stack(per_layer).mean(0)
