"""What is to be pruned and how: the arguments of pruning, checked against the model before anything is changed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..calibration.inputs import Calibration, sequences_in
from ..calibration.statistics import BlockStatistics, Need, Statistics
from ..model.blocks import Targets, base_layer, base_model, block_of, find_blocks, prunable_weights, tied_to_embedding
from ..model.environment import peak_memory
from ..model.weights import WeightView, share, to_host, zero_counts
from .allocation import Allocation
from .criteria import Criterion, Score, find_criterion
from .patterns import GROUPS, Group, Pattern, SemiStructured, parse_pattern
from .refinement import find_refinement
from .report import PruningReport, WeightReport


PatternLike = float | str | Pattern
Value = TypeVar("Value")


@dataclass
class PruningTask:
    """What is to be pruned and how, checked against the model; and what was measured on the way."""

    criterion: str
    rule: Criterion
    pattern: str
    patterns: dict[str, Pattern]
    group: Group
    weights: dict[str, WeightView]
    by_block: dict[str | None, list[str]]
    allocation: Allocation | Mapping[str, float] | None = None
    refinement: str | None = None
    update: bool = False
    gradients: dict[str, Tensor] = field(default_factory=dict)
    sequences: int = 0
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    errors_selected: dict[str, Tensor] = field(default_factory=dict)
    warned: bool = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """Which statistics criterion, refinement and update ask for."""
        refined = () if self.refinement is None else find_refinement(self.refinement).needs
        return tuple(dict.fromkeys((*self.rule.needs, *refined, *(("hessian",) if self.update else ()))))

    def inside(self, block: str | None) -> dict[str, WeightView]:
        """Return the weights that lie in the block called so; None for those outside all blocks."""
        return {name: self.weights[name] for name in self.by_block.get(block, ())}

    def statistics(self, name: str, measured: BlockStatistics | None) -> Statistics:
        """Return what is known of the weight called `name`."""
        gradient = self.gradients.get(name)
        if measured is None:
            return Statistics(gradient=gradient, sequences=self.sequences)
        return measured.of(name, gradient, self.sequences)

    def report(self, seconds: float) -> PruningReport:
        """Return what was done."""
        counts = self.counts or zero_counts(self.weights)
        errors, selected = (
            dict(zip(measured, to_host(list(measured.values())), strict=True))
            for measured in (self.errors, self.errors_selected)
        )
        own_group = self.rule.score is None or any(isinstance(p, SemiStructured) for p in self.patterns.values())
        return PruningReport(
            criterion=self.criterion,
            pattern=self.pattern,
            group=None if own_group else self.group,
            allocation=self.allocation if isinstance(self.allocation, str | None) else "given",
            refinement=self.refinement,
            update=self.update,
            sparsity=share(counts.values()),
            seconds=seconds,
            peak_memory=peak_memory(),
            weights=tuple(
                WeightReport(
                    name, weight.shape, counts[name][0] / counts[name][1], errors.get(name), selected.get(name)
                )
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
    allocation: Allocation | Mapping[str, float] | None = None,
    refinement: str | None = None,
    update: bool = False,
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
    if refinement is not None:
        find_refinement(refinement)
    weights = prunable_weights(model, target_modules, exclude_modules)
    patterns = patterns_by_name(pattern, weights)
    weights = {name: weights[name] for name in patterns}
    chosen = _choose_group(group, patterns, name, rule, per_layer=isinstance(pattern, Mapping))
    _check_model(model, weights, prune_tied, loaded)
    _check_adapters(model, weights, name, rule)
    _check_patterns_fit(patterns, weights)
    blocks = find_blocks(model)
    by_block: dict[str | None, list[str]] = {}
    for weight in weights:
        by_block.setdefault(block_of(weight, blocks), []).append(weight)
    task = PruningTask(
        name, rule, _spell(pattern), patterns, chosen, weights, by_block, allocation, refinement, update
    )
    _check_allocation(task, per_layer=isinstance(pattern, Mapping))
    _check_afterwards(task)
    return task


def patterns_by_name(
    pattern: PatternLike | Mapping[str, PatternLike], weights: dict[str, WeightView]
) -> dict[str, Pattern]:
    """Return the pattern of each weight, by name; a mapping's keys match as `rank_pattern` does in PEFT.

    Raises:
        ValueError: a key that no weight takes or that is no regular expression, no key at all, or a bad pattern.
    """
    if not isinstance(pattern, Mapping):
        return dict.fromkeys(weights, parse_pattern(pattern))
    return values_by_name({key: parse_pattern(value) for key, value in pattern.items()}, weights, "pattern")


def values_by_name(values: Mapping[str, Value], weights: Mapping[str, WeightView], argument: str) -> dict[str, Value]:
    """Return the value of each of `weights` whose name a key matches, the first that does, as `rank_pattern` in PEFT.

    Raises:
        ValueError: as `patterns_by_name`; the message names `argument`.
    """
    if not values:
        raise ValueError(f"`{argument}` is an empty dict, which prunes nothing. Give one layer at least.")
    keys = {key: _compiled(key, argument) for key in values}
    chosen: dict[str, Value] = {}
    used: set[str] = set()
    # One key speaks for all experts of a parameter.
    shared = {name: name if weight.expert is None else name.rpartition(".")[0] for name, weight in weights.items()}
    for name in weights:
        for key, expression in keys.items():
            if expression.fullmatch(name) or expression.fullmatch(shared[name]):
                chosen[name] = values[key]
                used.add(key)
                break
    if idle := [key for key in keys if key not in used]:
        endings = list(dict.fromkeys(name.rpartition(".")[2] for name in shared.values()))[:8]
        raise ValueError(
            f"{idle[0]!r} in `{argument}` matches no weight that an earlier key leaves. Keys are names, name endings "
            f"or regular expressions for the whole name; weights here end in {', '.join(endings)}."
        )
    return chosen


def _compiled(key: str, argument: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})")
    except re.error as error:
        raise ValueError(
            f"{key!r} in `{argument}` is no regular expression ({error}). Write '.*' for any characters; a name or "
            "name ending stands for itself."
        ) from None


def check_calibration(task: PruningTask, calibration: Calibration | None) -> None:
    """Raise ValueError if calibration is needed and missing, or given for weights it cannot reach."""
    if calibration is None:
        if task.needs or task.allocation == "owl":
            who = f"Criterion {task.criterion!r}" if task.rule.needs else "What was asked for beside the criterion"
            raise ValueError(
                f"{who} measures the inputs of each layer: pass `calibration`, token ids of shape (sequences, tokens) "
                "or an iterable of model inputs."
            )
        return
    if outside := task.by_block.get(None):
        raise ValueError(
            f"Calibration measures inputs block by block, and {outside[0]!r} lies outside the blocks. Leave it out, "
            'or prune it on its own with `criterion="magnitude"` and no calibration.'
        )


def count_sequences(inputs: list[dict[str, Any]]) -> int:
    """Return how many sequences model inputs hold."""
    return sum(map(sequences_in, inputs))


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


def _check_allocation(task: PruningTask, per_layer: bool) -> None:
    """Raise ValueError if nothing is left for `allocation` to decide, or nothing of its kind."""
    if task.allocation is None:
        return
    if per_layer:
        raise ValueError(
            "`pattern` is a dict that gives the sparsity of each layer, and `allocation` shares out one. Pass one "
            "sparsity, or drop `allocation`."
        )
    if task.group == "model":
        raise ValueError(
            '`group="model"` finds the sparsity of each layer itself. Drop it, or `allocation`; `allocation="global"` '
            "compares magnitudes across the model."
        )
    if task.allocation != "owl" and any(isinstance(pattern, SemiStructured) for pattern in task.patterns.values()):
        raise ValueError(
            f'{task.pattern} fixes the sparsity of every group of inputs. Use `allocation="owl"`, which mixes several '
            f"n, or one sparsity as `pattern`; got allocation {task.allocation!r}."
        )


def _check_afterwards(task: PruningTask) -> None:
    """Raise ValueError if the selection cannot be refined, or the kept weights not be updated, as asked."""
    if task.group == "model" and (task.refinement or task.update):
        raise ValueError(
            '`group="model"` selects everywhere at once, when no inputs are at hand any more to refine or update by. '
            'Use `allocation="global"`, which gives each layer what that selection would.'
        )
    if task.refinement and task.rule.score is None:
        raise ValueError(
            f"Criterion {task.criterion!r} updates the weights as it selects, so its selection cannot be changed "
            'afterwards. Drop `refinement`, or refine "wanda" and pass `update=True`.'
        )


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
