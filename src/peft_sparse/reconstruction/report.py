"""What reconstruction did to each region."""

from dataclasses import asdict, dataclass
from typing import Any

from ..pruning.report import PruningReport


@dataclass(frozen=True)
class RegionReport:
    """One region f, with its targets t.

    Args:
        name: name of the region.
        error_pruned: ||f(x) - t|| / ||t|| on the held-out sequences after pruning and before the fit. f(x) and t
            include the residual.
        error: the same error after the fit.
        steps: optimiser steps; 0 for a region that was not trained.
        seconds: wall-clock time.
        reverted: whether the fit made the error larger and was undone.
    """

    name: str
    error_pruned: float
    error: float
    steps: int
    seconds: float
    reverted: bool


@dataclass(frozen=True)
class ReconstructionReport:
    """What `reconstruct` did.

    Args:
        region: size of the regions: "matrix", "submodule", "block" or a number of blocks.
        mode: "SS", "DD" or "SD".
        loss: "mse", "relative_mse" or "cosine".
        tuner: "full", or the name of the PEFT tuner.
        seconds: wall-clock time of the run.
        peak_memory: peak memory of the process in bytes, as `peak_memory()` returns it.
        pruning: the report of the pruning; None if the model had been pruned before.
        regions: one report for each region, and with `region="matrix"` one for each matrix.
    """

    region: str
    mode: str
    loss: str
    tuner: str
    seconds: float
    peak_memory: int
    pruning: PruningReport | None
    regions: tuple[RegionReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {**asdict(self), "pruning": None if self.pruning is None else self.pruning.to_dict()}

    def __str__(self) -> str:
        reverted = sum(region.reverted for region in self.regions)
        before = sum(region.error_pruned for region in self.regions) / len(self.regions)
        after = sum(region.error for region in self.regions) / len(self.regions)
        return (
            f"reconstructed {len(self.regions)} regions ({self.region}, {self.mode}, {self.tuner}) in "
            f"{self.seconds:.1f} s: mean relative error {before:.4f} -> {after:.4f}, {reverted} reverted"
        )
