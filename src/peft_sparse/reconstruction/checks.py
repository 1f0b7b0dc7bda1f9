"""Refuses what `reconstruct` cannot do, before anything is done; and spells its choices, for a run that is resumed."""

import functools
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..model.blocks import find_blocks
from ..pruning.task import PruningTask
from .fitting import Loss, adapted_weights, check_tuner
from .work import Mode


def check_choices(region: Any, mode: str, loss: str, tuner: Any, no_pattern: bool, no_dense: bool) -> None:
    """Raise ValueError or TypeError for choices that are none, or that do not go together."""
    if region not in ("matrix", "submodule", "block") and not (isinstance(region, int) and region >= 1):
        raise ValueError(
            f'`region` must be "matrix", "submodule", "block" or a number of blocks from 1 on, got {region!r}.'
        )
    for name, value, choices in (("mode", mode, get_args(Mode)), ("loss", loss, get_args(Loss))):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    check_tuner(tuner)
    if no_pattern == no_dense:
        raise ValueError(
            "Expected either `pattern`, to prune region by region, or `dense`, the model before it was pruned; got "
            f"{'neither' if no_pattern else 'both'}."
        )
    if region == "matrix" and (mode == "SD" or tuner != "full" or loss != "mse" or no_pattern):
        raise ValueError(
            'Single matrices are solved exactly from their inputs: `region="matrix"` goes with `pattern`, mode "DD" '
            'or "SS", loss "mse" and tuner "full". Use `region="submodule"` for the others.'
        )


def check_amounts(
    holdout: float, epochs: float, max_steps: int | None, batch_size: int, gradient_accumulation_steps: int
) -> None:
    for name, value, accepted, wanted in (
        ("holdout", holdout, 0 <= holdout < 1, "in [0, 1)"),
        ("epochs", epochs, epochs > 0, "above 0"),
        ("max_steps", max_steps, max_steps is None or max_steps >= 0, "None or at least 0"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        (
            "gradient_accumulation_steps",
            gradient_accumulation_steps,
            gradient_accumulation_steps >= 1,
            "at least 1",
        ),
    ):
        if not accepted:
            raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")


def check_models(model: nn.Module, dense: nn.Module | None) -> None:
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"Layer {adapted[0]!r} has adapters; reconstruction attaches and merges its own, region by region. Merge "
            "or unload them first, and pass their configuration as `tuner`."
        )
    if dense is not None and (dense is model or list(find_blocks(dense)) != list(find_blocks(model))):
        raise ValueError(
            "Expected `dense` as the model before it was pruned, got "
            f"{'the pruned model itself' if dense is model else 'one with other blocks'}. Load it once more."
        )


def check_task(task: PruningTask, tuner: Literal["full"] | PeftConfig) -> None:
    if task.group == "model":
        raise ValueError(
            '`group="model"` compares the weights of all regions at once, and each is pruned in its turn. Use `prune` '
            'first and pass the model before it as `dense`, or `group="row"` or "matrix".'
        )
    groups = getattr(tuner, "train_norms", False) or getattr(tuner, "bias", "none") != "none"
    if tuner != "full" and not groups and not adapted_weights(tuner, task.weights):
        raise ValueError(
            f"`target_modules={tuner.target_modules!r}` of the tuner matches none of the pruned weights, such as "
            f'{next(iter(task.weights))!r}. Fused experts take no adapters: use `tuner="full"`.'
        )


def spell(choice: Any) -> str:
    """Return what a choice says of itself, the same in every process: no addresses, and sets in order."""
    if isinstance(choice, PeftConfig):
        fields = {key: sorted(v) if isinstance(v, set) else v for key, v in choice.to_dict().items()}
        return f"{type(choice).__name__} {fields}"
    if isinstance(choice, functools.partial):
        return f"{spell(choice.func)} {choice.args} {choice.keywords}"
    return str(getattr(choice, "__qualname__", choice))
