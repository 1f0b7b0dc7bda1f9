"""Lets a caller follow a reconstruction while it runs: its start, its optimiser steps, its finished regions."""

from dataclasses import dataclass

from torch import Tensor

from .report import RegionReport


@dataclass(frozen=True)
class Step:
    """One optimiser step of one region.

    Args:
        region: name of the region.
        number: number of this step within the region, from 1 to `of`.
        of: number of steps of the region.
        loss: loss of the step, a tensor on the device of the region. Reading it makes the host wait for the device.
        learning_rate: learning rate of the next step.
    """

    region: str
    number: int
    of: int
    loss: Tensor
    learning_rate: float


class ReconstructionObserver:
    """Follows `reconstruct`. Subclass it and override the methods that you need; by default they do nothing.

    An error that a method raises stops the reconstruction. Regions that are finished by then stay pruned and fitted,
    and with a `state_dir` the run can be resumed.
    """

    def start(self, steps_per_region: int) -> None:
        """Note that the run begins. It is called once, after the arguments are checked and before anything is pruned.

        Args:
            steps_per_region: number of optimiser steps of each region that is trained.
        """

    def step(self, step: Step) -> None:
        """Note that an optimiser step was made. It is called after every step.

        Args:
            step: the step and its loss.
        """

    def region(self, report: RegionReport) -> None:
        """Note that a region is finished. It is called once for each region, or each matrix with `region="matrix"`.

        In a resumed run it is also called for each region that an earlier run finished. If several processes share
        the regions, the regions of the other processes are reported at the end of the run.

        Args:
            report: the errors of the region.
        """
