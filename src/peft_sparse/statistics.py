"""Measures what criteria need to know of a block's weights, while a `BlockRunner` runs it on calibration data.

Inputs that several weights share, such as those of the query, key and value projections, are measured once.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .calibration import Activations, Batch, BlockRunner, Call, Residence, stack_runners
from .criteria import Need, Statistics
from .observing import observed
from .weights import WeightView


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

    def update(self, rows: Tensor) -> None:
        """Add `rows` (tokens, in)."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        count = len(rows)
        kept = min(count, self.rows_per_batch)
        self.sampled.append(rows[torch.arange(kept, device=rows.device) * count // max(kept, 1)])
        self.tokens += count
        if self.moments_wanted:
            # Wide, because the variance is a difference of large numbers where the mean is far from zero.
            total = rows.sum(0, dtype=torch.float64)
            self.total = total if self.total is None else self.total.add_(total)
        if self.hessian_wanted:
            rows = rows.to(dtype)
            if self.hessian is None:
                self.hessian = torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype, device=rows.device)
            _add_upper_gram(self.hessian, rows)
        else:
            squared = torch.linalg.vector_norm(rows, dim=0, dtype=dtype).square_()
            self.norm_squared = squared if self.norm_squared is None else self.norm_squared.add_(squared)

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
    """The statistics of one block's weights; `inputs` maps a weight's name to those of its inputs, as they came."""

    inputs: dict[str, InputStatistics]

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
        """Return some rows of X of the weight called `name`, (rows, in)."""
        return torch.cat(self.inputs[name].sampled)


def measure(
    model: nn.Module, runner: BlockRunner, index: int, weights: dict[str, WeightView], needs: tuple[Need, ...]
) -> BlockStatistics:
    """Run block `index` of `runner` and return the statistics of the inputs of `weights`, which lie inside it.

    Raises:
        ValueError: as `measure_inputs`.
    """
    return measure_inputs(model, weights, needs, len(runner.batches), partial(runner.run, index))


def measured_blocks(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    inside: Callable[[str], dict[str, WeightView]],
    needs: tuple[Need, ...],
    activations: Activations,
    residence: Residence,
) -> Iterator[tuple[str, BlockStatistics]]:
    """Yield each weight's name with the statistics of its block, block by block, measured on the model as it is.

    Args:
        inside: block -> the weights to measure in it.

    Raises:
        ValueError: as `measure_inputs`.
    """
    for runner in stack_runners(model, inputs, activations=activations, residence=residence):
        for index, block in enumerate(tqdm(runner.names, desc="measuring", unit="block", disable=None)):
            weights = inside(block)
            with runner.resident(index):
                if weights:
                    measured = measure(model, runner, index, weights, needs)
                    yield from ((name, measured) for name in weights)
                if index < len(runner.names) - 1:
                    runner.advance(index)


def measure_inputs(
    model: nn.Module,
    weights: dict[str, WeightView],
    needs: tuple[Need, ...],
    batches: int,
    run: Callable[[Callable[[Batch, Call], None]], None],
) -> BlockStatistics:
    """Return the statistics of the inputs that `weights` get while `run(before_batch)` runs all batches.

    Raises:
        ValueError: a weight received no input, inputs that are all zero, or inputs that are not finite.
    """
    leaders: dict[str, str] = {}
    measured: dict[str, InputStatistics] = {}
    quota = sampled_per_batch(batches)

    def record(name: str, leader: str, rows: Callable[[], Tensor]) -> None:
        known = leaders.setdefault(name, leader)
        if known != leader:
            raise RuntimeError(
                f"Expected the inputs of {name!r} to be those of {known!r} on every batch, got those of {leader!r}. "
                "Prune these layers in separate calls with `target_modules`."
            )
        if name == leader:
            if name not in measured:
                measured[name] = InputStatistics("hessian" in needs, quota, "moments" in needs)
            measured[name].update(rows())

    with observed(model, weights, record) as before_batch:
        run(before_batch)
    for statistics in measured.values():
        statistics.finish()
    _check(weights, leaders, measured)
    # In the order in which the inputs came, those with shared inputs together.
    return BlockStatistics({n: measured[leader] for leader in measured for n in weights if leaders[n] == leader})


def relative_error(before: Tensor, after: Tensor) -> Tensor:
    """Return ||(W - W')X|| / ||WX|| from the outputs WX and W'X, as a scalar on their device; 0 where WX is 0."""
    scale = before.norm()
    return torch.where(scale > 0, (before - after).norm() / scale, scale)


def warn_of_few_tokens(name: str, statistics: Statistics) -> bool:
    """Warn if X has fewer rows than columns, which leaves XᵀX singular; tell whether a warning was given."""
    assert statistics.hessian is not None
    columns = statistics.hessian.shape[0]
    if statistics.tokens >= columns:
        return False
    warnings.warn(
        f"The Hessian of {name!r} has {columns} columns and was measured on {statistics.tokens} tokens: it is "
        f"singular, and only damping makes it solvable. Use at least {columns} tokens, better ten times as many.",
        stacklevel=2,
    )
    return True


def _check(weights: dict[str, WeightView], leaders: dict[str, str], measured: dict[str, InputStatistics]) -> None:
    for name, weight in weights.items():
        if name not in leaders or measured[leaders[name]].tokens == 0:
            # Experts are left out together.
            listed = name if weight.expert is None else name.rpartition(".")[0]
            raise ValueError(
                f"Layer {name!r} saw no calibration token, so its inputs cannot be measured. Use more calibration "
                f"sequences, or add {listed!r} to `exclude_modules`."
            )
    totals = [statistics.input_norm.sum() for statistics in measured.values()]
    for name, total in zip(
        measured, torch.stack([total.to(totals[0].device) for total in totals]).tolist(), strict=True
    ):
        if not total < float("inf"):
            raise ValueError(
                f"Expected finite inputs, but those of layer {name!r} hold NaN or infinity. Check the calibration "
                "data, or run the model in float32 or bfloat16."
            )
        if total == 0:
            raise ValueError(
                f"All inputs of layer {name!r} are zero, so no input can be told from another. Check the calibration "
                "data and the layer before it, or add it to `exclude_modules`."
            )


# Columns of a Hessian that are summed together: wide enough for a matrix product to run at full speed.
_PANEL = 512


def _add_upper_gram(hessian: Tensor, rows: Tensor) -> None:
    """Add XᵀX on and above the diagonal, in panels: for many columns almost half of the work."""
    for start in range(0, rows.shape[1], _PANEL):
        hessian[start : start + _PANEL, start:].addmm_(rows[:, start : start + _PANEL].T, rows[:, start:])


def _mirror(hessian: Tensor) -> None:
    for start in range(_PANEL, hessian.shape[0], _PANEL):
        hessian[start : start + _PANEL, :start] = hessian[:start, start : start + _PANEL].T
