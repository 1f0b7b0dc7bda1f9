"""Pruning criteria: (weight, statistics) -> scores, one pure function each, all of one signature. Higher = kept.

No layers, no masks, nothing is written. Add a criterion by writing its function and its row
in `CRITERIA`. SparseGPT is a solver, which chooses and updates at once: it has its row here and its own file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..calibration.statistics import Need, Statistics
from .patterns import GROUPS, Group


Score = Callable[[Tensor, Statistics], Tensor]

# What GBLM-Pruner multiplies gradients by before it adds them to the activations' term.
GRADIENT_SCALE = 100.0


def magnitude(weight: Tensor, statistics: Statistics) -> Tensor:
    """S = |W|, shape (out, in). Han et al. 2015, arXiv:1506.02626."""
    return weight.abs()


def random(weight: Tensor, statistics: Statistics) -> Tensor:
    """S ~ U[0, 1) from torch's global generator: seed it with `torch.manual_seed` for a repeatable mask."""
    return torch.rand(weight.shape, device=weight.device)


def wanda(weight: Tensor, statistics: Statistics) -> Tensor:
    """S_ij = |W_ij| · ||X_j||_2, shape (out, in). Sun et al. 2023, arXiv:2306.11695, section 3."""
    return weight.abs().float() * _input_norm(statistics)


def ria(weight: Tensor, statistics: Statistics) -> Tensor:
    """S_ij = (|W_ij| / Σ_k |W_kj| + |W_ij| / Σ_k |W_ik|) · ||X_j||_2^a, a = 1/2, shape (out, in).

    Relative importance and activations: Zhang et al. 2024, "Plug-and-Play", ICLR, section 3.
    """
    size = weight.abs().float()
    # A row or column of zeros has nothing to compare: its entries score zero.
    tiny = torch.finfo(torch.float32).tiny
    by_column = size.sum(0).clamp_min_(tiny).reciprocal_()
    by_row = size.sum(1, keepdim=True).clamp_min_(tiny).reciprocal_()
    return size.mul_(by_column + by_row).mul_(_input_norm(statistics).sqrt())


def gblm(weight: Tensor, statistics: Statistics) -> Tensor:
    """S_ij = |W_ij| · (||X_j||_2 / √N + 100 · Σ_n |∂L_n/∂W_ij|) over N sequences n, shape (out, in).

    The paper's l1 variant with its α = 100; the two terms are weighed by these constants, so S depends on N and on the
    length of the sequences, as it does there. Das et al. 2023, arXiv:2311.04902, section 3.
    """
    assert statistics.gradient is not None, "the calibration engine supplies what a criterion needs"
    norm = _input_norm(statistics) / statistics.sequences**0.5
    return torch.add(norm, statistics.gradient, alpha=GRADIENT_SCALE).mul_(weight.abs())


@dataclass(frozen=True)
class Criterion:
    """How a criterion is used.

    Args:
        score: (weight (out, in), `Statistics`) -> scores (out, in), higher = kept, finite. None for SparseGPT, whose
            solver chooses and updates at once.
        group: the group that is compared unless the caller chooses: "row", "matrix" or "model".
        needs: which statistics calibration has to measure: "inputs" (their norms), "moments" (mean and variance),
            "hessian", "gradients".

    Raises:
        ValueError: another group, or another need.
    """

    score: Score | None
    group: Group
    needs: tuple[Need, ...] = ()

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"`group` must be one of {', '.join(map(repr, GROUPS))}, got {self.group!r}.")
        if not set(self.needs) <= set(get_args(Need)):
            needs = ", ".join(map(repr, get_args(Need)))
            raise ValueError(f'`needs` must be a tuple of {needs}, such as ("inputs",), got {self.needs!r}.')


CRITERIA = {
    "magnitude": Criterion(magnitude, group="matrix"),
    "random": Criterion(random, group="matrix"),
    "wanda": Criterion(wanda, group="row", needs=("inputs",)),
    "ria": Criterion(ria, group="matrix", needs=("inputs",)),
    "sparsegpt": Criterion(None, group="matrix", needs=("hessian",)),
    "gblm": Criterion(gblm, group="row", needs=("inputs", "gradients")),
}


def find_criterion(criterion: str | Score | Criterion) -> tuple[str, Criterion]:
    """Return the name and the use of a criterion: one of `CRITERIA` by name, a `Criterion`, or a function.

    A plain function compares within each matrix, and is given the input norms if there is calibration.

    Raises:
        ValueError: no such criterion.
    """
    if isinstance(criterion, Criterion):
        return getattr(criterion.score, "__name__", type(criterion.score).__name__), criterion
    if callable(criterion):
        return getattr(criterion, "__name__", type(criterion).__name__), Criterion(criterion, group="matrix")
    if criterion not in CRITERIA:
        raise ValueError(
            f"Unknown criterion {criterion!r}. Choose one of {', '.join(map(repr, CRITERIA))}, or pass a function "
            "(weight, statistics) -> scores."
        )
    return criterion, CRITERIA[criterion]


def _input_norm(statistics: Statistics) -> Tensor:
    assert statistics.input_norm is not None, "the calibration engine supplies what a criterion needs"
    return statistics.input_norm
