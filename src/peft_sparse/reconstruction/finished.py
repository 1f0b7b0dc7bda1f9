"""The results of finished regions: they are kept on disk, told to the observer, and exchanged among processes."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..model.processes import exchange, spread
from ..model.weights import to_host
from ..pruning.task import PruningTask
from .observer import ReconstructionObserver
from .progress import Progress
from .regions import Region
from .report import RegionReport


class FinishedRegions:
    """The results of the finished regions of a reconstruction.

    Args:
        task: what is pruned. It holds the counts and errors of finished weights.
        progress: keeps finished regions on disk.
        observer: is told of each finished region once.
    """

    def __init__(self, task: PruningTask, progress: Progress, observer: ReconstructionObserver) -> None:
        self.task, self.progress, self.observer = task, progress, observer
        self._reports: dict[int, list[RegionReport]] = {}
        self._told: set[int] = set()

    @property
    def reports(self) -> tuple[RegionReport, ...]:
        """The reports of all finished regions, in the order of the model."""
        return tuple(report for number in sorted(self._reports) for report in self._reports[number])

    def add(self, number: int, region: Region, reports: list[RegionReport], as_read: str | None) -> None:
        """Keep the result of region `number`.

        Args:
            number: number of the region in the model.
            region: the region, finished.
            reports: its report, or the reports of its matrices.
            as_read: its fingerprint before it was pruned; None if finished regions are not compared by it.
        """
        self._reports[number] = reports
        self.progress.save(number, region.parameters, self._notes(number, region), as_read)

    def restore(self, number: int, region: Region, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Put the result of an earlier run, or of another process, into a region."""
        with torch.no_grad():
            for name, parameter in region.parameters.items():
                if name in tensors:
                    parameter.copy_(tensors[name])
        self._reports[number] = [RegionReport(**report) for report in notes["reports"]]
        self.task.counts |= {name: (zeros, size) for name, (zeros, size) in notes["counts"].items()}
        self.task.errors |= _as_tensors(notes["errors"])
        self.task.errors_selected |= _as_tensors(notes["errors_selected"])

    def tell(self, number: int) -> None:
        """Report region `number` to the observer, if it is finished and has not been reported."""
        if number in self._reports and number not in self._told:
            self._told.add(number)
            for report in self._reports[number]:
                self.observer.region(report)

    def exchange(self, regions: dict[int, Region]) -> None:
        """Give every process the regions that the other processes fitted.

        Args:
            regions: all regions of the model, by number.
        """
        everything = exchange({number: self._notes(number, regions[number]) for number in self._reports})
        for number, region in regions.items():
            # A region of an earlier run may be finished in several processes.
            owner = next(rank for rank, notes in enumerate(everything) if number in notes)
            for parameter in region.parameters.values():
                spread(parameter.data, owner)
            self.restore(number, region, {}, everything[owner][number])
            self.tell(number)

    def _notes(self, number: int, region: Region) -> dict[str, Any]:
        """Return the reports, counts of zeros and output errors of a finished region as plain values."""
        task, weights = self.task, region.among(self.task.weights)
        return {
            "reports": [asdict(report) for report in self._reports[number]],
            "counts": {name: task.counts[name] for name in weights if name in task.counts},
            "errors": _on_host(task.errors, weights),
            "errors_selected": _on_host(task.errors_selected, weights),
        }


def _on_host(errors: dict[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    there = {name: errors[name] for name in names if name in errors}
    return dict(zip(there, to_host(list(there.values())), strict=True))


def _as_tensors(errors: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(error, device="cpu") for name, error in errors.items()}
