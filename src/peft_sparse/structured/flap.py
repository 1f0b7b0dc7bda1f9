"""prune_structured: measures the dense model, ranks heads and neurons, writes zeros and compensates for their means.

The result is an ordinary model whose zeros tell what was removed: tuners and reconstruction keep them, `compact` cuts
them out.
"""

import time
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.activations import Activations, check_activations
from ..calibration.inputs import Calibration, as_inputs, evaluation_mode, in_words
from ..calibration.measure import measured_blocks
from ..calibration.runner import Residence, on_device
from ..calibration.statistics import Statistics
from ..model.blocks import base_model
from ..model.environment import peak_memory
from ..model.processes import working_together
from ..model.weights import WeightView, check_finite
from .metrics import METRICS, unit_scores
from .report import StructuredReport, UnitsReport
from .saving import make_savable
from .selection import ScoredUnits, Structure, check_structure, select_units
from .units import Units, check_loaded, find_units


Target = Literal["all", "attention", "mlp"]


def prune_structured(
    model: nn.Module,
    ratio: float,
    *,
    metric: str = "wifv",
    structure: Structure = "al-am",
    attention_ratio: float | None = None,
    target: Target = "all",
    calibration: Calibration | None = None,
    compensate: bool = True,
    batch_size: int = 1,
    activations: Activations = "device",
    device: torch.device | str | None = None,
) -> StructuredReport:
    """Write zeros over whole attention heads and MLP neurons, as FLAP does. In place.

    With W (out, in) the output projection of an attention or MLP, S_j the metric of its input channel j:

        z_j = (S_j - mean(S)) / std(S) over the channels of the layer; a unit scores the mean of its channels' z
        b  += W (μ ⊙ (1 - m)), with μ_j the mean of X_j over tokens, m the mask, W before zeroing: `compensate`

    All is measured on the dense model, by all processes of a group together as in `prune`, and zeros are written at
    the end. Units are neurons, and KV groups: a key and a value head with all its query heads, so that `compact` can
    cut every unit out. Of units with equal score those in front go first; units whose columns of W are zero already
    go before all others.

    At least `ratio` of the parameters of all units goes, heads and neurons counted with what they cost, biases
    included; in excess less than any unit removed costs, of the whole, or of a layer for "ul-*". Every attention and
    every MLP keeps one unit. An et al. 2023, "Fluctuation-based Adaptive Structured Pruning", arXiv:2312.11983.

    Differences to the authors' code: variances are means over tokens, for any batch size; heads are weighed by their
    true cost; biases are added to those there are; grouped-query attention of any shape.

    Args:
        ratio: fraction of the parameters of all heads and neurons that goes, in [0, 1).
        metric: "wifv" (FLAP), "wifn", "ifv"; "wanda_sp" and "magnitude_sp", the baselines of the paper.
        structure: "al-am" compares all units; "al-mm", "ul-mm", "ul-um" as `select_units` says. Only "ul-*" leaves
            every layer as wide as the next.
        attention_ratio: for "*-mm", the fraction of the heads' parameters that goes at most; `ratio` by default.
        target: "attention" or "mlp" alone, or "all"; `ratio` is then of those.
        calibration, batch_size, activations, device: as for `prune`; "magnitude_sp" without `compensate` needs none.
        compensate: add what removed channels contribute on average to the bias, which is created where there is none.
            The configuration is changed along, so that `save_pretrained` keeps it.

    Raises:
        ValueError: an argument out of its range; a model whose units cannot be told, or with adapters; a layer that
            would lose its last unit; missing calibration; weights or statistics that are not finite.
    """
    started = time.perf_counter()
    _check_arguments(ratio, metric, structure, attention_ratio, target, compensate, calibration)
    check_activations(activations)
    sets = [units for units in find_units(model) if target in ("all", units.kind)]
    check_loaded(sets)
    check_finite({name: WeightView(layer) for units in sets for name, layer in units.named_layers().items()})
    # Whether the ratio can be reached depends on no score, and is better known before calibration than after.
    select_units([_unscored(units) for units in sets], ratio, structure, attention_ratio)
    statistics: dict[str, Statistics] = {}
    if calibration is not None:
        inputs = as_inputs(model, calibration, batch_size)
        statistics = _measured(model, sets, inputs, activations, on_device(device))
    scored = [_score(units, metric, statistics.get(units.output_name, Statistics())) for units in sets]
    masks = select_units(scored, ratio, structure, attention_ratio)
    size = _parameters(model)
    for units, mask in zip(sets, masks, strict=True):
        if compensate:
            _compensate(units, mask, statistics[units.output_name])
        _write_zeros(units, mask)
    if _parameters(model) > size and isinstance(base_model(model), PreTrainedModel):
        make_savable(base_model(model))
    return StructuredReport(
        metric=metric,
        structure=structure,
        ratio=ratio,
        compensated=compensate,
        parameters_added=_parameters(model) - size,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        layers=tuple(
            UnitsReport(units.name, units.kind, units.count, int(mask.sum()), units.heads_per_unit, score.cost)
            for units, mask, score in zip(sets, masks, scored, strict=True)
        ),
    )


def _measured(
    model: nn.Module, sets: list[Units], inputs: list[dict[str, Any]], activations: Activations, residence: Residence
) -> dict[str, Statistics]:
    """Return the statistics of every output layer's inputs in the dense model, by name."""

    def inside(block: str) -> dict[str, WeightView]:
        return {units.output_name: WeightView(units.output) for units in sets if units.block == block}

    what = f"{len(sets)} layers' units by {in_words(inputs)}"
    with evaluation_mode(model), working_together(what):
        measured = measured_blocks(model, inputs, inside, ("inputs", "moments"), activations, residence)
        return {name: block.of(name) for name, block in measured}


@torch.no_grad()
def _score(units: Units, metric: str, statistics: Statistics) -> ScoredUnits:
    """Return the score of every unit, -inf for those that are gone already."""
    rule, weight = METRICS[metric], units.output.weight.detach()
    channels = rule.score(weight, _moved(statistics, weight.device))
    if rule.squared_in_attention and units.kind == "attention":
        channels = channels.square()
    gone = ~(weight != 0).any(0).view(units.count, -1).any(1)
    scores = unit_scores(channels, units.count).masked_fill(gone, -torch.inf)
    return ScoredUnits(units.block, units.kind, scores.cpu(), units.cost)


def _unscored(units: Units) -> ScoredUnits:
    return ScoredUnits(units.block, units.kind, torch.zeros(units.count), units.cost)


def _moved(statistics: Statistics, device: torch.device) -> Statistics:
    """Return what metrics use, where the weight is; it was measured where the block ran."""
    names = ("input_norm", "input_mean", "input_variance")
    there = {name: getattr(statistics, name) for name in names if getattr(statistics, name) is not None}
    return Statistics(tokens=statistics.tokens, **{name: value.to(device) for name, value in there.items()})


@torch.no_grad()
def _compensate(units: Units, mask: Tensor, statistics: Statistics) -> None:
    """Add W (μ ⊙ (1 - m)) to the bias of the output layer, which is created where there is none."""
    layer = units.output
    mean = _moved(statistics, layer.weight.device).input_mean
    assert mean is not None
    lost = layer.weight.float() @ (mean.float() * ~units.columns_of(mask).to(mean.device))
    if not lost.any():
        return
    if layer.bias is None:
        layer.bias = nn.Parameter(lost.to(layer.weight.dtype), layer.weight.requires_grad)
    else:
        layer.bias.copy_(layer.bias.float() + lost)


@torch.no_grad()
def _write_zeros(units: Units, mask: Tensor) -> None:
    mask = mask.to(units.output.weight.device)
    for layer in units.layers:
        gone = ~units.rows_of(layer, mask)
        layer.weight[gone] = 0
        if layer.bias is not None:
            layer.bias[gone] = 0
    units.output.weight[:, ~units.columns_of(mask)] = 0


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_arguments(
    ratio: float,
    metric: str,
    structure: str,
    attention_ratio: float | None,
    target: str,
    compensate: bool,
    calibration: Calibration | None,
) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"`ratio` must be in [0, 1), got {ratio}. Use 0.2 to remove a fifth of heads and neurons.")
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(map(repr, METRICS))}, got {metric!r}.")
    check_structure(structure, attention_ratio)
    if target not in get_args(Target):
        raise ValueError(f"`target` must be one of {', '.join(map(repr, get_args(Target)))}, got {target!r}.")
    if calibration is None and (METRICS[metric].needs_inputs or compensate):
        what = (
            f"Metric {metric!r} measures" if METRICS[metric].needs_inputs else "`compensate=True` needs the means of"
        )
        raise ValueError(
            f"{what} the inputs of each layer: pass `calibration`, token ids of shape (sequences, tokens) or an "
            'iterable of model inputs, or use `metric="magnitude_sp", compensate=False`.'
        )
