"""What a pruning run will take, from names and shapes alone."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from ..calibration.activations import Activations, check_activations
from ..calibration.statistics import Need, sampled_per_batch
from ..calibration.text import SEQUENCE_LENGTH
from ..model.blocks import Targets, active_experts, find_blocks, hidden_size, prunable_weights
from ..model.weights import WeightView
from ..pruning.checkpoint import empty_model
from ..pruning.criteria import Criterion, Score
from ..pruning.least_squares import MAX_ITERATIONS
from ..pruning.patterns import Group, Pattern, SemiStructured
from ..pruning.refinement import CANDIDATES, MAX_CYCLES, MAX_SWAPS, rows_of_chunk
from ..pruning.task import PatternLike, PruningTask, plan_pruning
from .simulation import GIB, Described


@dataclass(frozen=True)
class PruningPlan:
    """Memory in bytes and time in seconds that a pruning run will take: estimates from above, not measurements.

    Args:
        blocks, weights: how many there are to prune.
        model_bytes: all parameters.
        block_bytes: parameters of the largest block.
        outside_bytes: parameters outside the blocks.
        activation_bytes: hidden states between blocks, of all calibration sequences.
        activations: where these wait; on disk they take no memory.
        statistics_bytes: what is measured for the weights of one block, inputs kept to report errors on included;
            inputs that weights share are counted for each.
        gradient_bytes: sums of gradients, and the largest gradient.
        working_bytes: outputs of one block's layers on one batch, and scores, refinement, update or solver of the
            weight that takes most.
        flops: floating-point operations.
        seconds: at the speed given or measured.
    """

    blocks: int
    weights: int
    model_bytes: int
    block_bytes: int
    outside_bytes: int
    activation_bytes: int
    activations: Activations
    statistics_bytes: int
    gradient_bytes: int
    working_bytes: int
    flops: float
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """`prune` on a loaded model."""
        return self.model_bytes + self._beside_weights()

    @property
    def streamed_bytes(self) -> int:
        """`prune_checkpoint`."""
        return self.outside_bytes + self.block_bytes + self._beside_weights()

    def _beside_weights(self) -> int:
        waiting = 0 if self.activations == "disk" else self.activation_bytes
        return waiting + self.statistics_bytes + self.gradient_bytes + self.working_bytes

    def __str__(self) -> str:
        return (
            f"{self.weights} weights in {self.blocks} blocks; model {self.model_bytes / GIB:.2f} GiB, largest block "
            f"{self.block_bytes / GIB:.2f} GiB\n"
            f"activations {self.activation_bytes / GIB:.2f} GiB ({self.activations}), statistics "
            f"{self.statistics_bytes / GIB:.2f} GiB, gradients {self.gradient_bytes / GIB:.2f} GiB, working memory "
            f"{self.working_bytes / GIB:.2f} GiB\n"
            f"peak {self.peak_bytes / GIB:.2f} GiB with the model loaded, {self.streamed_bytes / GIB:.2f} GiB "
            f"streamed from disk; about {self.seconds:.0f} s"
        )


def plan(
    model: Described,
    pattern: PatternLike | Mapping[str, PatternLike],
    *,
    criterion: str | Score | Criterion = "magnitude",
    group: Group | None = None,
    refinement: Literal["dsnot", "swap"] | None = None,
    update: bool = False,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    sequences: int = 128,
    length: int = SEQUENCE_LENGTH,
    batch_size: int = 1,
    activations: Activations = "device",
    flops_per_second: float | None = None,
) -> PruningPlan:
    """Return what `prune` or `prune_checkpoint` will take, before a weight is loaded.

    Args:
        model: a model, also one on the meta device; a configuration; or the folder or name of a saved one.
        sequences, length: the calibration data, in sequences and tokens of each.
        flops_per_second: speed of matrix products; by default measured here, on the CPU in float32, for half a second.
        everything else: as in `prune`.

    Raises:
        ValueError: as `prune`, for what does not depend on the weights' values.
    """
    check_activations(activations)
    if not isinstance(model, nn.Module):
        model = empty_model(model if isinstance(model, PretrainedConfig) else AutoConfig.from_pretrained(model))
    task = plan_pruning(
        model,
        pattern,
        criterion,
        group,
        target_modules,
        exclude_modules,
        True,
        refinement=refinement,
        update=update,
        loaded=False,
    )
    blocks = find_blocks(model)
    per_block = {name: _bytes(block) for name, block in blocks.items()}
    total, inside = _bytes(model), sum(per_block.values())
    calibrated = bool(task.needs)
    item = next(model.parameters()).element_size()
    tokens = sequences * length
    batches = batch_tokens(sequences, length, batch_size)
    measured = [measured_bytes(task.inside(name), task.needs, batches, item) for name in blocks if calibrated]
    selecting = max(selecting_bytes(weight, task, task.patterns[name]) for name, weight in task.weights.items())
    flops = _flops(model, task, tokens, length)
    speed = flops_per_second or _measured_speed()
    return PruningPlan(
        blocks=len(blocks),
        weights=len(task.weights),
        model_bytes=total,
        block_bytes=max(per_block.values()),
        outside_bytes=total - inside,
        activation_bytes=tokens * hidden_size(model) * item if calibrated else 0,
        activations=activations,
        statistics_bytes=max((statistics for statistics, _ in measured), default=0),
        gradient_bytes=_gradient_bytes(task),
        working_bytes=max((outputs for _, outputs in measured), default=0) + selecting,
        flops=flops,
        seconds=flops / speed,
    )


def batch_tokens(sequences: int, length: int, batch_size: int) -> list[int]:
    """Return how many tokens each batch of the calibration data has."""
    return [length * min(batch_size, sequences - first) for first in range(0, sequences, batch_size)]


def measured_bytes(
    weights: dict[str, WeightView], needs: Collection[Need], batches: list[int], item: int
) -> tuple[int, int]:
    """Return the bytes of what is measured for `weights`, and of their outputs on one batch.

    Args:
        batches: tokens of each batch.
        item: bytes of an activation.
    """
    shapes = [weight.shape for weight in weights.values()]
    sampled = sum(min(rows, sampled_per_batch(len(batches))) for rows in batches)
    sums = max(4, item) * sum(n * n + n if "hessian" in needs else n for _, n in shapes)
    moments = 8 * sum(n for _, n in shapes) if "moments" in needs else 0
    return sums + moments + item * sampled * sum(n for _, n in shapes), batches[0] * item * sum(m for m, _ in shapes)


def selecting_bytes(weight: WeightView, task: PruningTask, pattern: Pattern) -> int:
    """Return the most that scores, refinement, update or solver of one weight take, beside its statistics."""
    m, n = weight.shape
    taken = [12 * m * n + (4 * n * n if "hessian" in task.rule.needs else 0)]
    if task.refinement == "dsnot":
        taken.append(2 * m * n + min(m, rows_of_chunk(weight.matrix(), n)) * (28 * n + 48 * min(MAX_CYCLES, n)))
    if task.refinement == "swap":
        group = pattern.m if isinstance(pattern, SemiStructured) else None
        listed = min(CANDIDATES, -(-n // (group or 1)))
        widest = n * (group or (listed + 1) // 2)
        rows = min(m, rows_of_chunk(weight.matrix(), max(4 * listed**2, widest)))
        taken.append(2 * m * n + rows * (max(64 * listed**2, 4 * widest * (2 if group else 1)) + 40 * n))
    if task.update:
        taken.append(32 * m * n)
    return max(taken)


def _flops(model: nn.Module, task: PruningTask, tokens: int, length: int) -> float:
    """Two passes through the blocks, a Hessian and solvers for each weight, forward and backward for gradients."""
    if not task.needs:
        return 10.0 * sum(rows * columns for rows, columns in _shapes(task))
    share = active_experts(model)
    # Whatever is pruned, the blocks run whole.
    multiplied = sum(w.matrix().numel() * (1 if w.expert is None else share) for w in prunable_weights(model).values())
    attention = len(find_blocks(model)) * length * hidden_size(model)
    forward = 2.0 * tokens * (multiplied + attention)
    flops = 2 * forward
    if "gradients" in task.needs:
        flops += 3 * forward
    if "hessian" in task.needs:
        # As many as are taken at most.
        rounds = -(-MAX_SWAPS // CANDIDATES) if task.refinement == "swap" else 0
        products = 2 * (rounds + MAX_ITERATIONS * task.update)
        for weight in task.weights.values():
            rows, columns = weight.shape
            seen = tokens * (1 if weight.expert is None else share)
            solver = columns**3 / 3 + rows * columns**2 if "hessian" in task.rule.needs else 0
            flops += seen * columns**2 + solver + products * rows * columns**2
    return flops


def _gradient_bytes(task: PruningTask) -> int:
    if "gradients" not in task.needs:
        return 0
    return sum(4 * rows * columns for rows, columns in _shapes(task)) + max(
        w.storage.nbytes for w in task.weights.values()
    )


def _shapes(task: PruningTask) -> list[tuple[int, int]]:
    return [weight.shape for weight in task.weights.values()]


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _measured_speed() -> float:
    size = 1024
    matrix, done, started = torch.randn(size, size), 0, time.perf_counter()
    while time.perf_counter() - started < 0.5:
        matrix @ matrix
        done += 1
    return 2.0 * size**3 * done / (time.perf_counter() - started)
