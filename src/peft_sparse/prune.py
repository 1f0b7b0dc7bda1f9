"""prune: joins calibration, criteria and masks, and writes the zeros. sparsity: counts them.

Knows nothing of adapters: what comes after reads the zeros off the weights.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Targets, base_layer, base_model, block_of, find_blocks, prunable_weights, tied_to_embedding
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
from .criteria import CRITERIA, Criterion, Score, Statistics, find_criterion
from .masks import GROUPS, Group, Pattern, SemiStructured, Unstructured, mask_of, parse_pattern, select, select_across
from .report import PruningReport, WeightReport, peak_memory
from .sparsegpt import sparsegpt
from .statistics import BlockStatistics, gradient_sums, measure, relative_error, warn_of_few_tokens
from .weights import WeightView


PatternLike = float | str | Pattern


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
    check_calibration(model, task, calibration)
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
    return _share(zero_counts(prunable_weights(model, target_modules, exclude_modules)).values())


def zero_counts(weights: dict[str, WeightView]) -> dict[str, tuple[int, int]]:
    """Return (zeros, entries) of each weight, with one wait for the device in all."""
    matrices = [weight.matrix() for weight in weights.values()]
    kept = _to_host([mask_of(matrix).sum() for matrix in matrices])
    return {
        name: (matrix.numel() - nonzero, matrix.numel())
        for name, matrix, nonzero in zip(weights, matrices, kept, strict=True)
    }


@dataclass
class PruningTask:
    """What is to be pruned and how, checked against the model; and what was measured on the way."""

    criterion: str
    rule: Criterion
    pattern: str
    patterns: dict[str, Pattern]
    group: Group
    weights: dict[str, WeightView]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    sequences: int = 0
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    warned: bool = False

    def inside(self, block: str, blocks: dict[str, nn.Module]) -> dict[str, WeightView]:
        """Return the weights that lie in `block`."""
        return {name: weight for name, weight in self.weights.items() if block_of(name, blocks) == block}

    def statistics(self, name: str, measured: BlockStatistics | None) -> Statistics:
        """Return what is known of the weight called `name`."""
        gradient = self.gradients.get(name)
        if measured is None:
            return Statistics(gradient=gradient, sequences=self.sequences)
        return measured.of(name, gradient, self.sequences)

    def report(self, seconds: float) -> PruningReport:
        """Return what was done."""
        counts = self.counts or zero_counts(self.weights)
        errors = dict(zip(self.errors, _to_host(list(self.errors.values())), strict=True)) if self.errors else {}
        own_group = self.rule.score is None or any(isinstance(p, SemiStructured) for p in self.patterns.values())
        return PruningReport(
            criterion=self.criterion,
            pattern=self.pattern,
            group=None if own_group else self.group,
            sparsity=_share(counts.values()),
            seconds=seconds,
            peak_memory=peak_memory(),
            weights=tuple(
                WeightReport(name, weight.shape, counts[name][0] / counts[name][1], errors.get(name))
                for name, weight in self.weights.items()
            ),
        )


def plan_pruning(
    model: nn.Module,
    pattern: PatternLike | Mapping[str, PatternLike],
    criterion: str | Score | Criterion,
    group: Group | None,
    target_modules: Targets,
    exclude_modules: Targets,
    prune_tied: bool,
    *,
    loaded: bool = True,
) -> PruningTask:
    """Return the task that `prune`'s arguments describe; nothing is read but names and shapes.

    Args:
        loaded: whether the weights must be there already; False for a model on the meta device.

    Raises:
        ValueError: as `prune`.
    """
    if group is not None and group not in GROUPS:
        raise ValueError(f"`group` must be one of {', '.join(map(repr, GROUPS))}, got {group!r}.")
    name, rule = find_criterion(criterion)
    weights = prunable_weights(model, target_modules, exclude_modules)
    patterns = patterns_by_name(pattern, weights)
    weights = {name: weights[name] for name in patterns}
    chosen = _choose_group(group, patterns, name, rule, per_layer=isinstance(pattern, Mapping))
    _check_model(model, weights, prune_tied, loaded)
    _check_adapters(model, weights, name, rule)
    _check_patterns_fit(patterns, weights)
    return PruningTask(name, rule, _spell(pattern), patterns, chosen, weights)


def patterns_by_name(
    pattern: PatternLike | Mapping[str, PatternLike], weights: dict[str, WeightView]
) -> dict[str, Pattern]:
    """Return the pattern of each weight, by name; a mapping's keys match as `rank_pattern` does in PEFT.

    Raises:
        ValueError: a key that no weight takes or that is no regular expression, no key at all, or a bad pattern.
    """
    if not isinstance(pattern, Mapping):
        return dict.fromkeys(weights, parse_pattern(pattern))
    if not pattern:
        raise ValueError("`pattern` is an empty dict, which prunes nothing. Give a pattern for one layer at least.")
    parsed = {_compiled(key): parse_pattern(value) for key, value in pattern.items()}
    chosen: dict[str, Pattern] = {}
    used: set[re.Pattern[str]] = set()
    # One key speaks for all experts of a parameter.
    shared = {name: name if weight.expert is None else name.rpartition(".")[0] for name, weight in weights.items()}
    for name in weights:
        for key, value in parsed.items():
            if key.fullmatch(name) or key.fullmatch(shared[name]):
                chosen[name] = value
                used.add(key)
                break
    if idle := [key for key, expression in zip(pattern, parsed, strict=True) if expression not in used]:
        endings = list(dict.fromkeys(name.rpartition(".")[2] for name in shared.values()))[:8]
        raise ValueError(
            f"{idle[0]!r} in `pattern` matches no weight that an earlier key leaves. Keys are names, name endings or "
            f"regular expressions for the whole name; weights here end in {', '.join(endings)}."
        )
    return chosen


def _compiled(key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})")
    except re.error as error:
        raise ValueError(
            f"{key!r} in `pattern` is no regular expression ({error}). Write '.*' for any characters; a name or name "
            "ending stands for itself."
        ) from None


def check_calibration(model: nn.Module, task: PruningTask, calibration: Calibration | None) -> None:
    """Raise ValueError if calibration is needed and missing, or given for weights it cannot reach."""
    if calibration is None:
        if task.rule.needs:
            raise ValueError(
                f"Criterion {task.criterion!r} measures the inputs of each layer: pass `calibration`, token ids of "
                "shape (sequences, tokens) or an iterable of model inputs."
            )
        return
    blocks = find_blocks(model)
    outside = [name for name in task.weights if block_of(name, blocks) is None]
    if outside:
        raise ValueError(
            f"Calibration measures inputs block by block, and {outside[0]!r} lies outside the blocks. Leave it out, "
            'or prune it on its own with `criterion="magnitude"` and no calibration.'
        )


def check_finite(weights: dict[str, WeightView]) -> None:
    """Raise ValueError if a weight holds NaN or infinity."""
    finite = _to_host([weight.matrix().isfinite().all() for weight in weights.values()])
    if not all(finite):
        name = list(weights)[finite.index(False)]
        raise ValueError(f"The weight of {name!r} holds NaN or infinity. Mend the checkpoint before pruning it.")


def count_sequences(inputs: list[dict[str, Any]]) -> int:
    """Return how many sequences model inputs hold."""
    return sum(next(value.shape[0] for value in batch.values() if isinstance(value, Tensor)) for batch in inputs)


def prune_stack(
    model: nn.Module, runner: BlockRunner, task: PruningTask, after_block: Callable[[str], None] | None = None
) -> None:
    """Measure, prune and advance through the blocks of `runner`; `after_block` as in `prune_blocks`."""
    blocks = dict(zip(runner.names, runner.blocks, strict=True))
    progress = tqdm(runner.names, desc="pruning", unit="block", disable=None)
    for index, block in enumerate(progress):
        weights = task.inside(block, blocks)
        with _saying_where(block), runner.resident(index):
            if weights:
                prune_weights(weights, task, measure(model, runner, index, weights, task.rule.needs))
            if index < len(blocks) - 1:
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
    prune_weights({n: w for n, w in task.weights.items() if block_of(n, blocks) is None}, task, None)
    for name, block in tqdm(blocks.items(), desc="pruning", unit="block", leave=False, disable=None):
        with _saying_where(name), residence(name, block):
            prune_weights(task.inside(name, blocks), task, None)
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
                weights = task.inside(block, dict(zip(runner.names, runner.blocks, strict=True)))
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


def _spell(pattern: PatternLike | Mapping[str, PatternLike]) -> str:
    if isinstance(pattern, Mapping):
        return ", ".join(f"{key}: {parse_pattern(value)}" for key, value in pattern.items())
    return str(parse_pattern(pattern))


def _choose_group(
    group: Group | None, patterns: dict[str, Pattern], name: str, rule: Criterion, per_layer: bool
) -> Group:
    structured = next((p for p in patterns.values() if isinstance(p, SemiStructured)), None)
    if group is not None and structured is not None:
        raise ValueError(f"{structured} compares within each {structured.m} inputs. Drop `group={group!r}`.")
    if group is not None and rule.score is None:
        raise ValueError(
            f"Criterion {name!r} compares within 128 columns, whose weights it updates as it goes. Drop "
            f"`group={group!r}`."
        )
    if all(isinstance(p, SemiStructured) for p in patterns.values()):
        # Whatever the criterion's own group is.
        return "matrix"
    chosen = group or rule.group
    if chosen == "model" and per_layer:
        raise ValueError(
            '`group="model"` finds the sparsity of each layer itself, and `pattern` is a dict that gives them. Pass '
            'one sparsity, or `group="row"` or "matrix".'
        )
    return chosen


def _check_model(model: nn.Module, weights: dict[str, WeightView], prune_tied: bool, loaded: bool) -> None:
    tied = tied_to_embedding(model, weights)
    if tied and not prune_tied:
        raise ValueError(
            f"The weight of {tied[0]!r} is also the embedding: pruning it prunes every token's vector. Add it to "
            "`exclude_modules`, or pass `prune_tied=True` if you mean it."
        )
    for name, weight in weights.items():
        stored = weight.storage
        if (loaded and stored.is_meta) or not stored.is_floating_point():
            raise ValueError(
                f"The weight of {name!r} is {stored.dtype} on {stored.device}; pruning needs loaded floating-point "
                "weights. Prune before quantising, and load the model before pruning."
            )


def _check_adapters(model: nn.Module, weights: dict[str, WeightView], criterion: str, rule: Criterion) -> None:
    targets = {id(weight.layer) for weight in weights.values()}
    adapted = {
        name: module for name, module in base_model(model).named_modules() if isinstance(module, BaseTunerLayer)
    }
    merged = [name for name, module in adapted.items() if module.merged and id(base_layer(module)) in targets]
    if merged:
        raise ValueError(
            f"Layer {merged[0]!r} has merged adapters, and unmerging would bring pruned entries back. Call "
            "`unmerge_adapter()` or `merge_and_unload()` first."
        )
    active = [name for name, module in adapted.items() if not module.disable_adapters]
    if "gradients" in rule.needs and active:
        raise ValueError(
            f"Criterion {criterion!r} needs gradients of the weights themselves, and layer {active[0]!r} runs with an "
            "adapter. Prune before attaching it, or within `with model.disable_adapter():`."
        )


def _check_patterns_fit(patterns: dict[str, Pattern], weights: dict[str, WeightView]) -> None:
    ragged = [
        (name, pattern)
        for name, pattern in patterns.items()
        if isinstance(pattern, SemiStructured) and not pattern.allow_ragged and weights[name].shape[1] % pattern.m
    ]
    if ragged:
        name, pattern = ragged[0]
        raise ValueError(
            f"{pattern} needs inputs divisible by {pattern.m}, but {name!r} has {weights[name].shape[1]} "
            f"({len(ragged)} such layers). Exclude them, or pass SemiStructured({pattern.n}, {pattern.m}, "
            "allow_ragged=True), for which no N:M kernel exists."
        )


def _to_host(scalars: list[Tensor]) -> list[Any]:
    # Stacked on one device first, so that the host waits once and not once per layer.
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist() if scalars else []


def _share(counts: Iterable[tuple[int, int]]) -> float:
    zeros, sizes = zip(*counts, strict=True)
    return sum(zeros) / sum(sizes)
