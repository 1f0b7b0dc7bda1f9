"""The report of a reconstruction: the errors of each region."""

from dataclasses import asdict, dataclass
from typing import Any

from ..pruning.report import PruningReport


@dataclass(frozen=True)
class RegionReport:
    """The errors of one region f with inputs x and targets t, or of one weight W with `region="matrix"`.

    Args:
        name: name of the region, or of the weight.
        error_pruned: the error after pruning and before the fit. For a region, ||f(x) - t|| / ||t|| on the held-out
            batches, where f(x) and t include the residual. For a weight, ||(W - W')X|| / ||WX|| on all calibration
            batches, where W' is the pruned W. A region in which nothing was pruned may have no fit; both errors are
            then 0.
        error: the same error after the fit. If the fit was undone, it equals `error_pruned`.
        steps: number of optimiser steps; 0 if nothing was trained.
        seconds: wall-clock time of pruning and fit, without that of the targets. The weights of a block share its time
            equally.
        reverted: whether the fit was undone, because the error was larger after it or not finite.
        whole: with `region="submodule"`, why a block was fitted as a whole and not in two parts; else None.
    """

    name: str
    error_pruned: float
    error: float
    steps: int
    seconds: float
    reverted: bool
    whole: str | None = None


@dataclass(frozen=True)
class ReconstructionReport:
    """The report that `reconstruct` returns.

    Args:
        region: size of the regions: "matrix", "submodule", "block" or a number of blocks, as text.
        mode: "SS", "DD" or "SD".
        loss: "mse", "relative_mse" or "cosine".
        tuner: "full", or the type of the PEFT tuner.
        seconds: wall-clock time of the run.
        peak_memory: peak memory of the process since it started, in bytes: the memory that torch allocated on the GPU,
            or without a GPU the resident memory.
        pruning: the report of the pruning; None if the model had been pruned before.
        regions: one report for each region, or for each matrix with `region="matrix"`.
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
        whole = sum(region.whole is not None for region in self.regions)
        return (
            f"reconstructed {len(self.regions)} regions ({self.region}, {self.mode}, {self.tuner}) in "
            f"{self.seconds:.1f} s: mean relative error {before:.4f} -> {after:.4f}, {reverted} reverted"
            + (f", {whole} blocks fitted whole" if whole else "")
        )
