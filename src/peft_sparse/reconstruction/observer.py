"""Lets a caller, and a progress bar, follow a reconstruction: its start, its optimiser steps, its finished regions."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


class LossOnBar:
    """Shows the region and the loss of a step on a progress bar, and then hands the step to `on_step`."""

    def __init__(self, bar: Any, on_step: Callable[[Step], None]) -> None:
        self.bar, self.on_step = bar, on_step
        self.shown = -math.inf

    def __call__(self, step: Step) -> None:
        # Reading the loss makes the host wait for the device, so it is read once a second and not in every step.
        if not self.bar.disable and time.monotonic() - self.shown > 1:
            self.shown = time.monotonic()
            self.bar.set_postfix(region=step.region, loss=f"{float(step.loss):.3g}")
        self.on_step(step)
