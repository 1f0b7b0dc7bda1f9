"""Checks the arguments of `residual_lora` before any work, and finds the weights that an adapter can correct."""

from dataclasses import dataclass, field

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from ..calibration.activations import Activations, check_activations
from ..calibration.inputs import Calibration
from ..model.blocks import Targets, base_model, find_blocks, prunable_weights
from ..model.kinds import obstacle
from ..model.offload import is_offloaded
from ..model.tree import has_adapters
from ..model.weights import WeightView, check_finite, share, zero_counts
from ..pruning.checks import pruning_task
from ..pruning.offloaded import one_layer_at_a_time
from ..pruning.task import PruningTask
from ..tuners.model import MAMBA_BYPASSED, MAMBA_TYPES


@dataclass
class ResidualTask:
    """What `residual_lora` corrects.

    Args:
        by_block: the names of the weights to correct in each block.
        pruned: the weights W' to correct, by name.
        dense: the weights W from which they were made, by name.
        ranks: the rank of each correction, by name.
        left_out: the matrices inside the blocks that are not corrected, by name, each with its reason.
        sparsity: the fraction of zeros in the weights W'.
    """

    by_block: dict[str | None, list[str]]
    pruned: dict[str, WeightView]
    dense: dict[str, WeightView]
    left_out: dict[str, str]
    ranks: dict[str, int] = field(default_factory=dict)
    sparsity: float = 0.0

    def inside(self, block: str) -> dict[str, WeightView]:
        """Return the pruned weights to correct in the block called `block`, by name."""
        return {name: self.pruned[name] for name in self.by_block.get(block, ()) if name in self.pruned}

    def leave_out(self, reasons: dict[str, str]) -> None:
        """Correct the weights named in `reasons` no more, and list them.

        Raises:
            ValueError: no weight is left.
        """
        # The experts of one parameter are one entry, as in the reports of pruning.
        self.left_out |= {_listed(name, self.pruned[name]): reason for name, reason in reasons.items()}
        self.pruned = {name: weight for name, weight in self.pruned.items() if name not in reasons}
        if not self.pruned:
            name, reason = next(iter(reasons.items()))
            raise ValueError(
                f"Expected pruned layers that LoRA can correct, found none: {name!r} is {reason} ({len(reasons)} "
                "layers are left out). Name other layers in `target_modules`, or use `reconstruct`."
            )


def residual_task(
    model: nn.Module,
    dense: nn.Module,
    calibration: Calibration | None,
    *,
    r: int,
    damping: float,
    target_modules: Targets,
    exclude_modules: Targets,
    rank_pattern: dict[str, int] | None,
    batch_size: int,
    activations: Activations,
) -> ResidualTask:
    """Return what is corrected, with all arguments of `residual_lora` checked.

    Raises:
        ValueError: see `residual_lora`.
    """
    _check_numbers(r, rank_pattern, damping, batch_size)
    check_activations(activations)
    _check_models(model, dense)
    # A pattern of 0 prunes nothing: it chooses weights and checks that they can be read.
    chosen = pruning_task(model, 0.0, target_modules=target_modules, exclude_modules=exclude_modules, prune_tied=True)
    _check_calibration(chosen, calibration)
    dense_weights = _dense_weights(chosen.weights, dense, target_modules, exclude_modules)
    task = ResidualTask(chosen.by_block, chosen.weights, dense_weights, dict(chosen.left_out))
    task.leave_out(_no_targets(model, task.pruned))
    _check_pruned(task)
    task.ranks = _ranks(task.pruned, r, rank_pattern or {})
    return task


def _listed(name: str, weight: WeightView) -> str:
    return name if weight.expert is None else name.rpartition(".")[0]


def _check_numbers(r: int, rank_pattern: dict[str, int] | None, damping: float, batch_size: int) -> None:
    for rank in (r, *(rank_pattern or {}).values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"Each rank of `r` and `rank_pattern` must be an integer of at least 1, got {rank!r}.")
    if not damping >= 0:
        raise ValueError(f"`damping` must be at least 0, got {damping!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size!r}.")


def _check_models(model: nn.Module, dense: nn.Module) -> None:
    if dense is model:
        raise ValueError(
            "Expected `dense` to be the model before it was pruned, got the pruned model itself. Load the dense model "
            "again, or pass copy.deepcopy(model), made before pruning."
        )
    for role, each in (("model", model), ("dense", dense)):
        if has_adapters(each):
            raise ValueError(
                f"`{role}` has adapters, but the correction is computed from plain weights. Merge or unload its "
                "adapters first."
            )
    if list(find_blocks(dense)) != list(find_blocks(model)):
        raise ValueError(
            "Expected `dense` to be the model before it was pruned, got one with other blocks. Load the dense model "
            "again."
        )


def _check_calibration(task: PruningTask, calibration: Calibration | None) -> None:
    if calibration is None:
        raise ValueError(
            "Expected `calibration`, because the correction is the best one for the inputs of each layer. Pass token "
            "ids of shape (sequences, tokens), or an iterable of model inputs."
        )
    if outside := task.by_block.get(None):
        raise ValueError(
            f"Calibration measures inputs block by block, and {outside[0]!r} lies outside the blocks. Leave it out of "
            "`target_modules`."
        )
    if offloaded := [name for name, weight in task.weights.items() if is_offloaded(weight.layer)]:
        raise ValueError(
            f"The weight of {offloaded[0]!r} is offloaded, and an adapter is attached to weights in memory. Load the "
            'model without offloading, and move block by block with `device="cuda"`.'
        )


def _dense_weights(
    pruned: dict[str, WeightView], dense: nn.Module, target_modules: Targets, exclude_modules: Targets
) -> dict[str, WeightView]:
    found = prunable_weights(dense, target_modules, exclude_modules)
    for name, weight in pruned.items():
        other = found.get(name)
        if other is not None and (reason := obstacle(other)):
            raise ValueError(f"In `dense`, the weight of {name!r} {reason}")
        shape = None if other is None else other.storage.shape
        if shape != weight.storage.shape:
            raise ValueError(
                f"Expected `dense` to be the model before it was pruned, but {name!r} is "
                f"{tuple(weight.storage.shape)} in `model` and {'missing' if shape is None else tuple(shape)} in "
                "`dense`. Load the dense model again."
            )
    return {name: found[name] for name in pruned}


def _no_targets(model: nn.Module, weights: dict[str, WeightView]) -> dict[str, str]:
    """Return the weights that PEFT's LoRA cannot correct, by name, each with the reason."""
    kind = getattr(getattr(base_model(model), "config", None), "model_type", None)
    bypassed = MAMBA_BYPASSED if kind in MAMBA_TYPES else ()
    reasons = {}
    for name, weight in weights.items():
        layer = weight.layer
        if weight.expert is not None:
            reasons[name] = "a fused expert"
        elif name.rpartition(".")[2] in bypassed:
            reasons[name] = "a layer whose weight the kernels of the model read"
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
            reasons[name] = "a convolution with groups"
        elif isinstance(layer, nn.Conv2d) and (layer.dilation != (1, 1) or layer.padding_mode != "zeros"):
            # The convolution that PEFT adds has neither.
            reasons[name] = "a convolution with dilation or another padding than zeros"
    return reasons


@torch.no_grad()
def _check_pruned(task: ResidualTask) -> None:
    """Leave out the weights that equal those of the dense model, and check that the others were pruned."""
    check_finite(task.pruned)
    unchanged = {}
    with one_layer_at_a_time(task.dense) as reading:
        for name, weight in task.pruned.items():
            with reading(name):
                check_finite({name: task.dense[name]})
                ours = weight.matrix()
                if torch.equal(ours.float(), task.dense[name].matrix().to(ours.device).float()):
                    unchanged[name] = "equal to the dense weight"
    task.leave_out(unchanged)
    before, task.sparsity = (
        share(zero_counts({name: weights[name] for name in task.pruned}).values())
        for weights in (task.dense, task.pruned)
    )
    if task.sparsity <= before:
        raise ValueError(
            "Expected `model` to be pruned and `dense` to be the model before that. Of the weights that differ, "
            f"{task.sparsity:.1%} are zero in `model` and {before:.1%} in `dense`. Prune the model, or exchange the "
            "two."
        )


def _ranks(weights: dict[str, WeightView], r: int, rank_pattern: dict[str, int]) -> dict[str, int]:
    """Return the rank of each weight. Keys match as in PEFT: the first key that matches a name counts."""
    keys = {name: get_pattern_key(list(rank_pattern), name) for name in weights}
    if idle := [key for key in rank_pattern if key not in keys.values()]:
        raise ValueError(
            f"{idle[0]!r} in `rank_pattern` matches no corrected layer, or only layers that an earlier key matches. "
            f"Corrected layers are called like {next(iter(weights))!r}."
        )
    ranks = {name: rank_pattern.get(keys[name], r) for name in weights}
    for name, rank in ranks.items():
        if rank > min(weights[name].shape):
            raise ValueError(
                f"A correction of {name!r}, which is {weights[name].shape}, has a rank of at most "
                f"{min(weights[name].shape)}, got {rank}. Lower `r`, or give this layer a rank in `rank_pattern`."
            )
    return ranks
