"""Pictures of a report as coordinates, which the template writes as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .places import short_names
from .scales import Scale, scale_of, spelled


# A picture is as wide as the screen of a phone, so that its text can be read there. It grows with its column.
WIDTH = 360
# A line of more points is thinned out: the picture is no wider than this, and the table would be longer than the page.
POINTS = 240
# The colours of a heat map are this many classes, in the style sheet `.q0` to `.q8`.
CLASSES = 9


@dataclass(frozen=True)
class Cell:
    """One rectangle of a heat map, with the number of its colour and the text that a pointer shows."""

    x: float
    y: float
    colour: int
    text: str


@dataclass(frozen=True)
class HeatMap:
    """A heat map of blocks and matrices, and its numbers for a table."""

    title: str
    about: str
    width: float
    height: float
    top: float
    cell: tuple[float, float]
    cells: list[Cell]
    columns: list[tuple[float, str]]
    rows: list[tuple[float, str]]
    legend: list[tuple[float, int]]
    low: str
    high: str
    head: list[str]
    table: list[list[str]]


@dataclass(frozen=True)
class Line:
    """A line of a chart: its path, and its points with texts if there are few."""

    name: str
    path: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class LineChart:
    """Lines over steps or regions, and their numbers for a table."""

    title: str
    about: str
    x_label: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    logarithmic: bool
    head: list[str]
    table: list[list[str]]
    marks: list[tuple[float, str]] = field(default_factory=list)
    width: float = WIDTH
    height: float = 190


@dataclass(frozen=True)
class Bar:
    """One row of a chart of dots or bars: where it is, how far it reaches, and its texts."""

    y: float
    x: float
    name: str
    value: str


@dataclass(frozen=True)
class BarChart:
    """Values by name, as bars from 0, or as dots on a logarithmic axis, which has no 0."""

    title: str
    about: str
    bars: list[Bar]
    start: float
    ticks: list[tuple[float, str]]
    logarithmic: bool
    width: float
    height: float


def heat_map(
    title: str, kinds: Mapping[str, Mapping[int, float]], bounds: tuple[float, float] | None = None
) -> HeatMap | None:
    """Return a heat map with one row per block and one column per kind of matrix. None if there is no finite value.

    Args:
        title: what is shown.
        kinds: {kind: {block: value}}.
        bounds: the values of the first and the last colour. By default the smallest and the largest value.
    """
    finite = [value for blocks in kinds.values() for value in blocks.values() if math.isfinite(value)]
    if not finite:
        return None
    low, high = bounds or (min(finite), max(finite))
    depths = sorted({depth for blocks in kinds.values() for depth in blocks})
    names = short_names(kinds)
    left, top = 40.0, 18.0 + 4.6 * max(len(name) for name in names.values())
    # Names are written at an angle, and the last one reaches beyond its column.
    beyond = max(2.0, 3.9 * len([*names.values()][-1]) - 10)
    wide, tall = max(22.0, (WIDTH - left - beyond) / len(kinds)), (16.0 if len(depths) <= 16 else 9.0)
    cells = [
        Cell(
            round(left + column * wide, 1),
            round(top + row * tall, 1),
            _class_of(value, low, high),
            f"{kind}, block {depth}: {spelled(value)}",
        )
        for column, (kind, blocks) in enumerate(kinds.items())
        for row, depth in enumerate(depths)
        if (value := blocks.get(depth)) is not None
    ]
    bottom = top + len(depths) * tall
    every = max(1, math.ceil(11 / tall)) if len(depths) <= 16 else 4
    highest = max(((v, k, d) for k, b in kinds.items() for d, v in b.items() if math.isfinite(v)), default=None)
    where = f"{highest[1]} of block {highest[2]}" if highest else ""
    return HeatMap(
        title=title,
        about=f"{title} of {len(kinds)} kinds of matrices in {len(depths)} blocks, from {spelled(min(finite))} to "
        f"{spelled(max(finite))}. The largest is that of {where}.",
        width=round(left + len(kinds) * wide + beyond, 1),
        height=round(bottom + 36, 1),
        top=round(top - 5, 1),
        cell=(round(wide - 1, 1), round(tall - 1, 1)),
        cells=cells,
        columns=[(round(left + (i + 0.5) * wide, 1), names[kind]) for i, kind in enumerate(kinds)],
        rows=[(round(top + (i + 0.5) * tall, 1), str(d)) for i, d in enumerate(depths) if not i % every],
        legend=[(round(left + i * 20, 1), i) for i in range(CLASSES)],
        low=spelled(low),
        high=spelled(high),
        head=["block", *names.values()],
        table=[[str(d), *(spelled(blocks.get(d)) for blocks in kinds.values())] for d in depths],
    )


def line_chart(
    title: str,
    x_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    names: Sequence[str] | None = None,
    from_zero: bool = False,
) -> LineChart | None:
    """Return a chart of lines. Values that are not finite are gaps. None if there is no finite value.

    Args:
        title: what is shown.
        x_label: what the x values count.
        series: points (x, y) by the name of the line, in order.
        names: names of the x values 0, 1, ..., which the texts of points and the table show instead of numbers.
        from_zero: whether the y axis begins at 0, if it is not logarithmic.
    """
    series = {name: _thinned(points) for name, points in series.items()}
    finite = [y for points in series.values() for _, y in points if math.isfinite(y)]
    if not finite:
        return None
    xs = sorted({x for points in series.values() for x, _ in points})
    x_scale = Scale(xs[0], xs[-1] if len(xs) > 1 else xs[0] + 1, 50, WIDTH - 8)
    y_scale = scale_of(finite, 158, 10, from_zero=from_zero)
    few = len(xs) <= 80
    lines = []
    for name, points in series.items():
        drawn = [(x_scale(x), y_scale(y), x, y) for x, y in points if math.isfinite(y)]
        texts = [(x, y, f"{name}, {_named(at, names, x_label)}: {spelled(value)}") for x, y, at, value in drawn]
        lines.append(Line(name, _path(points, x_scale, y_scale), texts if few else texts[-1:]))
    values = {name: dict(points) for name, points in series.items()}
    said = "; ".join(f"{name} from {spelled(p[0][1])} to {spelled(p[-1][1])}" for name, p in series.items() if p)
    return LineChart(
        title=title,
        about=f"{title} over {len(xs)} points of {x_label}s: {said}.",
        x_label=x_label,
        lines=lines,
        x_ticks=[(x, text) for x, text in x_scale.ticks if "." not in text],
        y_ticks=y_scale.ticks,
        logarithmic=y_scale.logarithmic,
        head=[x_label, *series],
        table=[[names[int(x)] if names else spelled(x), *(spelled(of.get(x)) for of in values.values())] for x in xs],
    )


def bar_chart(title: str, values: Mapping[str, float], texts: Mapping[str, str] | None = None) -> BarChart | None:
    """Return a chart with one row per name. None if there is no finite value.

    Args:
        title: what is shown.
        values: the value of each name.
        texts: how each value is written.
    """
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if not finite:
        return None
    said = {name: (texts or {}).get(name, spelled(value)) for name, value in values.items()}
    start = 12.0 + 6.2 * max(map(len, values))
    end = WIDTH - 16 - 6.2 * max(map(len, said.values()))
    scale = scale_of(finite.values(), start, end, from_zero=True)
    if not scale.logarithmic:
        scale = Scale(0.0, max(finite.values()) or 1.0, start, end)
    rows = [
        Bar(12.0 + 24 * row, scale(value) if name in finite else end, name, said[name])
        for row, (name, value) in enumerate(values.items())
    ]
    return BarChart(
        title=title,
        about=f"{title}: {', '.join(f'{name} {text}' for name, text in said.items())}.",
        bars=rows,
        start=start,
        ticks=scale.ticks if scale.logarithmic else [],
        logarithmic=scale.logarithmic,
        width=WIDTH,
        height=24.0 * len(rows) + (22 if scale.logarithmic else 4),
    )


def _class_of(value: float, low: float, high: float) -> int:
    if not math.isfinite(value):
        return CLASSES - 1
    share = (value - low) / (high - low) if high > low else 0.5
    return min(CLASSES - 1, max(0, int(share * CLASSES)))


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = math.ceil(len(points) / POINTS)
    # The last point tells how the run ended.
    return [*points[: -1 : max(1, every)], *points[-1:]]


def _path(points: Sequence[tuple[float, float]], x_scale: Scale, y_scale: Scale) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x_scale(x):g} {y_scale(y):g}")
        pen = "L"
    return " ".join(parts)


def _named(x: float, names: Sequence[str] | None, label: str) -> str:
    return names[int(x)] if names else f"{label} {spelled(x)}"
