"""What the steps of pruning cost: the bytes that they take in addition to the weights, and their operations."""

from collections.abc import Collection, Mapping

from torch import nn

from ..calibration.forms import check_counts
from ..calibration.statistics import Need, rows_taken
from ..model.blocks import active_experts, find_blocks, hidden_size, prunable_weights
from ..model.weights import WeightView
from ..pruning.dsnot import DSnoT
from ..pruning.patterns import Pattern, SemiStructured
from ..pruning.rows import rows_of_chunk
from ..pruning.swap import Swap
from ..pruning.task import PruningTask


def batch_tokens(sequences: int, length: int, batch_size: int) -> list[int]:
    """Return the number of tokens of each batch of the calibration data.

    Raises:
        ValueError: a number is less than 1.
    """
    check_counts(sequences=sequences, length=length, batch_size=batch_size)
    return [length * min(batch_size, sequences - first) for first in range(0, sequences, batch_size)]


def measured_bytes(
    weights: dict[str, WeightView], needs: Collection[Need], batches: list[int], item: int
) -> tuple[int, int]:
    """Return the bytes of the statistics of `weights`, and the bytes of their outputs on one batch.

    Args:
        weights: the weights of one block, by name.
        needs: the statistics that are measured.
        batches: the number of tokens of each batch.
        item: the number of bytes of one entry of an activation.
    """
    shapes = [weight.shape for weight in weights.values()]
    sampled = rows_taken(batches)
    sums = max(4, item) * sum(n * n + n if "hessian" in needs else n for _, n in shapes)
    moments = 8 * sum(n for _, n in shapes) if "moments" in needs else 0
    return sums + moments + item * sampled * sum(n for _, n in shapes), batches[0] * item * sum(m for m, _ in shapes)


def selecting_bytes(weight: WeightView, task: PruningTask, pattern: Pattern) -> int:
    """Return the bytes that scores, refinement, update or solver of one weight take in addition to its statistics."""
    m, n = weight.shape
    taken = [12 * m * n + (4 * n * n if "hessian" in task.rule.needs else 0)]
    refinement = None if task.refinement is None else task.refinement[1]
    if isinstance(refinement, DSnoT):
        rows = min(m, rows_of_chunk(weight.matrix(), n))
        taken.append(2 * m * n + rows * (28 * n + 48 * min(refinement.max_cycles, n)))
    if isinstance(refinement, Swap):
        exhaustive = n if refinement.candidates >= n else None
        group = pattern.m if isinstance(pattern, SemiStructured) else exhaustive
        rows = min(m, rows_of_chunk(weight.matrix(), n * max(8, group or 0)))
        # Pairs within groups take a Hessian in another order, and what the entries of each pair add together.
        pairs = 12 * n * n + 8 * rows * n * (group - 1) if group else 0
        taken.append(2 * m * n + (40 if group else 80) * rows * n + pairs)
    if task.update:
        taken.append(32 * m * n)
    return max(taken)


def operations(model: nn.Module, task: PruningTask, tokens: int, length: int) -> float:
    """Return the number of operations of all passes through the blocks, and of statistics, gradients and solvers."""
    passes = 2 * bool(task.needs) + bool(allocation_needs(task))
    if not passes:
        return 10.0 * sum(rows * columns for rows, columns in _shapes(task))
    share = active_experts(model)
    # Not only the pruned weights, because calibration runs whole blocks.
    multiplied = sum(w.matrix().numel() * (1 if w.expert is None else share) for w in prunable_weights(model).values())
    attention = len(find_blocks(model)) * length * hidden_size(model)
    forward = 2.0 * tokens * (multiplied + attention)
    flops = passes * forward
    if "gradients" in task.needs:
        flops += 3 * forward
    if "hessian" in task.needs:
        # Solvers and swaps are counted with the largest number of iterations that they may take.
        swaps = task.refinement[1] if task.refinement else None
        products = 2 * (task.update.max_iterations if task.update else 0)
        # A swap reads and changes the whole row some times.
        of_entry = 16 * swaps.max_swaps if isinstance(swaps, Swap) else 0
        for weight in task.weights.values():
            rows, columns = weight.shape
            seen = tokens * (1 if weight.expert is None else share)
            solver = columns**3 / 3 + rows * columns**2 if "hessian" in task.rule.needs else 0
            flops += seen * columns**2 + solver + (products * columns + of_entry) * rows * columns
    return flops


def allocation_needs(task: PruningTask) -> tuple[Need, ...]:
    """Return the statistics that the allocation of a task measures, in a pass of its own."""
    return () if task.allocation is None or isinstance(task.allocation, Mapping) else task.allocation.needs


def gradient_bytes(task: PruningTask) -> int:
    """Return the bytes of the sums of gradients, and of the largest gradient."""
    if "gradients" not in task.needs:
        return 0
    return sum(4 * rows * columns for rows, columns in _shapes(task)) + max(
        w.storage.nbytes for w in task.weights.values()
    )


def _shapes(task: PruningTask) -> list[tuple[int, int]]:
    return [weight.shape for weight in task.weights.values()]
