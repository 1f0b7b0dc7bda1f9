"""Pruning criteria: (weight, input norm) -> scores, one pure function each, all of one signature. Higher = kept.

Third link of the chain: no layers, no masks, nothing is written. Add a criterion by writing its function and its row
in `CRITERIA`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import Group


def magnitude(weight: Tensor, input_norm: Tensor | None = None) -> Tensor:
    """S = |W|, shape (out, in). Han et al. 2015, arXiv:1506.02626."""
    return weight.abs()


def random(weight: Tensor, input_norm: Tensor | None = None) -> Tensor:
    """S ~ U[0, 1) from torch's global generator: seed it with `torch.manual_seed` for a repeatable mask."""
    return torch.rand(weight.shape, device=weight.device)


def wanda(weight: Tensor, input_norm: Tensor | None = None) -> Tensor:
    """S_ij = |W_ij| · ||X_j||_2, shape (out, in). Sun et al. 2023, arXiv:2306.11695, section 3.

    Args:
        weight: W, (out, in).
        input_norm: ||X_j||_2 over all calibration tokens, (in,), float32.
    """
    assert input_norm is not None, "the calibration engine supplies the input norm of every criterion that needs it"
    return weight.abs().float() * input_norm


@dataclass(frozen=True)
class Criterion:
    """How a criterion is used: its scores, the group its paper compares within, and whether it needs calibration."""

    score: Callable[[Tensor, Tensor | None], Tensor]
    group: Group
    needs_inputs: bool


CRITERIA = {
    "magnitude": Criterion(magnitude, group="matrix", needs_inputs=False),
    "random": Criterion(random, group="matrix", needs_inputs=False),
    "wanda": Criterion(wanda, group="row", needs_inputs=True),
}


def find_criterion(name: str) -> Criterion:
    """Return the criterion called `name`.

    Raises:
        ValueError: no such criterion.
    """
    if name not in CRITERIA:
        raise ValueError(f"Unknown criterion {name!r}. Choose one of {', '.join(map(repr, CRITERIA))}.")
    return CRITERIA[name]
