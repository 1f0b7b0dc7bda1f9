"""What solvers that work row by row share: chunks of rows, the dtype they compute in, the error of each row."""

import torch
from torch import Tensor


# Rows are processed in chunks, so that no temporary tensor has more elements than this. On CPUs small tensors stay in
# the cache; on accelerators large tensors need fewer kernel launches.
_CHUNK = 1 << 22
_CHUNK_OF_ACCELERATORS = 1 << 26


@torch.no_grad()
def row_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """Return ‖X(w - w')‖² = (w - w')ᵀ H (w - w') of each row, (out,), float32 (float64 if `weight` is).

    Args:
        weight: W, (out, in).
        pruned: W', (out, in); or a mask M of dtype bool, (out, in), which stands for W' = W ⊙ M.
        hessian: H = XᵀX, (in, in).
    """
    dtype = computed_in(weight)
    weight = weight.to(dtype)
    difference = weight.masked_fill(pruned, 0) if pruned.dtype == torch.bool else weight - pruned.to(dtype)
    return (difference @ hessian.to(dtype)).mul_(difference).sum(1)


def rows_of_chunk(weight: Tensor, elements_of_row: int) -> int:
    """Return how many rows of `weight` are refined at once if each row takes `elements_of_row` elements."""
    chunk = _CHUNK if weight.device.type == "cpu" else _CHUNK_OF_ACCELERATORS
    return max(1, chunk // elements_of_row)


def computed_in(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
