"""Pruning criteria: (weight, statistics) -> scores of one weight. Entries with the highest scores are kept.

A criterion sees no layers and no masks, and writes nothing. To add one, write its class and its row in `CRITERIA`.
SparseGPT is a solver: it selects and updates in one pass. It has a row here and a file of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, get_args

import torch
from torch import Tensor

from ..calibration.statistics import Need, Statistics
from .choices import check_numbers, chosen, spelled
from .patterns import GROUPS, Group
from .sparsegpt import SparseGPT


Score = Callable[[Tensor, Statistics], Tensor]


class ScoringCriterion(Protocol):
    """What every criterion that returns scores has.

    Attributes:
        group: the entries that are compared with each other unless the caller chooses: "row", "matrix" or "model".
        needs: which statistics calibration has to measure.
    """

    @property
    def group(self) -> Group: ...

    @property
    def needs(self) -> tuple[Need, ...]: ...

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return the scores of `weight`, both (out, in)."""


@dataclass(frozen=True)
class Magnitude:
    """S = |W|, compared within each matrix by default. Han et al. 2015, arXiv:1506.02626."""

    group: ClassVar[Group] = "matrix"
    needs: ClassVar[tuple[Need, ...]] = ()

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return |W|, (out, in)."""
        return weight.abs()


@dataclass(frozen=True)
class Random:
    """S ~ U[0, 1), compared within each matrix by default.

    Scores are drawn from torch's global generator. `torch.manual_seed` makes the mask repeatable.
    """

    group: ClassVar[Group] = "matrix"
    needs: ClassVar[tuple[Need, ...]] = ()

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return random scores, (out, in)."""
        return torch.rand(weight.shape, device=weight.device)


@dataclass(frozen=True)
class Wanda:
    """S_ij = |W_ij| · ‖X_j‖₂, compared within each row by default. Sun et al. 2023, arXiv:2306.11695, section 3."""

    group: ClassVar[Group] = "row"
    needs: ClassVar[tuple[Need, ...]] = ("inputs",)

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return the scores from `statistics.input_norm`, (out, in)."""
        return weight.abs().float() * _input_norm(statistics)


@dataclass(frozen=True)
class RIA:
    """S_ij = (|W_ij| / Σ_k |W_kj| + |W_ij| / Σ_k |W_ik|) · ‖X_j‖₂^a, compared within each matrix by default.

    Relative importance and activations. Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method
    for Large Language Models", ICLR, section 3.

    Args:
        exponent: a, at least 0. The paper uses 1/2.

    Raises:
        ValueError: `exponent` is negative.
    """

    exponent: float = 0.5

    group: ClassVar[Group] = "matrix"
    needs: ClassVar[tuple[Need, ...]] = ("inputs",)

    def __post_init__(self) -> None:
        check_numbers(self, exponent=(self.exponent >= 0, "at least 0"))

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return the scores from `statistics.input_norm`, (out, in)."""
        size = weight.abs().float()
        # A row or column of zeros has no sum to divide by: its entries score zero.
        tiny = torch.finfo(torch.float32).tiny
        by_column = size.sum(0).clamp_min_(tiny).reciprocal_()
        by_row = size.sum(1, keepdim=True).clamp_min_(tiny).reciprocal_()
        return size.mul_(by_column + by_row).mul_(_input_norm(statistics).pow(self.exponent))


@dataclass(frozen=True)
class GBLM:
    """S_ij = |W_ij| · (‖X_j‖₂ / √N + α · Σ_n |∂L_n/∂W_ij|) over N sequences n, compared within each row by default.

    This is the l1 variant of GBLM-Pruner. S depends on N and on the length of the sequences, as in the paper, because
    α is a constant. Das et al. 2023, arXiv:2311.04902, section 3.

    Args:
        gradient_scale: α, at least 0. The paper uses 100.

    Raises:
        ValueError: `gradient_scale` is negative.
    """

    gradient_scale: float = 100.0

    group: ClassVar[Group] = "row"
    needs: ClassVar[tuple[Need, ...]] = ("inputs", "gradients")

    def __post_init__(self) -> None:
        check_numbers(self, gradient_scale=(self.gradient_scale >= 0, "at least 0"))

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return the scores from `statistics.input_norm`, `gradient` and `sequences`, (out, in)."""
        assert statistics.gradient is not None, "calibration measures what a criterion needs"
        norm = _input_norm(statistics) / statistics.sequences**0.5
        return torch.add(norm, statistics.gradient, alpha=self.gradient_scale).mul_(weight.abs())


@dataclass(frozen=True)
class Criterion:
    """A criterion of your own: a function that returns scores, and the statistics that it needs.

    Args:
        score: a function (weight (out, in), `Statistics`) -> scores (out, in). Scores must be finite. Entries with the
            highest scores are kept.
        group: the entries that are compared with each other unless the caller chooses: "row" (one output), "matrix"
            or "model".
        needs: which statistics calibration has to measure: "inputs" (norms), "moments" (mean and variance),
            "hessian", "gradients". With an entry here, calibration is required.

    Raises:
        TypeError: `score` is not callable.
        ValueError: `group` or an entry of `needs` is unknown.
    """

    score: Score
    group: Group
    needs: tuple[Need, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.score):
            raise TypeError(
                "`score` must be a function (weight, statistics) -> scores, got "
                f"{type(self.score).__name__}. For SparseGPT use `SparseGPT()`."
            )
        if self.group not in GROUPS:
            raise ValueError(f"`group` must be one of {', '.join(map(repr, GROUPS))}, got {self.group!r}.")
        if not set(self.needs) <= set(get_args(Need)):
            needs = ", ".join(map(repr, get_args(Need)))
            raise ValueError(f'`needs` must be a tuple of {needs}, such as ("inputs",), got {self.needs!r}.')


CRITERIA: dict[str, type] = {
    "magnitude": Magnitude,
    "random": Random,
    "wanda": Wanda,
    "ria": RIA,
    "sparsegpt": SparseGPT,
    "gblm": GBLM,
}

CriterionLike = str | Score | ScoringCriterion | SparseGPT


def find_criterion(criterion: CriterionLike) -> tuple[str, ScoringCriterion | SparseGPT]:
    """Return what reports call a criterion, and its value.

    Args:
        criterion: a name of `CRITERIA`, a value of one of its classes, a `Criterion`, or a plain function. A plain
            function compares within each matrix and is given the input norms if there is calibration.

    Raises:
        ValueError: there is no such criterion.
    """
    if isinstance(criterion, Criterion):
        return _name_of(criterion.score), criterion
    if callable(criterion) and not isinstance(criterion, type):
        return _name_of(criterion), Criterion(criterion, group="matrix")
    value = chosen(
        "criterion", CRITERIA, criterion, also=" A function (weight, statistics) -> scores is also accepted."
    )
    return spelled(CRITERIA, value), value


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _input_norm(statistics: Statistics) -> Tensor:
    assert statistics.input_norm is not None, "calibration measures what a criterion needs"
    return statistics.input_norm
