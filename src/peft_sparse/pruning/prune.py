"""`prune` runs a pruning task block by block. `sparsity` counts the zeros of a model."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..calibration.activations import Activations, check_activations
from ..calibration.findings import Proof
from ..calibration.gradients import gradient_sums
from ..calibration.inputs import Calibration, as_inputs, count_sequences, evaluation_mode, in_words
from ..calibration.measure import measure
from ..calibration.proof import prove
from ..calibration.residence import Residence, on_device
from ..calibration.runner import BlockRunner, stack_runners
from ..model.blocks import Targets, check_packed, prunable_weights
from ..model.environment import check_device, remember
from ..model.kinds import count_zeros
from ..model.processes import agree, stopping_together
from ..model.settings import ordinary_settings
from ..model.sharding import check_strategy
from ..model.weights import check_finite
from .all_weights import allocated_patterns, prune_across
from .allocation import Allocation
from .by_name import PatternLike
from .checks import check_calibration, pruning_task
from .criteria import CriterionLike
from .least_squares import LeastSquares
from .offloaded import checked_when_loaded, one_layer_at_a_time
from .one_weight import noting, prune_weights
from .patterns import Group
from .refinement import Refinement
from .report import PruningReport
from .task import OnUnreached, PruningTask


@ordinary_settings()
def prune(
    model: nn.Module,
    pattern: PatternLike | Mapping[str, PatternLike] | None = None,
    calibration: Calibration | None = None,
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
    on_unreached: OnUnreached = "magnitude",
    batch_size: int | None = None,
    activations: Activations = "device",
    device: torch.device | str | None = None,
) -> PruningReport:
    """Prune the linear weights inside the blocks of a model: write zeros into them, in place.

    Entries that are zero already are pruned first. Pruning twice with the same arguments therefore changes no mask,
    and pruning to a higher sparsity only adds zeros. If the model has more zeros than `pattern` asks for, they stay,
    and a warning gives both numbers. If `allocation` divides a sparsity, this is a ValueError.

    With calibration, the blocks are pruned one after the other. The inputs of a block have passed through the pruned
    blocks before it. The inputs of all weights of a block are measured before the first of them is pruned.

    If the model has adapters, their base weights are pruned. Of modules in PEFT's `modules_to_save`, the active copies
    are pruned. If `torch.distributed` runs several processes and calibration is given, each process calls `prune` with
    the same model, arguments and calibration. The processes share the batches, and all of them write the same zeros,
    which depend on the statistics of all batches.

    Args:
        model: a model whose weights are in memory and not quantised.
        pattern: a sparsity in [0, 1); or "n:m", which keeps n of every m entries along the inputs; or an
            `Unstructured` or `SemiStructured`. A dict gives one of these per layer: its keys are names, name endings
            or regular expressions for the whole name, the first key that matches counts, and a layer that no key
            matches is not pruned.
        calibration: token ids (sequences, tokens), what a tokenizer returns, or an iterable of model inputs, such as a
            list, a `DataLoader` or a tokenised `datasets.Dataset`. Padding does not count, that is tokens whose
            `attention_mask` is 0. A batch may also hold a `token_mask` (sequences, tokens), or a `decoder_token_mask`,
            which the model does not see: only tokens where it is 1 count. A criterion that needs no calibration uses
            it to report output errors.
        sparsity: another way to write a `pattern` that is a number.
        criterion: "magnitude", "random", "wanda", "ria", "sparsegpt" or "gblm"; or one of these as a value with its
            numbers, such as `SparseGPT(damping=0.1)`; or a function (weight (out, in), `Statistics`) -> scores
            (out, in), higher = kept; or a `Criterion`, which also says what the function needs.
        group: which entries are compared with each other: "row" (one output), "matrix" or "model". By default the
            group of the criterion's paper. n:m compares within each m entries and SparseGPT within blocks of columns,
            so these take no group. For "model", the inputs are those of the unpruned model.
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
        on_unreached: what happens to an expert that no calibration token reaches. "magnitude" prunes it by magnitude
            to the same pattern, and a warning lists such experts. "error" runs the model on all batches first, and
            refuses before any work.
        batch_size: how many sequences run together, where they do not come in batches. By default as many of one
            length as have up to 256 tokens together, and one where processes share the batches. The statistics do not
            depend on it beyond rounding.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu" or "disk".
        device: where each block is moved while it is processed. None computes where the block is.

    Returns:
        A report with the sparsity and, with calibration, the relative output error of each weight.

    Raises:
        TypeError: `pattern` or `update` has another type than these.
        ValueError: an argument is invalid, or does not go with another one; a target is tied to an embedding; n:m does
            not divide the inputs; calibration is missing, or never reaches the block of a target; a weight, a
            statistic or a score is not finite; adapters are merged; processes were called differently. If an error
            occurs after some blocks were pruned, its note names the block.
        RuntimeError: another process failed.
    """
    started = time.perf_counter()
    # Without calibration, each process does all of the work, and may be the only one that does it.
    with contextlib.nullcontext() if calibration is None else stopping_together():
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
            on_unreached=on_unreached,
        )
        check_activations(activations)
        check_device(device, is_there=False)
        check_calibration(task, calibration)
        check_finite(task.weights)
        inputs = None if calibration is None else as_inputs(model, calibration, batch_size)
        _run(model, task, inputs, activations, checked_when_loaded(on_device(device), task.inside))
    report = task.report(time.perf_counter() - started)
    remember(model, pruning=report.to_dict() | {"calibration_sequences": task.sequences})
    return report


def _run(
    model: nn.Module,
    task: PruningTask,
    inputs: list[dict[str, Any]] | None,
    activations: Activations,
    residence: Residence,
) -> None:
    task.sequences = count_sequences(inputs or [])
    with evaluation_mode(model):
        proof = None
        if inputs is not None:
            how = f"{task.criterion}, {task.group}, {task.allocation}, {task.refinement}, {task.update}"
            agree(f"{how} to {task.pattern} of {len(task.weights)} weights by {in_words(inputs)}")
            proof = prove(model, inputs, task.inside, residence, every_expert=task.on_unreached == "error")
        if task.allocation is not None:
            with one_layer_at_a_time(task.weights) as reading:
                task.patterns = allocated_patterns(model, task, inputs, activations, residence, reading, proof)
        if inputs is not None and "gradients" in task.needs:
            task.gradients = gradient_sums(model, task.weights, inputs, activations != "device", shared=True)
        if task.group == "model":
            prune_across(model, task, inputs, activations, residence, proof)
        elif inputs is not None and proof is not None:
            for runner in stack_runners(
                model,
                inputs,
                task.inside,
                activations=activations,
                residence=residence,
                proof=proof,
            ):
                prune_stack(model, runner, task, proof)
        else:
            prune_blocks(task, task.blocks, residence)


def sparsity(model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None) -> float:
    """Return the fraction of zeros among the prunable weights of a model, as the next forward pass would use them.

    Weights that are computed from other parameters are computed, and quantised ones are dequantised as PEFT does it.
    If weights are split among processes, all processes must call this together. Of a model with adapters, the zeros of
    the base weights are counted; merged weights are counted as they are. Of modules in PEFT's `modules_to_save`, the
    active copies are counted. A weight with several names is counted once.

    Args:
        model: any model, with or without adapters.
        target_modules: which layers are counted: a list of names or name endings, or a regular expression for the
            whole name, as in PEFT. By default every linear or convolution layer and fused expert inside the blocks.
        exclude_modules: which layers are not counted, in the same form.

    Raises:
        ValueError: no layer matches, or a listed name matches nothing; a weight cannot be read, because it is on the
            meta device or packed in a way that PEFT cannot undo; there are no entries.
    """
    check_strategy(model)
    check_packed(model, target_modules, exclude_modules)
    zeros, entries = count_zeros(prunable_weights(model, target_modules, exclude_modules))
    if not entries:
        raise ValueError("Expected weights with entries, got layers without outputs or inputs. Name other layers.")
    return zeros / entries


def prune_stack(
    model: nn.Module,
    runner: BlockRunner,
    task: PruningTask,
    proof: Proof,
    after_block: Callable[[str], None] | None = None,
) -> None:
    """Measure and prune the blocks of `runner` one after the other.

    Args:
        after_block: called with a block's name while its pruned weights are in memory.
    """
    for index in tqdm(runner.order, desc="pruning", unit="block", disable=None):
        block = runner.names[index]
        weights = task.inside(block)
        with _saying_where(block), runner.resident(index):
            if weights:
                prune_weights(weights, task, measure(model, runner, index, weights, task.needs, proof.sight))
            runner.advance(index)
            if after_block is not None:
                after_block(block)


def prune_blocks(
    task: PruningTask,
    blocks: dict[str, nn.Module],
    residence: Residence,
    after_block: Callable[[str], None] | None = None,
) -> None:
    """Prune `blocks` one after the other without calibration.

    Args:
        after_block: called with a block's name while its pruned weights are in memory.
    """
    prune_weights(task.inside(None), task, None)
    for name, block in tqdm(blocks.items(), desc="pruning", unit="block", leave=False, disable=None):
        with _saying_where(name), residence(name, block):
            prune_weights(task.inside(name), task, None)
            if after_block is not None:
                after_block(name)


def _saying_where(block: str) -> contextlib.AbstractContextManager[None]:
    return noting(f"While pruning block {block!r}: the blocks before it are pruned, and the blocks after it are not.")
