"""The sparsity as a function of the optimiser step: gradual pruning and cycles."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class CubicSchedule:
    """Gradual pruning, fast first: s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³ at t = t_0, ..., t_0 + n Δt.

    Zhu and Gupta 2017, arXiv:1710.01878.

    Args:
        updates: n, how often the sparsity rises.
        every: Δt, the optimiser steps in between.
        start: t_0, the optimiser steps before the first pruning.
        initial: s_i, the sparsity at t_0.

    Raises:
        ValueError: not one update, or not one step in between.
    """

    updates: int
    every: int
    start: int = 0
    initial: float = 0.0
    restarts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.updates < 1 or self.every < 1 or self.start < 0 or self.initial < 0:
            raise ValueError(
                "A cubic schedule needs at least 1 update, 1 step in between and nothing negative, got "
                f"updates={self.updates}, every={self.every}, start={self.start}, initial={self.initial}. "
                "CubicSchedule(updates=10, every=50) prunes every 50 steps."
            )

    def sparsities(self, final: float, steps: int) -> dict[int, float]:
        """Return the sparsity to prune to after so many optimiser steps, for a run of `steps` that ends at `final`.

        Raises:
            ValueError: the run is too short to retrain after the last update, or `final` is not above `initial`.
        """
        last = self.start + self.updates * self.every
        if last >= steps:
            raise ValueError(
                f"The last of {self.updates} updates is at step {last} and the run has {steps}, which leaves none to "
                "retrain. Train for more steps, or prune less often or earlier."
            )
        if final <= self.initial:
            raise ValueError(
                f"The sparsity rises from `initial={self.initial}` to the requested one, got {final}. Ask for more."
            )
        times = range(self.start, last + 1, self.every)
        span = self.updates * self.every
        return {t: final + (self.initial - final) * (1 - (t - self.start) / span) ** 3 for t in times}


@dataclass(frozen=True)
class PruningCycles:
    """Iterative magnitude pruning: n cycles of pruning and retraining of equal length, what is left over in the last.

    Each prunes the fraction p = 1 - (1 - s)^(1/n) of the remaining weights, so that the sparsity after cycle k is
    1 - (1 - p)^k = 1 - (1 - s)^(k/n). Han et al. 2015, arXiv:1506.02626.

    Args:
        cycles: n.

    Raises:
        ValueError: n is not positive.
    """

    cycles: int
    restarts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"`cycles` must be at least 1, got {self.cycles}. 1 prunes once, when training begins.")

    def sparsities(self, final: float, steps: int) -> dict[int, float]:
        """Return the sparsity to prune to after so many optimiser steps, for a run of `steps` that ends at `final`.

        Raises:
            ValueError: fewer steps than cycles.
        """
        if steps < self.cycles:
            raise ValueError(f"{self.cycles} cycles need as many steps at least, the run has {steps}. Train longer.")
        return {
            (k - 1) * (steps // self.cycles): 1 - (1 - final) ** (k / self.cycles) for k in range(1, self.cycles + 1)
        }


def cycle_of(step: int, steps: int, cycles: int) -> tuple[int, int]:
    """Return the first step and the length of the cycle that has `step`; the last has what `cycles` leave over."""
    length = max(1, steps // cycles)
    start = min(step // length, cycles - 1) * length
    return start, length if start < (cycles - 1) * length else steps - start


PruningSchedule = CubicSchedule | PruningCycles
