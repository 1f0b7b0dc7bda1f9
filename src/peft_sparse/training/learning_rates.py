"""Learning rates of retraining, as pure functions of the step.

In the formulas of learning rates η(t), t = 0, ..., T - 1, is the schedule of the original training; maxLR its peak;
minLR its lowest value from the peak on; N the steps of retraining, of which the first w = ⌊N/10⌋ warm up, where the
method has a warm-up, by start · (1 - cos(π t / w)) / 2; j = t - w counts the N' = N - w steps after it.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .pruning_schedules import cycle_of


Rates = Callable[[int], float]


def ft(eta: Sequence[float], steps: int) -> Rates:
    """Return the rates of fine-tuning: η(T - 1), constant. Renda et al. 2020, arXiv:2003.02389.

    Raises:
        ValueError: that is zero.
    """
    if not eta[-1]:
        raise ValueError('"ft" goes on at the last rate of the original schedule, which is 0. Use "lrw" or "llr".')
    return lambda t: eta[-1]


def lrw(eta: Sequence[float], steps: int) -> Rates:
    """Return the rates of learning rate rewinding: η(T - N + t). Renda et al. 2020, arXiv:2003.02389.

    Raises:
        ValueError: retraining is longer than the original training.
    """
    if steps > len(eta):
        raise ValueError(
            f'"lrw" replays the last {steps} rates of the original schedule, which has {len(eta)}. Retrain for '
            'at most as many steps, or use "slr", which stretches the schedule.'
        )
    return lambda t: eta[len(eta) - steps + min(t, steps - 1)]


def slr(eta: Sequence[float], steps: int) -> Rates:
    """Return scaled rates: η(⌊j T / N'⌋), maxLR where η warms up. Le and Hua 2021, arXiv:2105.03193."""
    high, peak = max(eta), eta.index(max(eta))

    def scaled(j: int, rest: int) -> float:
        i = min(j * len(eta) // rest, len(eta) - 1)
        return high if i < peak else eta[i]

    return _warmed_up(high, steps, scaled)


def clr(eta: Sequence[float], steps: int) -> Rates:
    """Return cyclical rates: minLR + (maxLR - minLR) (1 + cos(π j / N')) / 2. Le and Hua 2021, arXiv:2105.03193."""
    high, low = max(eta), min(eta[eta.index(max(eta)) :])
    return _warmed_up(high, steps, lambda j, rest: low + (high - low) * (1 + math.cos(math.pi * j / rest)) / 2)


def llr(eta: Sequence[float], steps: int) -> Rates:
    """Return linear rates: maxLR (1 - j / N'). Zimmer et al. 2023, arXiv:2111.00843."""
    return _linear(max(eta), steps)


def allr(eta: Sequence[float], steps: int, norm_drop: float) -> Rates:
    """Return adaptive linear rates: start (1 - j / N'). Zimmer et al. 2023, arXiv:2111.00843.

    start = clip(d₁ maxLR, d₂ maxLR, maxLR), where d₁ is the `norm_drop` and d₂ = min(N / T, 1): the less pruning
    removed and the shorter retraining is, the lower.
    """
    high = max(eta)
    return _linear(max(min(steps / len(eta), 1) * high, min(norm_drop * high, high)), steps)


RETRAINING: dict[str, Callable[..., Rates]] = {
    "ft": ft,
    "lrw": lrw,
    "slr": slr,
    "clr": clr,
    "llr": llr,
    "allr": allr,
}


def retraining_schedule(
    method: str,
    optimizer: Optimizer,
    original: Sequence[float] | Callable[[int], float],
    steps: int,
    *,
    original_steps: int | None = None,
    norm_drop: float | Callable[[int], float] | None = None,
    cycles: int = 1,
) -> "RetrainingSchedule":
    """Return the schedule that retrains with `optimizer`, for `Trainer(optimizers=(optimizer, schedule))`.

    The rates are those of parameter groups at the optimiser's own `lr`; groups at another keep their ratio to it.

    Args:
        method: "ft", "lrw", "slr", "clr", "llr" or "allr": the functions of this module.
        original: η, as its values, or as a function of the step.
        steps: N.
        original_steps: T; needed with a function.
        norm_drop: of the pruning that is retrained, for "allr"; of several cycles as a function of their number, from
            0 on, such as `PruningCallback.norm_drop`.
        cycles: begin anew in each of so many `PruningCycles`, which share the steps.

    Raises:
        ValueError: an unknown method, "allr" without `norm_drop`, a function without `original_steps`, rates that are
            negative or all zero, fewer steps than cycles, or an optimiser without a positive `lr`; what `ft` and `lrw`
            refuse.
    """
    check_method(method)
    if callable(original) and original_steps is None:
        raise ValueError("`original` is a function, whose end is not known. Pass `original_steps`.")
    eta = [original(t) for t in range(original_steps or 0)] if callable(original) else list(original)
    if steps < cycles or not eta or min(eta) < 0 or max(eta) == 0:
        raise ValueError(
            "Expected at least one step of retraining per cycle and original rates that are not negative, nor all "
            f"zero; got {steps} steps, {len(eta)} rates from {min(eta, default=0)} to {max(eta, default=0)}."
        )
    base = optimizer.defaults.get("lr")
    if not base:
        raise ValueError(
            f"The rates are set relative to the optimiser's own, which is {base}. Give it a positive `lr`, best the "
            "peak of the original schedule."
        )
    if method == "allr" and norm_drop is None:
        raise ValueError(
            '"allr" starts lower the less pruning removed: pass `norm_drop`, or let `SparseTrainer` prune (`sparsity` '
            "or `pattern`, at once or in cycles), which measures it."
        )

    @cache
    def rates(length: int, drop: float) -> Rates:
        return RETRAINING[method](eta, length, **({"norm_drop": drop} if method == "allr" else {}))

    def factor(t: int) -> float:
        start, length = cycle_of(t, steps, cycles)
        drop = norm_drop(start // max(1, steps // cycles)) if callable(norm_drop) else norm_drop or 0.0
        return rates(length, drop)(t - start) / float(base)

    # What a method refuses, it refuses now.
    for t in (0, steps):
        rates(cycle_of(t, steps, cycles)[1], 1.0)
    return RetrainingSchedule(optimizer, factor)


class RetrainingSchedule(LambdaLR):
    """The rates of `retraining_schedule`, which may depend on what is pruned on the way."""

    def refresh(self) -> None:
        """Set the rates of the step that comes next, which something they depend on changed."""
        for group, base, rule in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * rule(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def check_method(method: str) -> None:
    """Raise ValueError unless `method` is one of `RETRAINING`."""
    if method not in RETRAINING:
        raise ValueError(
            f"A retraining schedule is one of {', '.join(map(repr, RETRAINING))}, got {method!r}. For another, leave "
            "it out and use `lr_scheduler_type`."
        )


def norm_drop(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Return d₁ = (‖W - W_p‖₂ / ‖W‖₂) / √s_p of pruning W to W_p.

    s_p is the fraction of W's nonzero entries that W_p has lost. ‖W - W_p‖² is taken for |‖W‖² - ‖W_p‖²|, as in the
    authors' code, which is exact unless pruning also updates what it keeps.

    Args:
        before: (‖W‖², nonzero entries).
        after: the same of W_p.

    Raises:
        ValueError: nothing was pruned.
    """
    (square, entries), (square_pruned, entries_pruned) = before, after
    if not entries_pruned < entries:
        raise ValueError(
            'Nothing was pruned: the weights had their zeros before. "allr" measures what pruning removes; start from '
            'the dense model, or use "llr".'
        )
    return math.sqrt(abs(square - square_pruned) / square) / math.sqrt(1 - entries_pruned / entries)


def _warmed_up(start: float, steps: int, after: Callable[[int, int], float]) -> Rates:
    warmup = steps // 10
    rest = steps - warmup

    def rates(t: int) -> float:
        if t < warmup:
            return start * (1 - math.cos(math.pi * t / warmup)) / 2
        # A scheduler asks for the rate after the last step as well.
        return after(min(t - warmup, rest), rest)

    return rates


def _linear(start: float, steps: int) -> Rates:
    return _warmed_up(start, steps, lambda j, rest: start * (1 - j / rest))
