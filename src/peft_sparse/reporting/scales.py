"""Axes of charts: where ticks are, how numbers are written, and where a value is drawn."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


# From this ratio of the largest to the smallest value, an axis of positive values is logarithmic.
LOGARITHMIC = 30.0


def spelled(value: float | None) -> str:
    """Return a number as text, with four digits that count. None and what is not finite are words."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: "-infinite"}.get(value, "not a number")
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def of_time(seconds: float) -> str:
    """Return a duration as text, such as "2 min 26 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def of_size(size: float) -> str:
    """Return a number of bytes as text, such as "2.8 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@dataclass(frozen=True)
class Scale:
    """An axis: values from `low` to `high` are drawn from `start` to `end`.

    Args:
        low, high: the smallest and the largest value.
        start, end: where they are drawn.
        logarithmic: whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return where `value` is drawn."""
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Where ticks are drawn, with their text."""
        values = _powers(self.low, self.high) if self.logarithmic else _steps(self.low, self.high)
        return [(self(value), spelled(value)) for value in values]


def scale_of(values: Iterable[float], start: float, end: float, *, from_zero: bool = False) -> Scale:
    """Return an axis for finite `values`. It is logarithmic if they are positive and differ by more than 30 times.

    Args:
        values: the values, at least one.
        start, end: where the axis begins and ends.
        from_zero: whether an axis that is not logarithmic begins at 0.
    """
    low, high = min(values := list(values)), max(values)
    if low > 0 and high / low > LOGARITHMIC:
        return Scale(low / 1.2, high * 1.2, start, end, logarithmic=True)
    if from_zero and low >= 0:
        return Scale(0.0, high * 1.05 or 1.0, start, end)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    floor = low - margin
    return Scale(max(floor, 0.0) if low >= 0 else floor, high + margin, start, end)


def _steps(low: float, high: float) -> list[float]:
    """Return about four round numbers between `low` and `high`."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Return powers of ten between `low` and `high`, or also 2 and 5 times these if there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if math.log10(high / low) > 2.5 else (1, 2, 5)
    found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    found = [value for value in found if low * 0.999 <= value <= high * 1.001]
    return found[:: math.ceil(len(found) / 7)]
