"""Estimates memory and time of a pruning run from names and shapes, without loading a weight."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from ..calibration.activations import Activations, check_activations
from ..calibration.forms import sequences_together
from ..calibration.statistics import Need, rows_taken
from ..calibration.text import SEQUENCE_LENGTH
from ..model.blocks import Targets, active_experts, find_blocks, hidden_size, prunable_weights
from ..model.empty import empty_model
from ..model.weights import WeightView
from ..pruning.allocation import Allocation
from ..pruning.by_name import PatternLike
from ..pruning.criteria import CriterionLike
from ..pruning.dsnot import DSnoT
from ..pruning.least_squares import LeastSquares
from ..pruning.patterns import Group, Pattern, SemiStructured
from ..pruning.refinement import Refinement
from ..pruning.rows import rows_of_chunk
from ..pruning.swap import Swap
from ..pruning.task import PruningTask
from .simulation import GIB, Described


@dataclass(frozen=True)
class PruningPlan:
    """The memory in bytes and the time in seconds that a pruning run will take.

    The memory is an upper estimate of what the fields below list. It does not include the activations of the backward
    pass that "gblm" needs, nor the measurement of inputs for the allocation "owl". The time is a rough estimate: it
    assumes that every operation runs at the speed of matrix products, and that iterations stop at their limit.

    Args:
        blocks: the number of blocks of the model.
        weights: the number of weights that are pruned.
        model_bytes: the parameters of the model.
        block_bytes: the parameters of the largest block.
        outside_bytes: the parameters outside of the blocks.
        activation_bytes: the hidden states of all calibration sequences between two blocks.
        activations: where the hidden states wait: "device", "cpu" or "disk". On disk they take no memory.
        statistics_bytes: the statistics of the weights of one block, and the sample of inputs from which output errors
            are computed. Inputs that several weights share are counted for each of them.
        gradient_bytes: the sums of gradients, and the largest gradient.
        working_bytes: the outputs of one block's layers on one batch, and the scores, refinement, update or solver of
            the weight that takes the most.
        flops: the number of floating-point operations.
        seconds: the time at the given or the measured speed.
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
        """The peak memory of `prune` on a loaded model."""
        return self.model_bytes + self._beside_weights()

    @property
    def streamed_bytes(self) -> int:
        """The peak memory of `prune_checkpoint`."""
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


def plan_pruning(
    model: Described,
    pattern: PatternLike | Mapping[str, PatternLike] | None = None,
    *,
    sparsity: float | None = None,
    criterion: CriterionLike = "magnitude",
    group: Group | None = None,
    allocation: str | Allocation | Mapping[str, float] | None = None,
    refinement: str | Refinement | None = None,
    update: bool | LeastSquares = False,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    prune_tied: bool = False,
    sequences: int = 128,
    length: int = SEQUENCE_LENGTH,
    batch_size: int | None = None,
    activations: Activations = "device",
    flops_per_second: float | None = None,
) -> PruningPlan:
    """Estimate the memory and time of `prune` and `prune_checkpoint`, before a weight is loaded.

    The estimate is computed from names and shapes. It assumes that calibration data is given only if the criterion,
    the refinement or the update needs it.

    Args:
        model: a model, which may be on the meta device; a configuration; or the folder or name of a saved model.
        pattern: a sparsity in [0, 1); or "n:m", which keeps n of every m entries along the inputs; or an
            `Unstructured` or `SemiStructured`. A dict gives one of these per layer: its keys are names, name endings
            or regular expressions for the whole name, the first key that matches counts, and a layer that no key
            matches is not pruned.
        sparsity: another way to write a `pattern` that is a number.
        criterion: "magnitude", "random", "wanda", "ria", "sparsegpt" or "gblm"; or one of these as a value with its
            numbers, such as `SparseGPT(damping=0.1)`; or a function (weight (out, in), `Statistics`) -> scores
            (out, in), higher = kept; or a `Criterion`, which also says what the function needs.
        group: which entries are compared with each other: "row" (one output), "matrix" or "model". By default the
            group of the criterion's paper. n:m compares within each m entries and SparseGPT within blocks of columns,
            so these take no group.
        allocation: how the sparsity is divided among the layers: "uniform", "uniform+", "global", "erk", "lamp" or
            "owl"; or one of these as a value, such as `OWL(spread=0.1)`; or a dict of sparsities, with keys as in
            `pattern`, that together give the requested total. The total is exact to the entry. n:m works with "owl",
            which mixes several n.
        refinement: "dsnot" or "swap", or a value such as `Swap(max_swaps=100)`: exchange pruned entries for kept ones
            after the criterion has selected.
        update: True, or a `LeastSquares` with its numbers: set the kept weights to the solution of a regularised
            least-squares problem, see `LeastSquares`.
        target_modules: which layers are pruned: a list of names or name endings, or a regular expression for the whole
            name, as in PEFT. By default every linear or convolution layer and fused expert inside the blocks.
        exclude_modules: which layers are not pruned, in the same form.
        prune_tied: allow a target whose weight is also an embedding. The embedding is then pruned with it.
        sequences: the number of calibration sequences.
        length: the number of tokens of a calibration sequence.
        batch_size: how many sequences of a tensor of token ids run together. By default as many as `prune` takes.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu" or "disk".
        flops_per_second: the speed of matrix products, in floating-point operations per second. By default it is
            measured on this machine's CPU in float32, which takes half a second.

    Returns:
        A plan with the memory of each part, the peak and the time.

    Raises:
        TypeError: `pattern` or `update` has another type than these.
        ValueError: an argument is invalid, or does not go with another one; a target is tied to an embedding; n:m does
            not divide the inputs; the configuration does not name exactly one class of transformers.
    """
    check_activations(activations)
    if not isinstance(model, nn.Module):
        model = empty_model(model if isinstance(model, PretrainedConfig) else AutoConfig.from_pretrained(model))
    task = PruningTask.of(
        model,
        pattern,
        sparsity=sparsity,
        criterion=criterion,
        group=group,
        allocation=allocation,
        refinement=refinement,
        update=update,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        prune_tied=prune_tied,
        loaded=False,
    )
    blocks = task.blocks
    per_block = {name: _bytes(block) for name, block in blocks.items()}
    total, inside = _bytes(model), sum(per_block.values())
    # Without other statistics, an allocation such as OWL measures its own, in a pass of its own.
    needs = task.needs or _allocation_needs(task)
    calibrated = bool(needs)
    item = next(model.parameters()).element_size()
    tokens = sequences * length
    batches = batch_tokens(sequences, length, sequences_together(length) if batch_size is None else batch_size)
    measured = [measured_bytes(task.inside(name), needs, batches, item) for name in blocks if calibrated]
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
    """Return the number of tokens of each batch of the calibration data.

    Raises:
        ValueError: a number is less than 1.
    """
    for name, number in {"sequences": sequences, "length": length, "batch_size": batch_size}.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {number!r}.")
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


def _flops(model: nn.Module, task: PruningTask, tokens: int, length: int) -> float:
    """Return the number of operations of all passes through the blocks, and of statistics, gradients and solvers."""
    passes = 2 * bool(task.needs) + bool(_allocation_needs(task))
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


def _allocation_needs(task: PruningTask) -> tuple[Need, ...]:
    return () if task.allocation is None or isinstance(task.allocation, Mapping) else task.allocation.needs


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
