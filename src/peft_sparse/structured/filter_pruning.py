"""prune_structured for filters: scores the filters of convolutions and writes zeros over whole units."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..calibration.inputs import evaluation_mode, in_words, model_arguments
from ..calibration.statistics import Statistics
from ..model.blocks import Targets, base_model, called_layers
from ..model.environment import peak_memory
from ..model.processes import add_up, share_of, working_together
from ..model.weights import WeightView, check_finite, input_rows
from .filter_inputs import output_of, traced_on_image
from .filter_metrics import FILTER_METRICS, FilterMetric, scores_of_units
from .filters import Filters, FilterSet, Part, check_filters, chosen_filters
from .proof import is_close
from .report import StructuredReport, UnitsReport
from .selection import ScoredUnits, Structure, select_units


def prune_filters(
    model: nn.Module,
    ratio: float,
    inputs: list[dict[str, Any]],
    targets: tuple[Targets, Targets],
    metric: str,
    structure: Structure,
) -> StructuredReport:
    """Write zeros over whole filters. The arguments are those of `prune_structured`; `inputs` may be empty."""
    started = time.perf_counter()
    check_filters(model)
    found, batch = traced_on_image(model, inputs)
    filters = chosen_filters(model, found, *targets)
    layers = {part.name: WeightView(part.layer) for part in filters.parts if part.role != "norm"}
    check_finite(layers)
    rule = FILTER_METRICS[metric]
    _check_norms(filters, rule)
    select_units([_scored(own, torch.zeros(len(own.units))) for own in filters.sets], ratio, structure)
    prove_filters(model, filters, batch)
    norms = _input_norms(model, _rows_of_sets(filters), inputs) if rule.needs_inputs else {}
    unread = filters.unread()
    scored = [_scored(own, _scores(own, filters, rule, norms), unread) for own in filters.sets]
    masks = select_units(scored, ratio, structure)
    removed = {
        unit
        for own, mask in zip(filters.sets, masks, strict=True)
        for unit, kept in zip(own.units, mask.tolist(), strict=True)
        if not kept
    }
    parameters = dict(base_model(model).named_parameters())
    for name, values in filters.zeroed(removed).items():
        parameters[name].detach().copy_(values)
    return StructuredReport(
        metric=metric,
        structure=structure,
        ratio=ratio,
        compensated=False,
        parameters_added=0,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        layers=tuple(_report(own, mask, filters) for own, mask in zip(filters.sets, masks, strict=True)),
        left_out=filters.left_out,
    )


def prove_filters(model: nn.Module, filters: Filters, batch: dict[str, Any]) -> None:
    """Check that units of `filters` can be removed without a change of what the others compute. No weight is changed.

    The model is run twice without every second unit of each set. In the first run only the layers that read these
    units do not receive them. In the second run the model has the weights that pruning would write: zeros in the
    filters, in the normalisations and in the input channels. Both must return the same.

    Args:
        model: the model.
        filters: its filters.
        batch: model inputs, on the device of the model.

    Raises:
        ValueError: the two runs return something else.
    """
    removed = {unit for own in filters.sets for unit in own.units[1::2]}
    with _not_received(model, filters, removed):
        unread = output_of(model, batch)
    zeroed = output_of(model, batch, filters.zeroed(removed))
    if len(unread) != len(zeroed) or not all(map(is_close, unread, zeroed)):
        raise ValueError(
            "Expected filters that can be removed one by one, but the model computes something else after zeros were "
            "written into some of them. The reason may be a layer that computes its weight from all its entries, such "
            "as a convolution with weight standardisation, or a tensor that is changed in place by its own code. "
            "Leave such layers out with `exclude_modules`, or call `prune`. Nothing was changed."
        )


@contextlib.contextmanager
def _not_received(model: nn.Module, filters: Filters, removed: set[int]) -> Iterator[None]:
    """Within the context, the layers that read units in `removed` receive zeros in their place."""

    def receive(gone: Tensor, dim: int, module: nn.Module, args: Any) -> Any:
        return (args[0].index_fill(args[0].dim() + dim, gone.to(args[0].device), 0), *args[1:])

    called = called_layers(model)
    with contextlib.ExitStack() as hooks:
        for part in filters.parts:
            if part.role == "columns":
                conv = isinstance(part.layer, nn.Conv2d)
                units = part.units * (getattr(part.layer, "groups", 1) if conv else 1)
                gone = torch.tensor([place for place, unit in enumerate(units) if unit in removed], dtype=torch.long)
                hook = partial(receive, gone, -3 if conv else -1)
                hooks.callback(called[id(part.layer)].register_forward_pre_hook(hook).remove)
        yield


def _rows_of_sets(filters: Filters) -> dict[str, Part]:
    """Return the rows of every convolution that has filters of a unit, by name."""
    convs = {name for own in filters.sets for name in own.convs}
    return {part.name: part for part in filters.parts if part.role == "rows" and part.name in convs}


def _norms_of(own: FilterSet, filters: Filters) -> list[Part]:
    """Return the normalisations with weights that scale all units of a set."""
    return [
        part
        for part in filters.parts
        if part.role == "norm" and getattr(part.layer, "weight", None) is not None and {*own.units} <= {*part.units}
    ]


def _check_norms(filters: Filters, rule: FilterMetric) -> None:
    for own in filters.sets if rule.of_norms else ():
        if not _norms_of(own, filters):
            raise ValueError(
                f'`metric="bn_scale"` needs a normalisation with weights after each convolution, and {own.name!r} has '
                'none. Leave this convolution out with `exclude_modules`, or use another metric, such as "l1".'
            )


@torch.no_grad()
def _scores(own: FilterSet, filters: Filters, rule: FilterMetric, norms: dict[str, Tensor]) -> Tensor:
    places = {unit: place for place, unit in enumerate(own.units)}
    rows = _rows_of_sets(filters)
    parts = _norms_of(own, filters) if rule.of_norms else [rows[name] for name in own.convs]
    scores = []
    for part in parts:
        layer: Any = part.layer
        weight = layer.weight.detach()
        if rule.needs_inputs:
            groups = zip(weight.flatten(1).chunk(layer.groups), norms[part.name].to(weight.device), strict=True)
            values = torch.cat([rule.score(group, Statistics(input_norm=norm)) for group, norm in groups])
        else:
            values = rule.score(weight.flatten(1) if weight.dim() > 1 else weight[:, None], Statistics())
        scores.append((values, [places.get(unit, -1) for unit in part.units]))
    return scores_of_units(scores, len(own.units), rule.normalised)


def _scored(own: FilterSet, scores: Tensor, unread: set[int] | None = None) -> ScoredUnits:
    """Return the scores of a set; they are -inf for units that no layer reads."""
    gone = torch.tensor([unit in (unread or ()) for unit in own.units])
    return ScoredUnits(own.name, "filters", scores.masked_fill(gone, -torch.inf), own.filters)


def _input_norms(model: nn.Module, rows: dict[str, Part], inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return ||X_j||_2 of the patches of every convolution, (groups, in / groups · k · k)."""
    sums: dict[str, Tensor] = {}
    hooks = contextlib.ExitStack()

    def add(name: str, module: nn.Module, args: Any) -> None:
        patches = input_rows(module, args[0].detach())
        sums[name] += (patches if patches.dim() == 3 else patches[None]).float().square().sum(1)

    for name, part in rows.items():
        layer: Any = part.layer
        sums[name] = torch.zeros(layer.groups, layer.weight[0].numel(), device=layer.weight.device)
        hooks.callback(layer.register_forward_pre_hook(partial(add, name)).remove)
    inner = base_model(model)
    what = f"the inputs of {len(rows)} convolutions by {in_words(inputs)}"
    with hooks, evaluation_mode(model), working_together(what):
        for batch in share_of(inputs):
            inner(**send_to_device(model_arguments(model, batch), next(iter(sums.values())).device))
        add_up(list(sums.values()))
    for name, values in sums.items():
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"Expected finite inputs of {name!r} on the calibration data, got NaN or infinity. Check the "
                "calibration data, or run the model in float32 or bfloat16."
            )
    return {name: values.sqrt() for name, values in sums.items()}


def _report(own: FilterSet, mask: Tensor, filters: Filters) -> UnitsReport:
    units = {*own.units}
    # The rows and the entries of normalisations. The columns of a layer are counted with its own rows.
    size = sum(
        getattr(part.layer, name).numel() * sum(unit in units for unit in part.units) // len(part.units)
        for part in filters.parts
        if part.role != "columns"
        for name in part.parameters()
        if isinstance(getattr(part.layer, name), nn.Parameter)
    )
    gone = tuple(place for place, kept in enumerate(mask.tolist()) if not kept)
    return UnitsReport(own.name, "filters", len(own.units), int(mask.sum()), own.filters, size // len(own.units), gone)
