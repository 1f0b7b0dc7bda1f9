"""Pruning schedules: the sparsity as a function of the optimiser step."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class CubicSchedule:
    """Gradual pruning: the sparsity rises n times, first fast and then slowly.

        s_t = s_f + (s_i - s_f) · (1 - (t - t_0) / (n · Δt))³    at the steps t = t_0, t_0 + Δt, ..., t_0 + n · Δt

    s_f is the requested sparsity. Zhu and Gupta 2017, arXiv:1710.01878.

    Args:
        rounds: n, how many times the sparsity rises.
        interval: Δt, the number of optimiser steps between two prunings.
        start: t_0, the number of optimiser steps before the first pruning.
        initial_sparsity: s_i, the sparsity at step t_0, a fraction in [0, 1).

    Raises:
        ValueError: `rounds` or `interval` is below 1, or `start` or `initial_sparsity` is negative.
    """

    rounds: int
    interval: int
    start: int = 0
    initial_sparsity: float = 0.0
    restarts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.interval < 1 or self.start < 0 or self.initial_sparsity < 0:
            raise ValueError(
                "CubicSchedule needs `rounds` and `interval` of at least 1, and a `start` and an `initial_sparsity` "
                f"of at least 0. Got rounds={self.rounds}, interval={self.interval}, start={self.start}, "
                f"initial_sparsity={self.initial_sparsity}. CubicSchedule(rounds=10, interval=50) prunes every 50 "
                "steps."
            )

    def sparsities(self, final: float, steps: int) -> dict[int, float]:
        """Return the steps at which the model is pruned, and the sparsity of each.

        Args:
            final: s_f, the sparsity after the last pruning, a fraction.
            steps: the number of optimiser steps of the run.

        Returns:
            The sparsity for each number of completed optimiser steps after which the model is pruned.

        Raises:
            ValueError: no step is left after the last pruning, or `final` is not above `initial_sparsity`.
        """
        last = self.start + self.rounds * self.interval
        if last >= steps:
            raise ValueError(
                f"The last of {self.rounds} rounds prunes after step {last}, and the run has {steps} steps. No step "
                "is left to retrain. Train for more steps, or lower `rounds`, `interval` or `start`."
            )
        if final <= self.initial_sparsity:
            raise ValueError(
                "The requested sparsity must be above the initial one, got "
                f"{final} and `initial_sparsity={self.initial_sparsity}`. Request a higher sparsity."
            )
        times = range(self.start, last + 1, self.interval)
        span = self.rounds * self.interval
        return {t: final + (self.initial_sparsity - final) * (1 - (t - self.start) / span) ** 3 for t in times}


@dataclass(frozen=True)
class PruningCycles:
    """Iterative pruning: n cycles, each of which prunes and then retrains.

    Each cycle prunes the same fraction p = 1 - (1 - s)^(1/n) of the nonzero weights, where s is the requested
    sparsity. After the pruning of cycle k the sparsity is 1 - (1 - p)^k = 1 - (1 - s)^(k/n). All cycles have the same
    number of optimiser steps; the last cycle also has the steps that are left over. Han et al. 2015,
    arXiv:1506.02626, and Renda et al. 2020, arXiv:2003.02389.

    Args:
        rounds: n, the number of cycles.

    Raises:
        ValueError: `rounds` is below 1.
    """

    rounds: int
    restarts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}. One round prunes when training begins.")

    def sparsities(self, final: float, steps: int) -> dict[int, float]:
        """Return the steps at which the model is pruned, and the sparsity of each.

        Args:
            final: s, the sparsity after the last pruning, a fraction.
            steps: the number of optimiser steps of the run.

        Returns:
            The sparsity for each number of completed optimiser steps after which the model is pruned.

        Raises:
            ValueError: the run has fewer steps than cycles.
        """
        if steps < self.rounds:
            raise ValueError(
                f"{self.rounds} cycles need at least {self.rounds} optimiser steps, and the run has {steps}. Train "
                "for more steps."
            )
        return {
            (k - 1) * (steps // self.rounds): 1 - (1 - final) ** (k / self.rounds) for k in range(1, self.rounds + 1)
        }


def cycle_of(step: int, steps: int, rounds: int) -> tuple[int, int]:
    """Return the first step and the length of the cycle that `step` belongs to, in a run of `steps`."""
    length = max(1, steps // rounds)
    start = min(step // length, rounds - 1) * length
    return start, length if start < (rounds - 1) * length else steps - start


PruningSchedule = CubicSchedule | PruningCycles
