"""Checks the arguments of `reconstruct` before anything is changed, and makes them a task."""

import warnings
from collections.abc import Mapping
from typing import Any, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..calibration.activations import Activations, check_activations
from ..calibration.inputs import Calibration
from ..model.blocks import find_blocks, prunable_weights
from ..model.offload import loaded_layer
from ..model.weights import DENSE, share, zero_counts
from ..pruning.budget import Reading
from ..pruning.by_name import PatternLike
from ..pruning.checks import check_calibration, pruning_task
from ..pruning.patterns import number_to_prune
from ..pruning.task import PruningTask
from .fit import Fit
from .regions import RegionSize
from .task import Mode, ReconstructionTask
from .ties import check_ties
from .trainable import adapted_weights
from .tuner_trial import check_tuner_keeps_zeros


def reconstruction_task(
    model: nn.Module,
    pattern: PatternLike | Mapping[str, PatternLike] | None,
    *,
    dense: nn.Module | None,
    region: RegionSize,
    mode: Mode,
    fit: Fit,
    batch_size: int,
    activations: Activations,
    loaded: bool,
    sparsity: float | None = None,
    **pruning: Any,
) -> ReconstructionTask:
    """Return the task of a reconstruction, with all arguments checked. Only names and shapes are read.

    Args:
        model, pattern, dense, region, mode, fit, batch_size, activations, sparsity: the arguments of `reconstruct`.
        loaded: whether the weights must be in memory. False is for a model on the meta device.
        pruning: the other arguments of `reconstruct` that `pruning_task` takes.

    Raises:
        TypeError, ValueError: see `reconstruct`.
    """
    no_pattern = pattern is None and sparsity is None
    check_choices(region, mode, fit, no_pattern, dense is None)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size!r}.")
    _check_models(model, dense)
    check_activations(activations)
    pruned = pruning_task(model, 0.0 if no_pattern else pattern, sparsity=sparsity, loaded=loaded, **pruning)
    task = ReconstructionTask(model, dense, pruned, fit, region, mode, activations)
    _check_task(pruned, fit, no_pattern)
    check_ties(task)
    check_tuner_keeps_zeros(fit.tuner, pruned.weights)
    return task


def check_choices(region: Any, mode: str, fit: Fit, no_pattern: bool, no_dense: bool) -> None:
    """Raise ValueError if a choice is unknown, or if choices do not go together."""
    if region not in ("matrix", "submodule", "block") and not (isinstance(region, int) and region >= 1):
        raise ValueError(
            f'`region` must be "matrix", "submodule", "block" or a number of blocks of at least 1, got {region!r}.'
        )
    if mode not in get_args(Mode):
        raise ValueError(f"`mode` must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}.")
    if no_pattern == no_dense:
        raise ValueError(
            "Expected either `pattern` (or `sparsity`), to prune region by region, or `dense`, the model before it "
            f"was pruned; got {'neither' if no_pattern else 'both'}."
        )
    if region == "matrix" and (mode == "SD" or fit.tuner != "full" or fit.loss != "mse"):
        raise ValueError(
            '`region="matrix"` solves a least-squares problem for each matrix and trains nothing. It needs mode "DD" '
            'or "SS", loss "mse" and tuner "full". Use `region="submodule"` for other choices.'
        )


def _check_models(model: nn.Module, dense: nn.Module | None) -> None:
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"Layer {adapted[0]!r} has adapters, but reconstruction attaches and merges adapters of its own. Merge or "
            "unload them first, and pass their configuration as `Fit(tuner=...)`."
        )
    if dense is not None and (dense is model or list(find_blocks(dense)) != list(find_blocks(model))):
        raise ValueError(
            "Expected `dense` to be the model before it was pruned, got "
            f"{'the pruned model itself' if dense is model else 'one with other blocks'}. Load the dense model again."
        )
    if dense is not None and {id(p) for p in dense.parameters()} & {id(p) for p in model.parameters()}:
        raise ValueError(
            "`dense` shares parameters with the model, so that it would change while the model is fitted. Load the "
            "dense model separately, or pass copy.deepcopy(model), made before pruning."
        )


def _check_task(task: PruningTask, fit: Fit, no_pattern: bool) -> None:
    if task.group == "model":
        raise ValueError(
            '`group="model"` compares the weights of all regions with each other, but each region is pruned on its '
            'own. Use `allocation="global"`, or use `prune` first and pass the model before it as `dense`.'
        )
    if no_pattern and (task.allocation is not None or task.refinement is not None or task.update is not None):
        raise ValueError(
            "`allocation`, `refinement` and `update` are part of pruning, but with `dense` nothing is pruned. Remove "
            "them, or pass them to `prune`."
        )
    tuner = fit.tuner
    in_place = getattr(tuner, "train_norms", False) or getattr(tuner, "bias", "none") != "none"
    if tuner != "full" and not in_place and not adapted_weights(tuner, task.weights):
        raise ValueError(
            f"`target_modules={tuner.target_modules!r}` of the tuner matches none of the pruned weights, such as "
            f'{next(iter(task.weights))!r}. Fused experts take no adapters; use `tuner="full"` for them.'
        )


def checked_calibration(task: PruningTask, calibration: Calibration | None) -> Calibration:
    """Return the calibration data of a reconstruction.

    Raises:
        ValueError: it is missing, or cannot measure one of the weights.
    """
    if calibration is None:
        raise ValueError(
            "Expected `calibration`, because a region is fitted on its calibration inputs. Pass token ids of shape "
            "(sequences, tokens), or an iterable of model inputs."
        )
    check_calibration(task, calibration)
    return calibration


def check_teaching(task: PruningTask, dense: nn.Module | None, reading: Reading, tell: bool = True) -> None:
    """Check that the targets come from a denser model than the one that is fitted, where this can be seen.

    Args:
        task: what is pruned.
        dense: the argument of `reconstruct`.
        reading: weight name -> a context within which the weight is in memory.
        tell: whether to warn if the weights are pruned, but not as far as asked.

    Raises:
        ValueError: the weights are as sparse as asked already, or equal those of `dense`.
    """
    if dense is not None:
        _check_differ(task, dense, reading)
        return
    counts = zeros_before(task, reading)
    if not counts:
        return
    if as_sparse_as_asked(task, counts):
        raise ValueError(
            "The targets of a reconstruction come from the dense model. Expected weights that are not pruned yet, and "
            f"{share(counts.values()):.1%} of them are zero already, where {task.pattern} is asked: each region "
            "would be fitted to the outputs of a model that is pruned already. Start from the dense model, which is "
            "pruned region by region; or give it beside the pruned model: "
            "`reconstruct(model, calibration=..., dense=dense)` without `pattern`, or "
            "`SparseTrainer(model, ..., teacher=dense)`."
        )
    if tell:
        warnings.warn(
            f"The targets come from this model, of whose weights to prune {share(counts.values()):.1%} are zero "
            "already. To fit to a dense model, prune first, and pass the dense model as `dense`.",
            stacklevel=3,
        )


def zeros_before(task: PruningTask, reading: Reading) -> dict[str, tuple[int, int]]:
    """Return (zeros, entries) of each weight that is pruned. Empty if the first of them is dense.

    A dense model is known by its first weight, and the others are not read.
    """
    counts: dict[str, tuple[int, int]] = {}
    for name in (name for name, pattern in task.patterns.items() if pattern.sparsity):
        with reading(name):
            zeros, entries = counts[name] = zero_counts({name: task.weights[name]})[name]
        if zeros <= DENSE * entries:
            return {}
    return counts


def as_sparse_as_asked(task: PruningTask, counts: dict[str, tuple[int, int]]) -> bool:
    """Return whether the weights have as many zeros as the task asks for, by what `zeros_before` returned."""
    # As many as a pattern asks for at least, whatever group it compares.
    asked = {}
    for name in counts:
        rows, columns = task.weights[name].shape
        asked[name] = rows * number_to_prune(task.patterns[name].sparsity, columns)
    if task.allocation is not None:
        return bool(counts) and sum(zeros for zeros, _ in counts.values()) >= sum(asked.values())
    return bool(counts) and all(zeros >= asked[name] for name, (zeros, _) in counts.items())


def _check_differ(task: PruningTask, dense: nn.Module, reading: Reading) -> None:
    """Raise ValueError if all weights of the task equal those of `dense`."""
    theirs = prunable_weights(dense)
    for name, weight in task.weights.items():
        other = theirs.get(name)
        if other is None:
            return
        with reading(name), loaded_layer(other.layer):
            ours, dense_matrix = weight.matrix(), other.matrix()
            if not torch.equal(ours.float(), dense_matrix.to(ours.device).float()):
                return
    raise ValueError(
        "Expected `dense` to be the model before it was pruned, got one with the same weights, so that each region "
        "would be fitted to its own outputs. Load the dense model again, and prune `model` before the reconstruction."
    )
