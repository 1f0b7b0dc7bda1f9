"""How the tensors of a checkpoint become those of a model, and back, in steps that can be made one at a time.

The conversions are those of transformers: `from_pretrained` and `save_pretrained` make them for a whole model at once.
They rename tensors, stack the experts of a layer, split what is fused, and more. Here they are planned on the meta
device, which gives every name and shape before a tensor is read.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict


@dataclass
class Step:
    """Tensors that are converted together. Most steps rename one tensor.

    Args:
        key: the name under which `transform` collects its tensors.
        transform: what transformers does with them.
        inputs: name of each tensor that it takes -> the pattern that the name matches, in the order of the names.
        outputs: name of each tensor, as `transform` returns it -> its name.
    """

    key: str
    transform: WeightTransform
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the converted tensors by name. `read` gives those that the step takes."""
        transform = deepcopy(self.transform)
        for name, pattern in self.inputs.items():
            transform.add_tensor(self.key, name, pattern, read(name))
        values = transform.convert(self.key, model=model, config=model.config)
        return {
            self.outputs.get(name, name): value[0] if isinstance(value, list) else value
            for name, value in values.items()
        }


@dataclass
class Plan:
    """Steps that convert all tensors of a checkpoint or of a model.

    Args:
        steps: the steps. Their order does not matter.
        results: every tensor that they give, on the meta device.
        left_out: the tensors that no step takes, because the model does not have them. Those that the model computes
            itself are not among them: older versions of transformers saved some of its buffers.
        transforms: what transformers used to load the tensors, which saving them reverts.
    """

    steps: list[Step]
    results: dict[str, Tensor]
    left_out: list[str] = field(default_factory=list)
    transforms: list[WeightTransform] = field(default_factory=list)


def loading_plan(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Plan:
    """Return the steps with which `from_pretrained` turns the tensors of a checkpoint into those of `model`.

    Args:
        model: the model. Only its names and shapes are used.
        tensors: the tensors of the checkpoint on the meta device.

    Raises:
        ValueError: tensors cannot be converted.
    """
    transforms = get_model_conversion_mapping(model)
    renamings, converters = _by_kind(transforms)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, places = model.base_model_prefix, model.state_dict()
    steps: dict[str, Step] = {}
    computed = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    left_out = []
    # Some renamings depend on what was renamed before, and transformers takes the names in this order.
    for name in sorted(tensors, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, places)
        if key not in places and name in places:
            key, pattern = rename_source_key(name, [], [], prefix, places)
        if key not in places:
            if key.rpartition(".")[2] not in computed:
                left_out.append(name)
            continue
        transform = WeightRenaming(name, key) if pattern is None else by_pattern[pattern]
        steps.setdefault(key, Step(key, transform)).inputs[name] = pattern or name
    plan = Plan(list(steps.values()), {}, left_out, [t for t in transforms if t.was_used()])
    for step in plan.steps:
        found = _tried(step, model, tensors)
        step.outputs = {name: name for name in found}
        plan.results |= found
    return plan


def saving_plan(model: PreTrainedModel, transforms: list[WeightTransform]) -> Plan:
    """Return the steps with which `save_pretrained` turns the tensors of `model` into those of a checkpoint.

    Args:
        model: the model. Only its names and shapes are used, and which of its tensors are tied.
        transforms: what transformers used to load the model.

    Raises:
        ValueError: tensors cannot be converted.
    """
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = {name: tensor.to("meta") for name, tensor in remove_tied_weights_from_state_dict(state, model).items()}
    renamings, converters = _by_kind([transform.reverse_transform() for transform in reversed(transforms)])
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    steps: dict[str, Step] = {}
    for name in sorted(state, key=dot_natural_key):
        key, pattern = _converted(name, converters)
        if pattern is None:
            key = _renamed(name, renamings)
        transform = WeightRenaming(name, key) if pattern is None else by_pattern[pattern]
        steps.setdefault(key, Step(key, transform)).inputs[name] = pattern or name
    plan = Plan(list(steps.values()), {})
    for step in plan.steps:
        found = _tried(step, model, state)
        converted = isinstance(step.transform, WeightConverter)
        step.outputs = {name: _renamed(name, renamings) if converted else name for name in found}
        plan.results |= {step.outputs[name]: tensor for name, tensor in found.items()}
    return plan


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Return whether a checkpoint of `model` need not hold the tensor `name`, because the model computes it."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _by_kind(transforms: Iterable[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    transforms = list(transforms)
    return (
        [transform for transform in transforms if isinstance(transform, WeightRenaming)],
        [transform for transform in transforms if isinstance(transform, WeightConverter)],
    )


def _converted(name: str, converters: list[WeightConverter]) -> tuple[str, str | None]:
    for converter in converters:
        key, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return key, pattern
    return name, None


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


@torch.no_grad()
def _tried(step: Step, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return step.run(model, lambda name: tensors[name])
    except Exception as error:
        raise ValueError(
            f"Expected tensors that transformers can convert for {type(model).__name__}, and could not convert "
            f"{next(iter(step.inputs))!r} ({len(step.inputs)} tensors): {error}. Load the model with "
            "`from_pretrained`, which says what does not fit, and use `prune`."
        ) from error
