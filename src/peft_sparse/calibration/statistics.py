"""What is known of the inputs of one weight: running sums while it is measured, `Statistics` for who uses them."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


Need = Literal["inputs", "moments", "hessian", "gradients"]


@dataclass(frozen=True)
class Statistics:
    """What calibration tells of one weight W (out, in); what was not measured is None.

    Args:
        input_norm: ||X_j||_2 over all calibration tokens that are not padding, (in,), float32.
        hessian: XᵀX over the same tokens, (in, in), float32.
        gradient: Σ_n |∂L_n/∂W| over the calibration sequences n, (out, in), float32.
        input_mean, input_variance: mean and variance of X_j over the same tokens, (in,), float32.
        tokens: tokens that were measured.
        sequences: calibration sequences.
    """

    input_norm: Tensor | None = None
    hessian: Tensor | None = None
    gradient: Tensor | None = None
    tokens: int = 0
    sequences: int = 0
    input_mean: Tensor | None = None
    input_variance: Tensor | None = None


# Rows of X that a relative output error is estimated on.
SAMPLED_TOKENS = 1024


def sampled_per_batch(batches: int) -> int:
    """Return how many rows of X are kept of each batch; of a batch with fewer, all are."""
    return -(-SAMPLED_TOKENS // batches)


@dataclass
class InputStatistics:
    """Running statistics of one input X (tokens, in), in float32 or wider."""

    hessian_wanted: bool = False
    rows_per_batch: int = SAMPLED_TOKENS
    moments_wanted: bool = False
    norm_squared: Tensor | None = None
    total: Tensor | None = None
    hessian: Tensor | None = None
    sampled: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    updates: int = 0

    def update(self, rows: Tensor) -> None:
        """Add `rows` (tokens, in)."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        self.sampled.append(_spread(rows, self.rows_per_batch))
        self.tokens += len(rows)
        self.updates += 1
        self.start(rows.shape[1], dtype, rows.device)
        if self.total is not None:
            self.total += rows.sum(0, dtype=torch.float64)
        if self.hessian is not None:
            _add_upper_gram(self.hessian, rows.to(dtype))
        elif self.norm_squared is not None:
            # Not `vector_norm`, which takes seven times as long over the first dimension on CPUs.
            self.norm_squared += rows.to(dtype).square().sum(0)

    def start(self, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        """Begin all sums at zero that have not begun."""
        if self.moments_wanted and self.total is None:
            # Wide, because the variance is a difference of large numbers where the mean is far from zero.
            self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        if self.hessian_wanted and self.hessian is None:
            self.hessian = torch.zeros(columns, columns, dtype=dtype, device=device)
        elif not self.hessian_wanted and self.norm_squared is None:
            self.norm_squared = torch.zeros(columns, dtype=dtype, device=device)

    @property
    def sums(self) -> list[Tensor]:
        """What has been summed over tokens so far, of which processes may have a part each."""
        return [tensor for tensor in (self.total, self.hessian, self.norm_squared) if tensor is not None]

    def finish(self) -> None:
        """Complete the Hessian, of which only the part above the diagonal is summed."""
        if self.hessian is not None:
            self.norm_squared = self.hessian.diagonal().clone()
            _mirror(self.hessian)

    @property
    def input_norm(self) -> Tensor:
        """||X_j||_2, (in,)."""
        assert self.norm_squared is not None, "no inputs were seen"
        return self.norm_squared.sqrt()

    @property
    def mean(self) -> Tensor | None:
        """Mean of X_j, (in,); None if it was not wanted."""
        return None if self.total is None else (self.total / self.tokens).to(self.input_norm.dtype)

    @property
    def variance(self) -> Tensor | None:
        """Variance of X_j around its mean, (in,); None if it was not wanted."""
        if self.total is None or self.norm_squared is None:
            return None
        squares = self.norm_squared.double() / self.tokens
        return (squares - (self.total / self.tokens).square()).clamp_min_(0).to(self.norm_squared.dtype)


@dataclass
class BlockStatistics:
    """The statistics of one block's weights.

    Args:
        inputs: those of each weight's inputs, by its name, in the order in which they came.
        output_squares: ||W x||² summed over the rows that `sample` returns, of weights whose outputs were seen.
        shared: whether the rows are this process's share; all else is of the batches of all processes.
    """

    inputs: dict[str, InputStatistics]
    output_squares: dict[str, Tensor] = field(default_factory=dict)
    shared: bool = False

    def of(self, name: str, gradient: Tensor | None = None, sequences: int = 0) -> Statistics:
        """Return what a criterion may know of the weight called `name`."""
        measured = self.inputs[name]
        return Statistics(
            measured.input_norm,
            measured.hessian,
            gradient,
            measured.tokens,
            sequences,
            measured.mean,
            measured.variance,
        )

    def sample(self, name: str) -> Tensor:
        """Return some rows of X of the weight called `name`, (rows, in); none where this process saw none."""
        norms, sampled = self.inputs[name].input_norm, self.inputs[name].sampled
        return torch.cat(sampled) if sampled else norms.new_zeros(0, len(norms))


def _spread(rows: Tensor, count: int) -> Tensor:
    """Return `count` of `rows`, evenly spread; all of them if there are fewer."""
    kept = min(len(rows), count)
    return rows[torch.arange(kept, device=rows.device) * len(rows) // max(kept, 1)]


# Columns of a Hessian that are summed together: wide enough for a matrix product to run at full speed.
_PANEL = 512


def _add_upper_gram(hessian: Tensor, rows: Tensor) -> None:
    """Add XᵀX on and above the diagonal, in panels: for many columns almost half of the work."""
    for start in range(0, rows.shape[1], _PANEL):
        hessian[start : start + _PANEL, start:].addmm_(rows[:, start : start + _PANEL].T, rows[:, start:])


def _mirror(hessian: Tensor) -> None:
    for start in range(_PANEL, hessian.shape[0], _PANEL):
        hessian[start : start + _PANEL, :start] = hessian[:start, start : start + _PANEL].T
