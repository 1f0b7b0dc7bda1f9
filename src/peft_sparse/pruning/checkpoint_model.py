"""The model that a checkpoint belongs to: its class, and whether every tensor has its place in it, and back."""

import re

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..model.blocks import block_of, find_blocks
from ..model.empty import empty_model
from .checkpoint_layout import Plan, loading_plan, may_be_missing


def fitting_model(
    config: PretrainedConfig, classes: list[type[PreTrainedModel]], tensors: dict[str, Tensor]
) -> tuple[PreTrainedModel, Plan]:
    """Return the empty model, among those of `classes`, whose tensors are `tensors`, and the plan to load it.

    If the checkpoint fits several, the one is taken in which most tensors have the names of the checkpoint.
    """
    fitting: list[tuple[int, PreTrainedModel, Plan]] = []
    errors: list[ValueError] = []
    for cls in classes:
        model = empty_model(config, cls)
        try:
            plan = loading_plan(model, tensors)
            _check_complete(model, plan)
        except ValueError as error:
            errors.append(error)
            continue
        # Of several classes, one that leaves tensors out is not meant.
        if len(classes) == 1 or not plan.left_out:
            fitting.append((len(tensors.keys() & plan.results.keys()), model, plan))
    if not fitting:
        if len(errors) == len(classes) == 1:
            raise errors[0]
        raise ValueError(
            f"Expected a checkpoint that one of the classes {', '.join(cls.__name__ for cls in classes)} fits, and "
            "none has exactly its tensors. Name the class of the model in `architectures` of config.json."
        )
    _, model, plan = max(fitting, key=lambda found: found[0])
    return model, plan


def _check_complete(model: PreTrainedModel, plan: Plan) -> None:
    """Raise ValueError if `plan` does not give every parameter of `model` in its shape."""
    blocks, state = find_blocks(model), model.state_dict()
    aliases = aliases_of(model, blocks)
    for name, tensor in plan.results.items():
        place = state[name]
        if tensor.shape != place.shape:
            raise ValueError(
                f"The checkpoint's {name!r} has shape {tuple(tensor.shape)}, and that of the model has "
                f"{tuple(place.shape)}. Correct config.json."
            )
        if place.is_floating_point() and (not tensor.is_floating_point() or tensor.itemsize == 1):
            raise ValueError(
                f"The checkpoint's {name!r} is stored as {tensor.dtype}, but pruning needs floating-point weights. "
                "Prune before quantising."
            )
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not any(alias in plan.results for alias in aliases.get(name, [name]))
        and (block_of(name, blocks) or not may_be_missing(model, name))
    ]
    if missing:
        raise ValueError(
            f"The checkpoint has no tensor for {missing[0]!r} ({len(missing)} such parameters of "
            f"{type(model).__name__}). Correct `architectures` in config.json, or load the model, save it with "
            "`save_pretrained`, and prune that."
        )


def aliases_of(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Return all names of each parameter that has several, by each of its names.

    Raises:
        ValueError: a parameter is in two blocks, or in one and outside.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = [group for group in names.values() if len(group) > 1]
    for group in shared:
        if len({block_of(name, blocks) for name in group}) > 1:
            raise ValueError(
                f"{group[0]!r} is also {group[1]!r}, and one block at a time is in memory. Use `prune` on the loaded "
                "model."
            )
    return {name: group for group in shared for name in group}


def check_round_trip(model: PreTrainedModel, saved: Plan, loaded: Plan) -> None:
    """Raise ValueError if `from_pretrained` would not get back what is written."""
    state = model.state_dict()
    wanted = {name for step in saved.steps for name in step.inputs}
    lost = [
        name
        for name in sorted(wanted)
        if name not in loaded.results or loaded.results[name].shape != state[name].shape
    ]
    if lost or loaded.left_out:
        raise ValueError(
            f"{[*lost, *loaded.left_out][0]!r} would not be loaded again under the name that transformers saves it "
            "by. Load the model, save it with `save_pretrained(..., save_original_format=False)`, and prune that."
        )


def dtypes_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype in which `from_pretrained` loads each tensor of `model` if it loads in `dtype`."""
    planned = {pattern.replace("*", ".*"): kept for pattern, kept in model._get_dtype_plan(dtype).items()}
    return {
        name: next((kept for pattern, kept in planned.items() if re.search(pattern, name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
