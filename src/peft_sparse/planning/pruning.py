"""Estimates memory and time of a pruning run from names and shapes, without loading a weight."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..calibration.activations import Activations, check_activations
from ..calibration.forms import sequences_together
from ..calibration.text import SEQUENCE_LENGTH
from ..model.blocks import Targets, hidden_size
from ..model.empty import configuration_of, empty_model
from ..pruning.allocation import Allocation
from ..pruning.by_name import PatternLike
from ..pruning.checks import pruning_task
from ..pruning.criteria import CriterionLike
from ..pruning.least_squares import LeastSquares
from ..pruning.patterns import Group
from ..pruning.refinement import Refinement
from .pruning_costs import (
    allocation_needs,
    batch_tokens,
    gradient_bytes,
    measured_bytes,
    operations,
    selecting_bytes,
)
from .simulation import GIB, Described, bytes_of


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
    if flops_per_second is not None and not flops_per_second > 0:
        raise ValueError(f"`flops_per_second` must be above 0, got {flops_per_second!r}. Leave it out to measure it.")
    if not isinstance(model, nn.Module):
        model = empty_model(configuration_of(model))
    task = pruning_task(
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
    of_blocks = [bytes_of(block.parameters()) for block in task.blocks.values()]
    total = bytes_of(model.parameters())
    # Without other statistics, an allocation such as OWL measures its own, in a pass of its own.
    needs = task.needs or allocation_needs(task)
    item = next(model.parameters()).element_size()
    batches = batch_tokens(sequences, length, sequences_together(length) if batch_size is None else batch_size)
    measured = [measured_bytes(task.inside(name), needs, batches, item) for name in task.blocks] if needs else [(0, 0)]
    selecting = max(selecting_bytes(weight, task, task.patterns[name]) for name, weight in task.weights.items())
    flops = operations(model, task, sequences * length, length)
    return PruningPlan(
        blocks=len(task.blocks),
        weights=len(task.weights),
        model_bytes=total,
        block_bytes=max(of_blocks),
        outside_bytes=total - sum(of_blocks),
        activation_bytes=sequences * length * hidden_size(model) * item if needs else 0,
        activations=activations,
        statistics_bytes=max(statistics for statistics, _ in measured),
        gradient_bytes=gradient_bytes(task),
        working_bytes=max(outputs for _, outputs in measured) + selecting,
        flops=flops,
        seconds=flops / (flops_per_second or _measured_speed()),
    )


def _measured_speed() -> float:
    size = 1024
    matrix, done, started = torch.randn(size, size), 0, time.perf_counter()
    while time.perf_counter() - started < 0.5:
        matrix @ matrix
        done += 1
    return 2.0 * size**3 * done / (time.perf_counter() - started)
