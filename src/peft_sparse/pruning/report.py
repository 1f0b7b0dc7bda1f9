"""The report of a pruning run: what was done to each weight."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WeightReport:
    """What was done to one weight.

    Args:
        name: the name of its layer. The name of an expert is `<parameter>.<expert>`.
        shape: (out, in).
        sparsity: the fraction of its entries that are zero now.
        error: the relative output error ‖(W - W')X‖ / ‖WX‖, where W' is the pruned weight and WX the outputs without
            bias. X is the input that the layer had when it was pruned, on about 1,024 calibration tokens. None
            without calibration, and with `group="model"`.
        error_selected: the same error before refinement and update. None if there was neither.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    error: float | None = None
    error_selected: float | None = None


@dataclass(frozen=True)
class PruningReport:
    """What `prune` or `prune_checkpoint` did.

    Args:
        criterion: the name of the criterion, with the numbers that differ from the defaults.
        pattern: the sparsity or n:m. For a dict, each key with its pattern.
        group: which entries were compared with each other: "row", "matrix" or "model". None if a pattern n:m or the
            criterion decides that.
        sparsity: the fraction of zeros in all pruned weights.
        seconds: the wall-clock time.
        peak_memory: the largest memory of this process so far, in bytes. With CUDA it is the memory that torch
            allocated on the GPU, otherwise the resident memory.
        weights: one entry per weight.
        allocation: the name of the allocation, "given" for a dict, None without one.
        refinement: the name of the refinement, None without one.
        update: whether the kept weights were updated.
        left_out: the matrices inside the blocks that were not pruned, by name, each with the reason in words, such as
            "a router", "excluded" or "not in `target_modules`". Embeddings are not listed.
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
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The mean of the weights' relative output errors. None if none was measured."""
        return _mean(weight.error for weight in self.weights)

    @property
    def error_selected(self) -> float | None:
        """The mean of the relative output errors before refinement and update. None if there was neither."""
        return _mean(weight.error_selected for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {**asdict(self), "error": self.error, "error_selected": self.error_selected}

    def plot(self, path: str | Path) -> None:
        """Save a picture of sparsity and relative output error by depth, with one line per kind of layer.

        The experts of one block are drawn as their mean.

        Args:
            path: the file of the picture.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "A picture needs matplotlib, which is not installed. Run: pip install matplotlib"
            ) from error
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
            f"({', '.join(how)}) in {self.seconds:.1f} s{error}{self._spelled_left_out()}"
        )

    def _spelled_left_out(self) -> str:
        if not self.left_out:
            return ""
        matrices = "matrix" if len(self.left_out) == 1 else "matrices"
        reasons = ", ".join(f"{reason}: {count}" for reason, count in Counter(self.left_out.values()).most_common())
        return f"; left out {len(self.left_out)} {matrices} in the blocks ({reasons})"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _by_depth(weights: tuple[WeightReport, ...], attribute: str) -> dict[str, dict[int, float]]:
    """Return {kind of layer: {block: mean of `attribute`}}, with NaN where no value was measured."""
    places = [re.fullmatch(r"(.*?)\.(\d+)\.(.*?)(\.\d+)?", weight.name) for weight in weights]
    stacks = {place[1] for place in places if place}
    values: dict[str, dict[int, list[float]]] = {}
    for weight, place in zip(weights, places, strict=True):
        stack, depth, kind = (place[1], int(place[2]), place[3]) if place else ("", 0, weight.name)
        value = getattr(weight, attribute)
        curve = values.setdefault(f"{stack} {kind}".strip() if len(stacks) > 1 else kind, {})
        curve.setdefault(depth, []).append(math.nan if value is None else value)
    return {kind: {depth: sum(v) / len(v) for depth, v in curve.items()} for kind, curve in values.items()}
