"""prune: joins calibration, criteria and masks, and writes the zeros. sparsity: counts them.

Knows nothing of adapters: what comes after reads the zeros off the weights.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from ..calibration.activations import Activations, check_activations
from ..calibration.gradients import gradient_sums
from ..calibration.inputs import Calibration, as_inputs, evaluation_mode, in_words
from ..calibration.measure import measure
from ..calibration.runner import BlockRunner, Residence, on_device, stack_runners
from ..model.blocks import Targets, find_blocks, prunable_weights
from ..model.processes import working_together
from ..model.weights import check_finite, share, zero_counts
from .all_weights import allocated_patterns, prune_across
from .allocation import Allocation
from .criteria import Criterion, Score
from .one_weight import noting, prune_weights
from .patterns import Group
from .report import PruningReport
from .task import PatternLike, PruningTask, check_calibration, count_sequences, plan_pruning


def prune(
    model: nn.Module,
    pattern: PatternLike | Mapping[str, PatternLike],
    *,
    criterion: str | Score | Criterion = "magnitude",
    group: Group | None = None,
    allocation: Allocation | Mapping[str, float] | None = None,
    refinement: Literal["dsnot", "swap"] | None = None,
    update: bool = False,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    calibration: Calibration | None = None,
    batch_size: int = 1,
    activations: Activations = "device",
    device: torch.device | str | None = None,
    prune_tied: bool = False,
) -> PruningReport:
    """Write zeros into the linear weights of the model's blocks, fused experts' included. In place.

    Of a model with adapters the weights below them, and of modules in `modules_to_save` the copies that are active.
    Entries that are zero already go first, so pruning twice to one sparsity changes no mask, and pruning further only
    adds zeros. With calibration the blocks are pruned in order, each on inputs that went through its pruned
    predecessors; all weights of one block are scored on the block as it was.

    With calibration, the processes of a `torch.distributed` group share the batches out: each calls `prune` with the
    same model, arguments and calibration, and gets the same zeros, by statistics of all batches.

    Args:
        pattern: a sparsity in [0, 1), or "n:m" = n kept of every m along the inputs, or an `Unstructured` or
            `SemiStructured`; or one of these per layer: a dict whose keys are names, name endings or regular
            expressions for the whole name, the first that matches counts, and what none matches is not pruned.
        criterion: "magnitude", "random", "wanda", "ria", "sparsegpt", "gblm"; or a function (weight (out, in),
            `Statistics`) -> scores (out, in), higher = kept; or a `Criterion`, which says what it needs besides.
        group: which entries are compared: "row" (one output), "matrix" or "model"; by default that of the criterion's
            paper. n:m compares within each m entries, SparseGPT within 128 columns; both take no group. For "model",
            inputs are those of the unpruned model.
        allocation: how the sparsity is shared out among the layers, by `allocation.allocate`: "uniform", "uniform+",
            "global", "erk", "lamp" or "owl", or a dict of sparsities, keys as in `pattern`, that give the requested
            total. The total is then exact to the weight. n:m goes with "owl", which mixes several n.
        refinement: "dsnot" or "swap": exchange pruned entries for kept ones once they are selected.
        update: set the kept weights to the exact solution of the masked least squares (`masked_least_squares`).
        target_modules: as in PEFT; by default every linear layer and every fused expert inside the blocks.
        exclude_modules: as in PEFT.
        calibration: token ids (sequences, tokens), or an iterable of model inputs. Tokens that an input's
            `attention_mask` marks as padding are not counted. With a criterion that needs none it serves to report
            output errors.
        batch_size: how many sequences of a tensor of token ids run together.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu", or "disk".
        device: where a block is moved for its turn and back from; None computes where the block is.
        prune_tied: allow a target whose weight is also an embedding; the embedding is then pruned with it.

    Raises:
        ValueError: bad pattern, criterion, group or targets; a tied weight without `prune_tied`; an n:m whose m does
            not divide the inputs; calibration that never runs a target's blocks, such as a vision tower's; a weight, a
            statistic or a score that is not finite; merged adapters; processes that were not called alike. Raised
            midway, the error's note names the block: those before it are pruned, those after are not.
        RuntimeError: another process failed.
    """
    started = time.perf_counter()
    task = plan_pruning(
        model,
        pattern,
        criterion,
        group,
        target_modules,
        exclude_modules,
        prune_tied,
        allocation=allocation,
        refinement=refinement,
        update=update,
    )
    check_activations(activations)
    check_calibration(task, calibration)
    check_finite(task.weights)
    inputs = None if calibration is None else as_inputs(model, calibration, batch_size)
    task.sequences = count_sequences(inputs or [])
    residence = on_device(device)
    with evaluation_mode(model), _together(task, inputs):
        if allocation is not None:
            task.patterns = allocated_patterns(model, task, allocation, inputs, activations, residence)
        if inputs is not None and "gradients" in task.needs:
            task.gradients = gradient_sums(model, task.weights, inputs, activations != "device", shared=True)
        if task.group == "model":
            prune_across(model, task, inputs, activations, residence)
        elif inputs is not None:
            for runner in stack_runners(model, inputs, task.inside, activations=activations, residence=residence):
                prune_stack(model, runner, task)
        else:
            prune_blocks(task, find_blocks(model), residence)
    return task.report(time.perf_counter() - started)


def sparsity(model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None) -> float:
    """Return the fraction of zeros among the prunable weights, by default the linear weights of the blocks.

    Adapters are looked through: the base weights are counted, merged ones as they are, and of modules in
    `modules_to_save` the copies that are active.
    """
    return share(zero_counts(prunable_weights(model, target_modules, exclude_modules)).values())


def prune_stack(
    model: nn.Module, runner: BlockRunner, task: PruningTask, after_block: Callable[[str], None] | None = None
) -> None:
    """Measure, prune and advance through the blocks of `runner`; `after_block` as in `prune_blocks`."""
    progress = tqdm(runner.names, desc="pruning", unit="block", disable=None)
    for index, block in enumerate(progress):
        weights = task.inside(block)
        with _saying_where(block), runner.resident(index):
            if weights:
                prune_weights(weights, task, measure(model, runner, index, weights, task.needs))
            if index < len(runner.names) - 1:
                runner.advance(index)
            if after_block is not None:
                after_block(block)


def prune_blocks(
    task: PruningTask,
    blocks: dict[str, nn.Module],
    residence: Residence,
    after_block: Callable[[str], None] | None = None,
) -> None:
    """Prune without calibration; `after_block` is called with a block's name while its pruned weights are there."""
    prune_weights(task.inside(None), task, None)
    for name, block in tqdm(blocks.items(), desc="pruning", unit="block", leave=False, disable=None):
        with _saying_where(name), residence(name, block):
            prune_weights(task.inside(name), task, None)
            if after_block is not None:
                after_block(name)


def _together(task: PruningTask, inputs: list[dict[str, Any]] | None) -> contextlib.AbstractContextManager[None]:
    """Return the context of the processes' common work; without calibration each works on its own."""
    if inputs is None:
        return contextlib.nullcontext()
    what = f"{task.criterion} to {task.pattern} of {len(task.weights)} weights by {in_words(inputs)}"
    return working_together(what)


def _saying_where(block: str) -> contextlib.AbstractContextManager[None]:
    return noting(f"While pruning block {block!r}: the blocks before it are pruned, those after are not.")
