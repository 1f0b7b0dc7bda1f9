"""Mask refinement: (weight, mask, statistics, pattern) -> mask. Pruned entries are exchanged for kept ones.

Pure functions on tensors of any device: no layers, no calibration, and no weight is changed. Refinement works row by
row, also on a mask that was selected by comparison per matrix. Every row keeps as many entries as before.
"""

from typing import Protocol

from torch import Tensor

from ..calibration.statistics import Need, Statistics
from .choices import chosen, spelled
from .dsnot import DSnoT
from .patterns import Pattern
from .swap import Swap


class Refinement(Protocol):
    """What every refinement has: `needs`, the statistics that calibration has to measure, and `refine`."""

    @property
    def needs(self) -> tuple[Need, ...]: ...

    def refine(self, weight: Tensor, mask: Tensor, statistics: Statistics, pattern: Pattern) -> Tensor:
        """Return a mask with as many kept entries in each row and each n:m group as `mask`, (out, in)."""


REFINEMENTS: dict[str, type] = {"dsnot": DSnoT, "swap": Swap}


def find_refinement(refinement: str | Refinement) -> tuple[str, Refinement]:
    """Return what reports call a refinement, and its value.

    Args:
        refinement: a name of `REFINEMENTS`, or a value of one of its classes.

    Raises:
        ValueError: there is no such refinement.
    """
    value = chosen("refinement", REFINEMENTS, refinement)
    return spelled(REFINEMENTS, value), value
