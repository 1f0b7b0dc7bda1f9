"""Compares tensors, and finds the leaves of a call that stand for what earlier calls returned."""

import torch
from torch import Tensor

from .recording import Call, Link
from .runner import BlockRunner


def close(one: Tensor, other: Tensor, precision: float | None = None) -> bool:
    """Return whether two tensors are equal, or differ by rounding alone."""
    if one.shape != other.shape:
        return False
    other = other.to(one.device)
    if torch.equal(one, other):
        return True
    if not one.is_floating_point() or not other.is_floating_point():
        return bool((one == other).all())
    if precision is None:
        precision = 1e-4 if one.dtype in (torch.float32, torch.float64) else 0.02
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return bool((one - other).norm() <= precision * other.norm())


def linked_leaves(runner: BlockRunner, call: int, filled: Call) -> set[int]:
    """Return the ids of those leaves of `filled` that come from earlier calls. Call number `call` is its record."""
    places = zip(runner.batches[0].calls[call].leaves, filled.leaves, strict=True)
    return {id(leaf) for place, leaf in places if isinstance(place, Link)}
