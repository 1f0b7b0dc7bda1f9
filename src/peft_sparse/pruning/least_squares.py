"""Masked least squares: updates the kept weights to lower the output error for a fixed mask."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.statistics import Need, Statistics
from .choices import check_numbers


@dataclass(frozen=True)
class LeastSquares:
    """An update of the kept weights for a fixed mask: W' near argmin ‖X(W' - W)ᵀ‖² + λ‖W' - W‖².

    W (out, in) is the dense weight, X (tokens, in) its input on the calibration data, and W' is zero wherever the mask
    is False. Each row is a least-squares problem of its own. The solver runs conjugate gradients on all rows together,
    so it comes near the minimiser and does not reach it exactly. λ > 0 keeps the problem well conditioned in float32.

    Args:
        damping: λ, as a fraction of the mean of the diagonal of XᵀX, at least 0.
        tolerance: the solver stops once two iterations together lower what is minimised, summed over all rows, by no
            more than this fraction of it; at least 0.
        max_iterations: the solver stops after this many iterations, at least 1.

    Raises:
        ValueError: a number is outside its range; in `solve`, the result is not finite.
    """

    damping: float = 0.01
    tolerance: float = 5e-4
    max_iterations: int = 200

    needs: ClassVar[tuple[Need, ...]] = ("hessian",)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            damping=(self.damping >= 0, "at least 0"),
            tolerance=(self.tolerance >= 0, "at least 0"),
            max_iterations=(self.max_iterations >= 1, "at least 1"),
        )

    def solve(self, weight: Tensor, mask: Tensor, statistics: Statistics, start: Tensor | None = None) -> Tensor:
        """Return the updated weight (out, in) for the dense `weight` (out, in) and `mask` (out, in)."""
        assert statistics.hessian is not None, "calibration measures what an update needs"
        return masked_least_squares(
            weight,
            mask,
            statistics.hessian,
            start=start,
            damping=self.damping,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )


def find_update(update: bool | LeastSquares) -> LeastSquares | None:
    """Return the value that `update` stands for: True is `LeastSquares()`, False is None.

    Raises:
        TypeError: `pattern` or `update` has another type than these.
    """
    if isinstance(update, LeastSquares):
        return update
    if not isinstance(update, bool):
        raise TypeError(f"`update` must be True, False or a `LeastSquares`, got {update!r}.")
    return LeastSquares() if update else None


def masked_least_squares(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    *,
    start: Tensor | None = None,
    damping: float = 0.01,
    tolerance: float = 5e-4,
    max_iterations: int = 200,
) -> Tensor:
    """Return W' near argmin ‖X(W' - W)ᵀ‖² + λ‖W' - W‖², where W' is zero wherever `mask` is False, (out, in).

    Each row is a least-squares problem of its own on its kept columns. All rows are solved together by conjugate
    gradients on M ⊙ ((W' - W)(XᵀX + λI)) with the diagonal as preconditioner. An iteration takes one matrix product,
    and no row is factorised. Apart from rounding, the objective falls with every iteration. `tolerance` and
    `max_iterations` decide how near the result is to the minimiser. λ > 0 keeps the problem well conditioned in
    float32.

    Args:
        weight: the dense W, (out, in).
        mask: True = kept, (out, in).
        hessian: XᵀX, (in, in), float32 or wider, of any scale.
        start: the first W', (out, in). By default M ⊙ W.
        damping: λ as a fraction of the mean of the diagonal of XᵀX.
        tolerance: stop once two iterations together lower the objective of all rows by no more than this fraction of
            it.
        max_iterations: stop after this many iterations.

    Raises:
        ValueError: the result is not finite.
    """
    target = weight.to(hessian.dtype)
    numeric = mask.to(hessian.dtype)
    solution = target * numeric if start is None else start.to(hessian.dtype) * numeric
    diagonal = hessian.diagonal()
    ridge = damping * diagonal.mean()
    inverse = (diagonal + ridge).clamp_min(torch.finfo(hessian.dtype).tiny).reciprocal()
    # The weights of an input that was never active do not change the error: they stay as they are.
    inverse = torch.where(diagonal > 0, inverse, torch.zeros_like(inverse))

    def product(matrix: Tensor) -> Tensor:
        return torch.addmm(matrix * ridge, matrix, hessian)

    difference = target - solution
    residual = product(difference)
    objective = (difference * residual).sum()
    del difference
    residual.mul_(numeric)
    step = residual * inverse
    energy = (residual * step).sum(1, keepdim=True)
    falls: list[Tensor] = []
    for _ in range(max_iterations):
        moved = product(step).mul_(numeric)
        length = energy / (step * moved).sum(1, keepdim=True)
        # A row that has converged divides zero by zero.
        length = length.nan_to_num_(0.0, 0.0, 0.0)
        solution.addcmul_(length, step)
        residual.addcmul_(length, moved, value=-1)
        # A step lowers the objective by exactly this much.
        falls.append((length * energy).sum())
        preconditioned = residual * inverse
        before, energy = energy, (residual * preconditioned).sum(1, keepdim=True)
        step = preconditioned.addcmul_((energy / before).nan_to_num_(0.0, 0.0, 0.0), step)
        # The host waits for the device here, so it asks only after every second iteration.
        if len(falls) == 2:
            fall = falls.pop() + falls.pop()
            objective -= fall
            if bool(fall <= tolerance * objective):
                break
    if not solution.isfinite().all():
        raise ValueError(
            "Expected a finite solution of the masked least squares, got NaN or infinity. Check the calibration data."
        )
    return solution
