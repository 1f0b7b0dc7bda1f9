"""Checks the arguments of a pruning run against the model before anything is changed, and makes them a task."""

from collections.abc import Mapping
from typing import get_args

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..calibration.inputs import Calibration
from ..model.blocks import (
    Targets,
    base_layer,
    base_model,
    block_of,
    check_packed,
    find_blocks,
    prunable_weights,
    tied_to_embedding,
)
from ..model.kinds import obstacle
from ..model.left_out import left_out
from ..model.offload import is_offloaded
from ..model.sharding import check_strategy
from ..model.weights import WeightView
from .allocation import Allocation, find_allocation
from .by_name import PatternLike, one_pattern, patterns_by_name, spelled_pattern
from .criteria import CriterionLike, ScoringCriterion, find_criterion
from .least_squares import LeastSquares, find_update
from .owl import OWL
from .patterns import GROUPS, Group, Pattern, SemiStructured
from .refinement import Refinement, find_refinement
from .sparsegpt import SparseGPT
from .task import OnUnreached, PruningTask


def pruning_task(
    model: nn.Module,
    pattern: PatternLike | Mapping[str, PatternLike] | None,
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
    loaded: bool = True,
) -> PruningTask:
    """Return the task that the arguments of `prune` describe. Only names and shapes of the model are read.

    Args:
        model, pattern, sparsity, criterion, group, allocation, refinement, update: the arguments of `prune`.
        target_modules, exclude_modules, prune_tied, on_unreached: the arguments of `prune`.
        loaded: whether the weights must be in memory. False is for a model on the meta device.

    Raises:
        ValueError: see `prune`.
    """
    pattern = one_pattern(pattern, sparsity)
    if on_unreached not in get_args(OnUnreached):
        raise ValueError(
            f'`on_unreached` must be "magnitude", to prune experts without calibration tokens by magnitude, or '
            f'"error", got {on_unreached!r}.'
        )
    if group is not None and group not in GROUPS:
        raise ValueError(f"`group` must be one of {', '.join(map(repr, GROUPS))}, got {group!r}.")
    name, rule = find_criterion(criterion)
    check_strategy(model)
    check_packed(model, target_modules, exclude_modules)
    chosen = prunable_weights(model, target_modules, exclude_modules)
    patterns = patterns_by_name(pattern, chosen)
    weights = {weight: chosen[weight] for weight in patterns}
    _check_model(model, weights, prune_tied, loaded)
    blocks = find_blocks(model)
    by_block: dict[str | None, list[str]] = {}
    for weight in weights:
        by_block.setdefault(block_of(weight, blocks), []).append(weight)
    task = PruningTask(
        criterion=name,
        rule=rule,
        pattern=spelled_pattern(pattern),
        patterns=patterns,
        group=_chosen_group(group, patterns, name, rule, per_layer=isinstance(pattern, Mapping)),
        weights=weights,
        blocks=blocks,
        by_block=by_block,
        allocation=allocation if isinstance(allocation, Mapping | None) else find_allocation(allocation)[1],
        refinement=None if refinement is None else find_refinement(refinement),
        update=find_update(update),
        left_out=left_out(model, weights, chosen, target_modules, exclude_modules),
        on_unreached=on_unreached,
    )
    _check_adapters(model, task)
    _check_patterns_fit(patterns, weights)
    _check_allocation(task, per_layer=isinstance(pattern, Mapping))
    _check_refinement_and_update(task)
    return task


def check_calibration(task: PruningTask, calibration: Calibration | None) -> None:
    """Raise ValueError if calibration is needed and missing, or cannot measure one of the weights."""
    if calibration is None:
        needed = {
            f"criterion {task.criterion!r}": task.rule,
            f"allocation {task.spelled_allocation()!r}": task.allocation,
            f"refinement {task.refinement and task.refinement[0]!r}": task.refinement and task.refinement[1],
            "`update`": task.update,
        }
        measuring = [what for what, step in needed.items() if getattr(step, "needs", ())]
        if measuring:
            raise ValueError(
                f"Expected `calibration`, because {measuring[0]} measures the inputs of each layer. Pass token ids of "
                "shape (sequences, tokens), what a tokenizer returns, or an iterable of model inputs."
            )
        return
    if outside := task.by_block.get(None):
        raise ValueError(
            f"Calibration measures inputs block by block, and {outside[0]!r} lies outside the blocks. Exclude it, or "
            'prune it in a call of its own with `criterion="magnitude"` and no calibration.'
        )


def _chosen_group(
    group: Group | None,
    patterns: dict[str, Pattern],
    name: str,
    rule: ScoringCriterion | SparseGPT,
    per_layer: bool,
) -> Group:
    structured = next((p for p in patterns.values() if isinstance(p, SemiStructured)), None)
    if group is not None and structured is not None:
        raise ValueError(f"{structured} compares within each {structured.m} inputs. Remove `group={group!r}`.")
    if isinstance(rule, SparseGPT):
        if group is not None:
            raise ValueError(
                f"Criterion {name!r} compares within {rule.block_size} columns, because it updates the weights from "
                f"left to right. Remove `group={group!r}`."
            )
        return "matrix"
    if all(isinstance(p, SemiStructured) for p in patterns.values()):
        # n:m patterns ignore the group of the criterion.
        return "matrix"
    chosen = group or rule.group
    if chosen == "model" and per_layer:
        raise ValueError(
            '`group="model"` finds the sparsity of each layer itself, but `pattern` is a dict that gives them. Pass '
            'one sparsity, or `group="row"` or "matrix".'
        )
    return chosen


def _check_allocation(task: PruningTask, per_layer: bool) -> None:
    """Raise ValueError if the pattern or the group leaves nothing for `allocation` to divide."""
    if task.allocation is None:
        return
    if per_layer:
        raise ValueError(
            "`allocation` divides one sparsity among the layers, but `pattern` is a dict that gives the sparsity of "
            "each layer. Pass one sparsity, or remove `allocation`."
        )
    if task.group == "model":
        raise ValueError(
            '`group="model"` finds the sparsity of each layer itself. Remove it, or remove `allocation`. '
            '`allocation="global"` compares magnitudes across the model.'
        )
    if not isinstance(task.allocation, OWL) and any(isinstance(p, SemiStructured) for p in task.patterns.values()):
        raise ValueError(
            f'{task.pattern} fixes the sparsity of every group of inputs. Use `allocation="owl"`, which mixes several '
            f"n, or one sparsity as `pattern`; got allocation {task.spelled_allocation()!r}."
        )


def _check_refinement_and_update(task: PruningTask) -> None:
    """Raise ValueError if refinement or update does not go with the group or the criterion."""
    if task.group == "model" and (task.refinement or task.update):
        raise ValueError(
            '`group="model"` selects in all layers at once, and the statistics for refinement and update are not kept '
            'until then. Use `allocation="global"`, which gives each layer the sparsity that this selection would.'
        )
    if task.refinement and isinstance(task.rule, SparseGPT):
        raise ValueError(
            f"Criterion {task.criterion!r} updates the weights while it selects, so its mask cannot be refined "
            'afterwards. Remove `refinement`, or use criterion "wanda" with `refinement` and `update=True`.'
        )


def _check_model(model: nn.Module, weights: dict[str, WeightView], prune_tied: bool, loaded: bool) -> None:
    tied = tied_to_embedding(model, weights)
    if tied and not prune_tied:
        raise ValueError(
            f"The weight of {tied[0]!r} is also the embedding, so pruning it prunes the vector of every token. Add it "
            "to `exclude_modules`, or pass `prune_tied=True` to prune both."
        )
    for name, weight in weights.items():
        if reason := obstacle(weight, loaded):
            raise ValueError(f"The weight of {name!r} {reason}")


def _check_adapters(model: nn.Module, task: PruningTask) -> None:
    targets = {id(weight.layer) for weight in task.weights.values()}
    adapted = {
        name: module for name, module in base_model(model).named_modules() if isinstance(module, BaseTunerLayer)
    }
    merged = [name for name, module in adapted.items() if module.merged and id(base_layer(module)) in targets]
    if merged:
        raise ValueError(
            f"Layer {merged[0]!r} has merged adapters, and unmerging would restore pruned entries. Call "
            "`unmerge_adapter()` or `merge_and_unload()` first."
        )
    active = [name for name, module in adapted.items() if not module.disable_adapters]
    if "gradients" in task.needs and any(is_offloaded(weight.layer) for weight in task.weights.values()):
        raise ValueError(
            f"Criterion {task.criterion!r} needs gradients of all weights at once, but some are offloaded. Load the "
            "model without offloading, or use another criterion."
        )
    if "gradients" in task.rule.needs and active:
        raise ValueError(
            f"Criterion {task.criterion!r} needs gradients of the weights themselves, but layer {active[0]!r} runs "
            "with an adapter. Prune before attaching it, or within `with model.disable_adapter():`."
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
            f"{pattern} needs a number of inputs divisible by {pattern.m}, but {name!r} has {weights[name].shape[1]} "
            f"({len(ragged)} such layers). Exclude them, or pass SemiStructured({pattern.n}, {pattern.m}, "
            "allow_ragged=True), for which no N:M kernel exists."
        )
