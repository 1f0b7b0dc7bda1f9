"""Statistics of the inputs of one weight: running sums while inputs are measured, and `Statistics`, the result."""

from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from .memory import empty_apart


Need = Literal["inputs", "moments", "hessian", "gradients"]


@dataclass(frozen=True)
class Statistics:
    """What calibration has measured for one weight W (out, in). A statistic that was not measured is None.

    X (tokens, in) is the input of the weight on all calibration tokens that are not padding. X_j is the column of
    input j. The outputs are X Wᵀ (tokens, out), which the papers write as WX. Statistics are float32, or float64 where
    the inputs are float64.

    Args:
        input_norm: ||X_j||_2, (in,).
        hessian: XᵀX, (in, in).
        gradient: Σ_n |∂L_n/∂W| over the calibration sequences n, (out, in), always float32. L_n is the model's loss of
            sequence n.
        tokens: number of rows of X.
        sequences: number of calibration sequences.
        input_mean: mean of X_j, (in,).
        input_variance: mean of (X_j - mean of X_j)², (in,).
    """

    input_norm: Tensor | None = None
    hessian: Tensor | None = None
    gradient: Tensor | None = None
    tokens: int = 0
    sequences: int = 0
    input_mean: Tensor | None = None
    input_variance: Tensor | None = None


# Number of rows of X that a relative output error is estimated on, and the number that is allocated together.
SAMPLED_TOKENS = 1024
_ROOM = 256


def sampled_per_batch(batches: int) -> int:
    """Return the number of rows of X that are kept of each batch. A batch with fewer rows is kept whole."""
    return -(-SAMPLED_TOKENS // batches)


def rows_taken(batches: list[int]) -> int:
    """Return for how many rows of X memory is taken, for batches of these numbers of rows."""
    taken = free = 0
    for rows in batches:
        count = min(rows, sampled_per_batch(len(batches)))
        if count > free:
            free = _rows_of_room(count)
            taken += free
        free -= count
    return taken


def _rows_of_room(count: int) -> int:
    """Return for how many rows memory is taken together, if batches give `count` of them each."""
    return count * max(1, _ROOM // max(count, 1))


@dataclass
class InputStatistics:
    """Running sums over the rows of one input X (tokens, in), in float32 or a wider dtype.

    In a convolution with groups, each group has inputs of its own. X is then (groups, tokens, in), and every sum has a
    first dimension for the groups.

    Args:
        hessian_wanted: whether XᵀX is summed.
        rows_per_batch: number of rows that are kept of each batch, for `sampled`.
        moments_wanted: whether mean and variance are wanted.
        norm_squared: ||X_j||² so far, (in,). With a Hessian it is its diagonal, and is set by `finish`.
        total: Σ X_j so far, (in,).
        hessian: XᵀX so far, (in, in). Before `finish`, only panels on and above its diagonal are valid.
        tokens: number of rows so far.
        updates: number of batches so far.
        rooms: the memory of the rows that are kept. The last tensor may have rows that are not used yet.
    """

    hessian_wanted: bool = False
    rows_per_batch: int = SAMPLED_TOKENS
    moments_wanted: bool = False
    norm_squared: Tensor | None = None
    total: Tensor | None = None
    hessian: Tensor | None = None
    tokens: int = 0
    updates: int = 0
    rooms: list[Tensor] = field(default_factory=list)
    _used: int = 0

    def update(self, rows: Tensor) -> None:
        """Add `rows` (tokens, in), or (groups, tokens, in), to all sums."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        self._keep(spread_rows(rows, self.rows_per_batch))
        self.tokens += rows.shape[-2]
        self.updates += 1
        self.start((*rows.shape[:-2], rows.shape[-1]), dtype, rows.device)
        if self.total is not None:
            self.total += rows.sum(-2, dtype=torch.float64)
        if self.hessian is not None:
            _add_upper_gram(self.hessian, rows.to(dtype))
        elif self.norm_squared is not None:
            # Not `vector_norm`: over the first dimension it takes seven times as long on CPUs.
            self.norm_squared += rows.to(dtype).square().sum(-2)

    def _keep(self, rows: Tensor) -> None:
        count = rows.shape[-2]
        if not self.rooms or self._used + count > self.rooms[-1].shape[-2]:
            self.rooms = self.sampled
            self.rooms.append(empty_apart((*rows.shape[:-2], _rows_of_room(count), rows.shape[-1]), rows, rows.device))
            self._used = 0
        self.rooms[-1].narrow(-2, self._used, count).copy_(rows)
        self._used += count

    @property
    def sampled(self) -> list[Tensor]:
        """The rows that are kept, in the order in which they came, as tensors (rows, in)."""
        return [*self.rooms[:-1], *(room.narrow(-2, 0, self._used) for room in self.rooms[-1:])]

    def start(self, columns: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Set each sum that is wanted to zero, unless it has been started. `columns` is (in,) or (groups, in)."""
        if self.moments_wanted and self.total is None:
            # In float64: where the mean is far from zero, the variance is a small difference of large numbers.
            self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        if self.hessian_wanted and self.hessian is None:
            self.hessian = torch.zeros(*columns, columns[-1], dtype=dtype, device=device)
        elif not self.hessian_wanted and self.norm_squared is None:
            self.norm_squared = torch.zeros(columns, dtype=dtype, device=device)

    @property
    def sums(self) -> list[Tensor]:
        """The sums so far, which processes that share the tokens add up."""
        return [tensor for tensor in (self.total, self.hessian, self.norm_squared) if tensor is not None]

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape of the norms, which `start` takes."""
        sums = self.sums[-1]
        return tuple(sums.shape if self.hessian is None else sums.shape[:-1])

    def finish(self) -> None:
        """Complete the Hessian. Call it once, after the last update."""
        if self.hessian is not None:
            self.norm_squared = self.hessian.diagonal(dim1=-2, dim2=-1).clone()
            _mirror(self.hessian)

    @property
    def input_norm(self) -> Tensor:
        """||X_j||_2, (in,)."""
        assert self.norm_squared is not None, "no inputs were seen"
        return self.norm_squared.sqrt()

    @property
    def mean(self) -> Tensor | None:
        """Mean of X_j, (in,). None if moments were not wanted."""
        return None if self.total is None else (self.total / self.tokens).to(self.input_norm.dtype)

    @property
    def variance(self) -> Tensor | None:
        """Variance of X_j around its mean, (in,). None if moments were not wanted."""
        if self.total is None or self.norm_squared is None:
            return None
        squares = self.norm_squared.double() / self.tokens
        return (squares - (self.total / self.tokens).square()).clamp_min_(0).to(self.norm_squared.dtype)


@dataclass
class BlockStatistics:
    """Statistics of the weights of one block.

    Args:
        inputs: statistics of the inputs of each weight, by its name, in the order in which the inputs came. Weights
            with the same inputs have the same entry.
        output_squares: Σ ||W x||² over the rows x that `sample` returns, for weights whose outputs were observed.
        shared: whether processes share the batches. The rows of `sample` and `output_squares` are then of this
            process alone, and the other statistics are over the batches of all processes.
    """

    inputs: dict[str, InputStatistics]
    output_squares: dict[str, Tensor] = field(default_factory=dict)
    shared: bool = False

    def of(self, name: str, gradient: Tensor | None = None, sequences: int = 0) -> Statistics:
        """Return the statistics of the weight `name`. `by_group` takes those of a convolution with groups apart.

        Args:
            name: name of the weight.
            gradient: Σ_n |∂L_n/∂W|, if it was measured.
            sequences: number of calibration sequences.
        """
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

    def sample(self, name: str) -> list[Tensor]:
        """Return some rows of X of the weight `name`, as tensors (rows, in), or (groups, rows, in).

        There are none if this process measured none.
        """
        return self.inputs[name].sampled


def by_group(statistics: Statistics, matrix: Tensor) -> list[tuple[Tensor, Statistics]]:
    """Return the rows of `matrix` (out, in) whose inputs are the same, and the statistics of these inputs.

    These are all rows, but for a convolution with groups: then there is one entry per group.
    """
    measured = (statistics.input_norm, statistics.hessian, statistics.input_mean, statistics.input_variance)
    if statistics.input_norm is None or statistics.input_norm.dim() == 1:
        return [(matrix, statistics)]
    groups = len(statistics.input_norm)
    parts = zip(*(repeat(None, groups) if stat is None else stat.unbind() for stat in measured), strict=True)
    gradients = repeat(None, groups) if statistics.gradient is None else statistics.gradient.chunk(groups)
    names = ("gradient", "input_norm", "hessian", "input_mean", "input_variance")
    return [
        (rows, replace(statistics, **dict(zip(names, (gradient, *own), strict=True))))
        for rows, gradient, own in zip(matrix.chunk(groups), gradients, parts, strict=True)
    ]


def spread_rows(rows: Tensor, count: int) -> Tensor:
    """Return `count` of `rows` (..., rows, columns), evenly spread, or all rows if there are fewer."""
    there = rows.shape[-2]
    kept = min(there, count)
    return rows.index_select(-2, torch.arange(kept, device=rows.device) * there // max(kept, 1))


# Columns of a Hessian that are summed together: enough for a matrix product to run at full speed.
_PANEL = 512


def _add_upper_gram(hessian: Tensor, rows: Tensor) -> None:
    """Add XᵀX in panels of columns, on and above the diagonal: almost half of the work, if there are many columns."""
    for start in range(0, rows.shape[-1], _PANEL):
        panel = hessian[..., start : start + _PANEL, start:]
        add_product = panel.addmm_ if rows.dim() == 2 else panel.baddbmm_
        add_product(rows[..., start : start + _PANEL].mT, rows[..., start:])


def _mirror(hessian: Tensor) -> None:
    for start in range(_PANEL, hessian.shape[-1], _PANEL):
        hessian[..., start : start + _PANEL, :start] = hessian[..., :start, start : start + _PANEL].mT
