"""Learning rates of retraining, as pure functions of the step.

The formulas use these letters. η(t), t = 0, ..., T - 1, is the learning rate of the original training. maxLR is its
highest value. minLR is its lowest value from the peak on. N is the number of steps of retraining. The methods "slr",
"clr", "llr" and "allr" begin with a warm-up of w = ⌊N/10⌋ steps, in which the learning rate is
start · (1 - cos(π t / w)) / 2. `start` is maxLR, except for "allr". After the warm-up, j = t - w counts the remaining
N' = N - w steps.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .pruning_schedules import cycle_of


Rates = Callable[[int], float]


def ft(eta: Sequence[float], steps: int) -> Rates:
    """Return the rates of fine-tuning: η(T - 1) in every step.

    Renda et al. 2020, arXiv:2003.02389.

    Args:
        eta: η(0), ..., η(T - 1).
        steps: N.

    Raises:
        ValueError: η(T - 1) is zero.
    """
    if not eta[-1]:
        raise ValueError(
            'The method "ft" continues with the last learning rate of the original schedule, which is 0. Use "lrw" or '
            '"llr".'
        )
    return lambda t: eta[-1]


def lrw(eta: Sequence[float], steps: int) -> Rates:
    """Return the rates of learning rate rewinding: η(T - N + t).

    Renda et al. 2020, arXiv:2003.02389.

    Args:
        eta: η(0), ..., η(T - 1).
        steps: N.

    Raises:
        ValueError: retraining has more steps than the original training.
    """
    if steps > len(eta):
        raise ValueError(
            f'The method "lrw" repeats the last {steps} learning rates of the original schedule, which has only '
            f'{len(eta)}. Retrain for at most {len(eta)} steps, or use "slr", which stretches the schedule.'
        )
    return lambda t: eta[len(eta) - steps + min(t, steps - 1)]


def slr(eta: Sequence[float], steps: int) -> Rates:
    """Return scaled learning rates: η(⌊j · T / N'⌋), with maxLR in place of η's own warm-up.

    Le and Hua 2021, arXiv:2105.03193.

    Args:
        eta: η(0), ..., η(T - 1).
        steps: N.
    """
    high, peak = max(eta), eta.index(max(eta))

    def scaled(j: int, rest: int) -> float:
        i = min(j * len(eta) // rest, len(eta) - 1)
        return high if i < peak else eta[i]

    return _warmed_up(high, steps, scaled)


def clr(eta: Sequence[float], steps: int) -> Rates:
    """Return cyclical learning rates: minLR + (maxLR - minLR) · (1 + cos(π j / N')) / 2.

    Le and Hua 2021, arXiv:2105.03193.

    Args:
        eta: η(0), ..., η(T - 1).
        steps: N.
    """
    high, low = max(eta), min(eta[eta.index(max(eta)) :])
    return _warmed_up(high, steps, lambda j, rest: low + (high - low) * (1 + math.cos(math.pi * j / rest)) / 2)


def llr(eta: Sequence[float], steps: int) -> Rates:
    """Return linear learning rates: maxLR · (1 - j / N').

    Zimmer et al. 2023, arXiv:2111.00843.

    Args:
        eta: η(0), ..., η(T - 1).
        steps: N.
    """
    return _linear(max(eta), steps)


def allr(eta: Sequence[float], steps: int, norm_drop: float) -> Rates:
    """Return adaptive linear learning rates: start · (1 - j / N').

    start = max(d₂ · maxLR, min(d₁ · maxLR, maxLR)), where d₁ is the `norm_drop` and d₂ = min(N / T, 1). It is lower
    if pruning changed the weights less, and if retraining is shorter. Zimmer et al. 2023, arXiv:2111.00843.

    Args:
        eta: η(0), ..., η(T - 1).
        steps: N.
        norm_drop: d₁, as the function `norm_drop` computes it.
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
    rounds: int = 1,
) -> "RetrainingSchedule":
    """Return the learning rate schedule of retraining, for `Trainer(optimizers=(optimizer, schedule))`.

    A parameter group that has the default `lr` of the optimiser gets exactly these learning rates. A group with
    another `lr` gets them multiplied by the ratio of its `lr` to the default.

    Args:
        method: "ft" (fine-tuning), "lrw" (learning rate rewinding), "slr" (scaled), "clr" (cyclical), "llr" (linear)
            or "allr" (adaptive linear).
        optimizer: the optimiser of retraining.
        original: η, the learning rates of the original training: a sequence, or a function of the step.
        steps: the number of optimiser steps of retraining: N if `rounds` is 1.
        original_steps: T, the number of steps of the original training. It is needed if `original` is a function, and
            not used otherwise.
        norm_drop: d₁, how much pruning changed the norm of the weights. "allr" needs it, and the others do not use it.
            For several rounds it is a function of the round, counted from 0, such as `PruningCallback.norm_drop`.
        rounds: how many times the schedule runs, once in each cycle of `PruningCycles(rounds)`. N is then the number
            of steps of a cycle.

    Returns:
        A `LambdaLR` for the optimiser.

    Raises:
        ValueError: `method` is unknown; "allr" has no `norm_drop`; `original` is a function and `original_steps` is
            missing; a learning rate is negative, or all are zero; `rounds` is below 1 or above `steps`; the optimiser
            has no `lr`, or it is 0; "ft" would train at a learning rate of zero; "lrw" has more steps than the
            original training.
    """
    check_method(method)
    if callable(original) and original_steps is None:
        raise ValueError("`original` is a function, and its number of steps is not known. Pass `original_steps`.")
    eta = [original(t) for t in range(original_steps or 0)] if callable(original) else list(original)
    if not 1 <= rounds <= steps or not eta or min(eta) < 0 or max(eta) == 0:
        raise ValueError(
            "Expected at least one step of retraining in each round, and original learning rates of which none is "
            f"negative and one is positive. Got {steps} steps for {rounds} rounds, and {len(eta)} learning rates from "
            f"{min(eta, default=0)} to {max(eta, default=0)}."
        )
    base = optimizer.defaults.get("lr")
    if not base:
        raise ValueError(
            f"The schedule multiplies the `lr` of the optimiser, which is {base}. Pass an optimiser with a positive "
            "`lr`, for example the highest learning rate of the original training."
        )
    if method == "allr" and norm_drop is None:
        raise ValueError(
            'The method "allr" depends on how much pruning removed. Pass `norm_drop`, or set `sparsity` or `pattern` '
            "of SparseTrainer, which then prunes and measures it."
        )

    @cache
    def rates(length: int, drop: float) -> Rates:
        return RETRAINING[method](eta, length, **({"norm_drop": drop} if method == "allr" else {}))

    def factor(t: int) -> float:
        start, length = cycle_of(t, steps, rounds)
        drop = norm_drop(start // max(1, steps // rounds)) if callable(norm_drop) else norm_drop or 0.0
        return rates(length, drop)(t - start) / float(base)

    # Computed here once, so that a method refuses its arguments now and not in the first step.
    for t in (0, steps):
        rates(cycle_of(t, steps, rounds)[1], 1.0)
    return RetrainingSchedule(optimizer, factor)


class RetrainingSchedule(LambdaLR):
    """The schedule that `retraining_schedule` returns. Its rates may depend on prunings during training."""

    def refresh(self) -> None:
        """Compute the learning rates of the next step again, because a pruning has changed d₁ of "allr"."""
        for group, base, rule in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * rule(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def check_method(method: str) -> None:
    """Raise ValueError unless `method` is one of `RETRAINING`."""
    if method not in RETRAINING:
        raise ValueError(
            f"The retraining schedule must be one of {', '.join(map(repr, RETRAINING))}, got {method!r}. For another "
            "schedule leave it out and set `lr_scheduler_type`."
        )


def norm_drop(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Return d₁ = (‖W - W_p‖₂ / ‖W‖₂) / √s_p, where pruning changed W to W_p.

    s_p is the fraction of the nonzero entries of W that became zero. ‖W - W_p‖² is computed as |‖W‖² - ‖W_p‖²|, as in
    the authors' code. The two are equal if pruning does not change the kept entries. Zimmer et al. 2023,
    arXiv:2111.00843.

    Args:
        before: (‖W‖², number of nonzero entries of W).
        after: (‖W_p‖², number of nonzero entries of W_p).

    Raises:
        ValueError: W_p has as many nonzero entries as W.
    """
    (square, entries), (square_pruned, entries_pruned) = before, after
    if not entries_pruned < entries:
        raise ValueError(
            'Pruning made no further entry zero, and the method "allr" depends on how much pruning removes. Start '
            'from the dense model, or use "llr".'
        )
    return math.sqrt(abs(square - square_pruned) / square) / math.sqrt(1 - entries_pruned / entries)


def _warmed_up(start: float, steps: int, after: Callable[[int, int], float]) -> Rates:
    warmup = steps // 10
    rest = steps - warmup

    def rates(t: int) -> float:
        if t < warmup:
            return start * (1 - math.cos(math.pi * t / warmup)) / 2
        # The scheduler also asks for the rate after the last step.
        return after(min(t - warmup, rest), rest)

    return rates


def _linear(start: float, steps: int) -> Rates:
    return _warmed_up(start, steps, lambda j, rest: start * (1 - j / rest))
