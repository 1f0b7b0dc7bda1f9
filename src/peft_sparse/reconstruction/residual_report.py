"""The report of `residual_lora`: the errors of each weight without and with its correction."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig


@dataclass(frozen=True)
class ResidualWeightReport:
    """The errors of one weight W.

    Args:
        name: the name of its layer.
        shape: (out, in).
        r: the rank of its correction L.
        error_pruned: ‖(W - W')X‖ / ‖WX‖, where W' is the pruned weight and X its inputs on all calibration tokens. The
            inputs have passed through the pruned and corrected blocks before it.
        error: ‖(W - W' - L)X‖ / ‖WX‖ for the same inputs.
    """

    name: str
    shape: tuple[int, int]
    r: int
    error_pruned: float
    error: float


@dataclass(frozen=True)
class ResidualReport:
    """What `residual_lora` did.

    Args:
        r: the rank of the corrections that `rank_pattern` does not name.
        damping: the argument `damping`.
        parameters: the number of entries of the adapter.
        seconds: the wall-clock time.
        peak_memory: the largest memory of this process so far, in bytes. With CUDA it is the memory that torch
            allocated on the GPU, otherwise the resident memory.
        weights: one entry for each corrected weight.
        left_out: the matrices inside the blocks that were not corrected, by name, each with the reason in words, such
            as "equal to the dense weight", "a fused expert" or "excluded".
    """

    r: int
    damping: float
    parameters: int
    seconds: float
    peak_memory: int
    weights: tuple[ResidualWeightReport, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def error_pruned(self) -> float:
        """The mean of the weights' relative output errors without the adapter."""
        return _mean([weight.error_pruned for weight in self.weights])

    @property
    def error(self) -> float:
        """The mean of the weights' relative output errors with the adapter."""
        return _mean([weight.error for weight in self.weights])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {**asdict(self), "error_pruned": self.error_pruned, "error": self.error}

    def __str__(self) -> str:
        """A summary, and a table with one row for each kind of layer. It gives the means over the blocks."""
        kinds: dict[str, list[ResidualWeightReport]] = {}
        for weight in self.weights:
            kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", weight.name), []).append(weight)
        rows = [
            f"| {kind} | {len(found)} | {_spelled({weight.r for weight in found})} | "
            f"{_mean([weight.error_pruned for weight in found]):.4f} | {_mean([w.error for w in found]):.4f} |"
            for kind, found in kinds.items()
        ]
        left_out = f"; left out {len(self.left_out)} in the blocks" if self.left_out else ""
        return "\n".join(
            [
                f"corrected {len(self.weights)} weights by LoRA ({self.parameters:,} parameters) in "
                f"{self.seconds:.1f} s: mean relative output error {self.error_pruned:.4f} -> {self.error:.4f}"
                f"{left_out}",
                "| layers | weights | rank | error, pruned | error, corrected |",
                "| --- | ---: | ---: | ---: | ---: |",
                *rows,
            ]
        )


# The attribute by which the configuration of an adapter says that it corrects a pruned base. PEFT does not save it.
_REPORT = "_residual_report"


def mark(config: LoraConfig, report: ResidualReport, sparsity: float) -> None:
    """Let the cards of an adapter say that it corrects a pruned model.

    Args:
        config: the configuration of the adapter.
        report: what was done.
        sparsity: the fraction of zeros in the corrected weights.
    """
    setattr(config, _REPORT, report.to_dict() | {"sparsity": sparsity})


def marked(config: PeftConfig) -> dict[str, Any] | None:
    """Return the report that `mark` noted, as plain values. None if the adapter corrects no pruned model."""
    return getattr(config, _REPORT, None)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spelled(ranks: set[int]) -> str:
    return str(ranks.pop()) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
