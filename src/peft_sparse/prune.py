"""prune: joins calibration, criteria and masks, and writes the zeros. sparsity: counts them.

Knows nothing of adapters: what comes after reads the zeros off the weights.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Targets, block_of, find_blocks, prunable_weights
from .calibration import (
    Activations,
    BlockRunner,
    Calibration,
    Residence,
    as_inputs,
    check_activations,
    evaluation_mode,
    on_device,
    stack_runners,
)
from .criteria import CRITERIA, Criterion, Score, Statistics
from .gradients import gradient_sums
from .masks import Group, Unstructured, mask_of, select, select_across
from .report import PruningReport
from .sparsegpt import sparsegpt
from .statistics import BlockStatistics, measure, relative_error, warn_of_few_tokens
from .tasks import (
    PatternLike,
    PruningTask,
    check_calibration,
    check_finite,
    count_sequences,
    plan_pruning,
    share,
    zero_counts,
)
from .weights import WeightView


def prune(
    model: nn.Module,
    pattern: PatternLike | Mapping[str, PatternLike],
    *,
    criterion: str | Score | Criterion = "magnitude",
    group: Group | None = None,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    calibration: Calibration | None = None,
    batch_size: int = 1,
    activations: Activations = "device",
    device: torch.device | str | None = None,
    prune_tied: bool = False,
) -> PruningReport:
    """Write zeros into the linear weights of the model's blocks, fused experts' included. In place.

    Entries that are zero already go first, so pruning twice to one sparsity changes no mask, and pruning further only
    adds zeros. With calibration the blocks are pruned in order, each on inputs that went through its pruned
    predecessors; all weights of one block are scored on the block as it was.

    Args:
        pattern: a sparsity in [0, 1), or "n:m" = n kept of every m along the inputs, or an `Unstructured` or
            `SemiStructured`; or one of these per layer: a dict whose keys are names, name endings or regular
            expressions for the whole name, the first that matches counts, and what none matches is not pruned.
        criterion: "magnitude", "random", "wanda", "ria", "sparsegpt", "gblm"; or a function (weight (out, in),
            `Statistics`) -> scores (out, in), higher = kept; or a `Criterion`, which says what it needs besides.
        group: which entries are compared: "row" (one output), "matrix" or "model"; by default that of the criterion's
            paper. n:m compares within each m entries, SparseGPT within 128 columns; both take no group. For "model",
            inputs are those of the unpruned model.
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
            not divide the inputs; a weight, a statistic or a score that is not finite; merged adapters. Raised midway,
            the error's note names the block: those before it are pruned, those after are not.
    """
    started = time.perf_counter()
    task = plan_pruning(model, pattern, criterion, group, target_modules, exclude_modules, prune_tied)
    check_activations(activations)
    check_calibration(task, calibration)
    check_finite(task.weights)
    inputs = None if calibration is None else as_inputs(model, calibration, batch_size)
    task.sequences = count_sequences(inputs or [])
    residence = on_device(device)
    with evaluation_mode(model):
        if inputs is not None and "gradients" in task.rule.needs:
            task.gradients = gradient_sums(model, task.weights, inputs, offload=activations != "device")
        if task.group == "model":
            _prune_across(model, task, inputs, activations, residence)
        elif inputs is not None:
            for runner in stack_runners(model, inputs, activations=activations, residence=residence):
                prune_stack(model, runner, task)
        else:
            prune_blocks(task, find_blocks(model), residence)
    return task.report(time.perf_counter() - started)


def sparsity(model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None) -> float:
    """Return the fraction of zeros among the prunable weights, by default the linear weights of the blocks.

    Adapters are looked through: the base weights are counted, merged ones as they are.
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
                prune_weights(weights, task, measure(model, runner, index, weights, task.rule.needs))
            if index < len(runner.names) - 1:
                runner.advance(index)
            if after_block is not None:
                after_block(block)


@torch.no_grad()
def prune_weights(weights: dict[str, WeightView], task: PruningTask, measured: BlockStatistics | None) -> None:
    """Prune `weights`, of whose inputs `measured` tells; note the relative output error of each."""
    for name, weight in weights.items():
        matrix, pattern, statistics = weight.matrix(), task.patterns[name], task.statistics(name, measured)
        rows = None if measured is None else measured.sample(name).float()
        before = None if rows is None else rows @ matrix.T.float()
        with _noting(f"At {name!r}: the weights before it are pruned."):
            if task.rule.score is None:
                assert statistics.hessian is not None
                task.warned = task.warned or warn_of_few_tokens(name, statistics)
                weight.write(sparsegpt(matrix, statistics.hessian, pattern)[0])
            else:
                weight.write_zeros(select(_scores(name, matrix, task.rule, statistics), pattern, task.group))
        if rows is not None and before is not None:
            task.errors[name] = relative_error(before, rows @ weight.matrix().T.float())
    # Counted here, while they are where they can be read.
    task.counts |= zero_counts(weights)


def _scores(name: str, matrix: Tensor, rule: Criterion, statistics: Statistics) -> Tensor:
    assert rule.score is not None
    if statistics.gradient is not None:
        # It may wait elsewhere.
        statistics = replace(statistics, gradient=statistics.gradient.to(matrix.device))
    scores = rule.score(matrix, statistics)
    if scores.shape != matrix.shape:
        raise ValueError(
            f"Expected scores of shape {tuple(matrix.shape)} for {name!r}, got {tuple(scores.shape)}. A criterion "
            "returns one score per entry of the weight (out, in)."
        )
    if rule not in CRITERIA.values() and not scores.isfinite().all():
        raise ValueError(
            f"Expected finite scores for {name!r}, got NaN or infinity. Mend the criterion, or clamp what it returns."
        )
    return scores.masked_fill(~mask_of(matrix), -torch.inf)


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


def _prune_across(
    model: nn.Module,
    task: PruningTask,
    inputs: list[dict[str, Any]] | None,
    activations: Activations,
    residence: Residence,
) -> None:
    """Prune by one comparison over all weights, measured on the model as it is."""
    blocks = find_blocks(model)
    known = {name: task.statistics(name, None) for name in task.weights}
    if inputs is not None:
        for runner in stack_runners(model, inputs, activations=activations, residence=residence):
            for index, block in enumerate(tqdm(runner.names, desc="measuring", unit="block", disable=None)):
                weights = task.inside(block)
                with runner.resident(index):
                    if weights:
                        measured = measure(model, runner, index, weights, task.rule.needs)
                        known |= {name: task.statistics(name, measured) for name in weights}
                    if index < len(runner.names) - 1:
                        runner.advance(index)
    pattern = next(iter(task.patterns.values()))
    assert isinstance(pattern, Unstructured)
    seed = torch.initial_seed()

    def score_of(name: str, weight: WeightView, index: int) -> Callable[[], Tensor]:
        def score() -> Tensor:
            # Scores are computed thrice and must come out the same, also those of a criterion that draws them.
            with _resident(name, residence, blocks):
                matrix = weight.matrix()
                with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
                    torch.manual_seed(seed + index)
                    return _scores(name, matrix, task.rule, known[name])

        return score

    scores = [score_of(name, weight, index) for index, (name, weight) in enumerate(task.weights.items())]
    masks = select_across(scores, pattern.sparsity)
    for weight, mask in zip(task.weights.values(), masks, strict=True):
        weight.write_zeros(mask.to(weight.storage.device))


def _saying_where(block: str) -> contextlib.AbstractContextManager[None]:
    return _noting(f"While pruning block {block!r}: the blocks before it are pruned, those after are not.")


@contextlib.contextmanager
def _noting(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


@contextlib.contextmanager
def _resident(name: str, residence: Residence, blocks: dict[str, nn.Module]) -> Iterator[None]:
    block = block_of(name, blocks)
    with contextlib.nullcontext() if block is None else residence(block, blocks[block]):
        yield
