"""The best values of the kept weights for a fixed mask: masked least squares, all rows at once."""

import torch
from torch import Tensor


MAX_ITERATIONS = 200


def masked_least_squares(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    *,
    start: Tensor | None = None,
    damping: float = 0.01,
    tolerance: float = 1e-3,
    max_iterations: int = MAX_ITERATIONS,
) -> Tensor:
    """Return argmin over W' of ||(W' - W)X||² + λ||W' - W||² with W' zero wherever `mask` is False, (out, in).

    Every row is its own least-squares problem on its own kept columns. All are solved together by conjugate gradients
    on M ⊙ ((W' - W)(XᵀX + λI)), preconditioned by the diagonal: one matrix product each step, no factorisation per
    row, and but for rounding the error falls with every step. With λ = 0 and enough steps this is the exact minimiser;
    in float32 on ill-conditioned inputs keep λ > 0.

    Args:
        weight: dense W, (out, in).
        mask: True = kept, (out, in).
        hessian: XᵀX, (in, in), float32 or wider, of any scale.
        start: W' to start from; by default M ⊙ W.
        damping: λ as a fraction of the mean of the diagonal of XᵀX.
        tolerance: stop once every row's gradient has fallen to this fraction of what it was.
        max_iterations: stop after this many steps at the latest.

    Raises:
        ValueError: the result is not finite.
    """
    target = weight.to(hessian.dtype)
    numeric = mask.to(hessian.dtype)
    solution = target * numeric if start is None else start.to(hessian.dtype) * numeric
    diagonal = hessian.diagonal()
    ridge = damping * diagonal.mean()
    inverse = (diagonal + ridge).clamp_min(torch.finfo(hessian.dtype).tiny).reciprocal()
    # An input that was never active has no say: its weights stay as they are.
    inverse = torch.where(diagonal > 0, inverse, torch.zeros_like(inverse))

    def product(matrix: Tensor) -> Tensor:
        return torch.addmm(matrix * ridge, matrix, hessian).mul_(numeric)

    residual = product(target - solution)
    step = residual * inverse
    energy = (residual * step).sum(1, keepdim=True)
    first = energy.clone()
    for iteration in range(max_iterations):
        moved = product(step)
        length = energy / (step * moved).sum(1, keepdim=True)
        # Rows that have arrived divide zero by zero.
        length = length.nan_to_num_(0.0, 0.0, 0.0)
        solution.addcmul_(length, step)
        residual.addcmul_(length, moved, value=-1)
        preconditioned = residual * inverse
        before, energy = energy, (residual * preconditioned).sum(1, keepdim=True)
        step = preconditioned.addcmul_((energy / before).nan_to_num_(0.0, 0.0, 0.0), step)
        # Asked now and then only: the answer makes the host wait for the device.
        if iteration % 10 == 9 and bool((energy <= tolerance**2 * first).all()):
            break
    if not solution.isfinite().all():
        raise ValueError(
            "Expected a finite solution of the masked least squares, got NaN or infinity. Check the calibration data."
        )
    return solution
