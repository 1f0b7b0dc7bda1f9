"""What reconstruction did to each region."""

from dataclasses import asdict, dataclass
from typing import Any

from ..pruning.report import PruningReport


@dataclass(frozen=True)
class RegionReport:
    """One region.

    Args:
        name: of the region.
        error_pruned: ||f(x) - t|| / ||t|| on held-out sequences once it was pruned; f(x) and t include the residual.
        error: the same once it was fitted.
        steps: optimiser steps; 0 where the solution is exact.
        seconds: wall-clock time.
        reverted: whether fitting made the error worse and was undone.
    """

    name: str
    error_pruned: float
    error: float
    steps: int
    seconds: float
    reverted: bool


@dataclass(frozen=True)
class ReconstructionReport:
    """What `reconstruct` did: the pruning, if it pruned, and each region; bytes and seconds."""

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
