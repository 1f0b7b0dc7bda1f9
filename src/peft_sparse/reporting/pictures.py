"""Which pictures a report has: heat maps by layer and depth, stages, regions, and values over time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .charts import BarChart, HeatMap, LineChart, bar_chart, heat_map, line_chart
from .facts_shown import texts_of
from .places import by_place
from .scales import of_size, of_time
from .schema import RunReport


# Sparsities that differ by less are one number and no picture.
SAME = 0.01
# The values of a log history that are drawn: key, title of the picture, name of the line.
_LOGGED = (
    ("loss", "loss", "training"),
    ("eval_loss", "loss", "evaluation"),
    ("learning_rate", "learning rate", "learning rate"),
    ("sparsity", "sparsity", "sparsity"),
    ("pruning", "sparsity", "after pruning"),
    ("grad_norm", "norm of the gradient", "norm of the gradient"),
)


def of_stages(report: RunReport) -> list[BarChart]:
    """Return perplexity on each text, time and memory by stage."""
    texts = texts_of(report)
    found = []
    for text in texts:
        values = {stage.name: stage.perplexity[text] for stage in report.stages if text in stage.perplexity}
        title = "perplexity" if len(texts) == 1 else f"perplexity, {text}"
        found.append(bar_chart(title, values, {n: f"{v:.2f}" for n, v in values.items()}) if len(values) > 1 else None)
    times = {stage.name: stage.seconds for stage in report.stages if stage.seconds}
    memory = {s.name: float(s.peak_memory_bytes) for s in report.stages if s.peak_memory_bytes}
    if len(times) > 1:
        found.append(bar_chart("time", times, {name: of_time(value) for name, value in times.items()}))
    if len(memory) > 1:
        title = "peak memory up to the end of each stage"
        found.append(bar_chart(title, memory, {name: of_size(value) for name, value in memory.items()}))
    return [chart for chart in found if chart is not None]


def of_matrices(report: RunReport) -> list[HeatMap]:
    """Return sparsity and output errors of all matrices, one picture for each stack of blocks."""
    found: list[HeatMap | None] = []
    if report.pruning:
        weights = report.pruning.weights
        shares = [weight.sparsity for weight in weights]
        if shares and max(shares) - min(shares) > SAME:
            found += _maps({"sparsity": [(weight.name, weight.sparsity) for weight in weights]})
        selected = [(weight.name, weight.error_selected) for weight in weights]
        errors = [(weight.name, weight.error) for weight in weights]
        found += _maps({"output error before refinement and update": selected, "output error": errors})
    if report.residual:
        corrected = report.residual.weights
        without = [(weight.name, weight.error_pruned) for weight in corrected]
        errors = [(weight.name, weight.error) for weight in corrected]
        found += _maps({"output error without the correction": without, "output error with the correction": errors})
    if report.structured:
        layers = report.structured.layers
        removed = [(layer.name, 1 - layer.kept / layer.units) for layer in layers]
        found += _maps({"fraction of units removed": removed}, (0.0, 1.0))
    return [each for each in found if each is not None]


def _maps(
    values: Mapping[str, Sequence[tuple[str, float | None]]], bounds: tuple[float, float] | None = None
) -> list[HeatMap | None]:
    """Return one picture per title and stack. Those of one stack have the same colours, so that they compare."""
    places = {title: by_place(pairs) for title, pairs in values.items()}
    found = []
    for title, stacks in places.items():
        for stack, kinds in stacks.items():
            all_kinds = [each for other in places.values() for each in other.get(stack, {}).values()]
            finite = [value for each in all_kinds for value in each.values() if math.isfinite(value)]
            common = bounds or ((min(finite), max(finite)) if finite else None)
            found.append(heat_map(f"{title}, {stack}" if len(stacks) > 1 and stack else title, kinds, common))
    return found


def of_regions(report: RunReport) -> LineChart | None:
    """Return the errors of all regions before and after the fit."""
    if report.reconstruction is None or not report.reconstruction.regions:
        return None
    regions = report.reconstruction.regions
    return line_chart(
        "error before and after the fit",
        "region",
        {
            "pruned": [(float(i), region.error_pruned) for i, region in enumerate(regions)],
            "fitted": [(float(i), region.error) for i, region in enumerate(regions)],
        },
        names=[region.name for region in regions],
        from_zero=True,
    )


def over_time(entries: tuple[Mapping[str, Any], ...]) -> list[LineChart]:
    """Return what one training logged over its steps: loss, learning rate, sparsity."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key, title, name in _LOGGED:
        points = {float(entry["step"]): float(entry[key]) for entry in entries if key in entry and "step" in entry}
        if points and not (key == "pruning" and len(points) == 1):
            series.setdefault(title, {})[name] = sorted(points.items())
    found = [line_chart(title, "step", lines) for title, lines in series.items()]
    return [chart for chart in found if chart is not None]
