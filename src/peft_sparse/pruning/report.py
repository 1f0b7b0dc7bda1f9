"""What makes a number believable: what was done to each weight, versions, hardware, command, peak memory."""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WeightReport:
    """One pruned weight.

    Args:
        name: name of its layer.
        shape: (out, in).
        sparsity: fraction of its entries that are zero now.
        error: ||(W - W')X|| / ||WX|| on the inputs X the layer had when it was pruned, some 1,024 calibration tokens;
            None without calibration and where all weights were compared at once.
        error_selected: the same of what the criterion selected, before refinement and update; None without them.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    error: float | None = None
    error_selected: float | None = None


@dataclass(frozen=True)
class PruningReport:
    """What `prune` did.

    Args:
        criterion, pattern, group: as chosen; `group` is None where the pattern or the criterion has its own.
        allocation, refinement, update: as chosen; "given" is an allocation by a dict.
        sparsity: fraction of zeros over all pruned weights.
        seconds: wall-clock time.
        peak_memory: bytes, as `peak_memory()` tells.
        weights: one entry per weight.
    """

    criterion: str
    pattern: str
    group: str | None
    sparsity: float
    seconds: float
    peak_memory: int
    weights: tuple[WeightReport, ...]
    allocation: str | None = None
    refinement: str | None = None
    update: bool = False

    @property
    def error(self) -> float | None:
        """Mean of the weights' relative output errors, None without calibration."""
        return _mean(weight.error for weight in self.weights)

    @property
    def error_selected(self) -> float | None:
        """The same of what the criterion selected, before refinement and update; None without them."""
        return _mean(weight.error_selected for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {**asdict(self), "error": self.error, "error_selected": self.error_selected}

    def plot(self, path: str | Path) -> None:
        """Draw sparsity and relative output error of the weights by depth, one line per kind of layer, to `path`.

        Experts of one block are drawn as their mean.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("A picture needs matplotlib. Install it with: pip install matplotlib") from error
        figure = Figure(figsize=(11, 4), layout="constrained")
        panels = [("sparsity", "sparsity", 1.0), ("relative output error", "error", None)]
        for axes, (title, attribute, highest) in zip(figure.subplots(1, 2), panels, strict=True):
            for kind, points in _by_depth(self.weights, attribute).items():
                axes.plot(list(points), list(points.values()), marker=".", label=kind)
            axes.set(title=title, xlabel="depth (block)", ylim=(0, highest))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
        figure.suptitle(str(self))
        figure.savefig(path)

    def __str__(self) -> str:
        group = f" per {self.group}" if self.group else ""
        error = "" if self.error is None else f", mean relative output error {self.error:.4f}"
        if self.error_selected is not None:
            error += f" ({self.error_selected:.4f} as selected)"
        how = [f"{self.criterion}, {self.pattern}{group}"]
        how += [f"allocation {self.allocation}"] if self.allocation else []
        how += [self.refinement] if self.refinement else []
        how += ["updated"] if self.update else []
        return (
            f"pruned {len(self.weights)} weights to sparsity {self.sparsity:.4f} "
            f"({', '.join(how)}) in {self.seconds:.1f} s{error}"
        )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _by_depth(weights: tuple[WeightReport, ...], attribute: str) -> dict[str, dict[int, float]]:
    """Return {kind of layer: {block: mean of `attribute`}}; NaN where there is none."""
    places = [re.fullmatch(r"(.*?)\.(\d+)\.(.*?)(\.\d+)?", weight.name) for weight in weights]
    stacks = {place[1] for place in places if place}
    values: dict[str, dict[int, list[float]]] = {}
    for weight, place in zip(weights, places, strict=True):
        stack, depth, kind = (place[1], int(place[2]), place[3]) if place else ("", 0, weight.name)
        value = getattr(weight, attribute)
        curve = values.setdefault(f"{stack} {kind}".strip() if len(stacks) > 1 else kind, {})
        curve.setdefault(depth, []).append(math.nan if value is None else value)
    return {kind: {depth: sum(v) / len(v) for depth, v in curve.items()} for kind, curve in values.items()}
