"""Refuses weights that several regions hold: to fit one of these regions would change the outputs of the others."""

from torch import nn

from ..model.blocks import base_model, block_of, find_stacks
from .regions import RegionSize, blocks_together, regions_of_blocks
from .task import ReconstructionTask
from .trainable import adapted_weights, plain_parameters


def check_ties(task: ReconstructionTask) -> None:
    """Check that no weight that is pruned or trained is used in two regions, or also outside the blocks.

    A pruned weight that is also an embedding is allowed here, because `pruning_task` allows it only if the caller
    does. Two parts of one block may share weights, because such a block is fitted whole.

    Raises:
        ValueError: a weight is used in two regions, or in a region and outside the blocks.
    """
    changed, size = _changed(task), task.size
    pruned = {_identity(weight.storage) for weight in task.pruning.weights.values()}
    places: dict[int, tuple[str, str, nn.Parameter]] = {}
    for name, parameter, embeds in _uses(task.model):
        key = _identity(parameter)
        if key not in changed or (embeds and key in pruned):
            continue
        region = _region_of(name, task.model, size)
        known, other, first = places.setdefault(key, (name, region, parameter))
        # Two parameters of one memory would be trained twice, even within a region.
        if other != region or first is not parameter:
            raise ValueError(
                f"{known!r} and {name!r} are one weight, but they are two parameters, belong to different regions, or "
                "one of them lies outside the blocks. A region is fitted to its own outputs, and this would change "
                "those of the other. "
                f"Use `prune`, {'a number of blocks as `region` that holds both, ' if size != 'matrix' else ''}or "
                "leave the weight out: exclude it with `exclude_modules`, and train adapters in place of "
                '`tuner="full"`.'
            )


def _changed(task: ReconstructionTask) -> set[int]:
    """Return the identities of all parameters that are pruned or trained."""
    tuner, weights = task.fit.tuner, task.pruning.weights
    parameters = [weight.storage for weight in weights.values()]
    if task.size != "matrix":
        adapted = adapted_weights(tuner, weights)
        for stack in find_stacks(task.model):
            (everything,) = regions_of_blocks(stack, 0)
            parameters += plain_parameters(everything, tuner, adapted)
    return {_identity(parameter) for parameter in parameters if parameter.numel()}


def _uses(model: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """Return (name, parameter, whether it is an embedding) of every place in which a parameter stands."""
    return [
        (f"{name}.{key}" if name else key, parameter, isinstance(module, nn.Embedding))
        for name, module in base_model(model).named_modules(remove_duplicate=False)
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]


def _region_of(name: str, model: nn.Module, size: RegionSize) -> str:
    """Return a text that is equal for parameters of the same region, "" for those outside the blocks."""
    for number, stack in enumerate(find_stacks(model)):
        block = block_of(name, stack)
        if block is not None:
            window = list(stack).index(block) // blocks_together(size)
            return name if size == "matrix" else f"{number} {window}"
    return ""


def _identity(parameter: nn.Parameter | object) -> int:
    """Return a number that is equal for parameters that share their memory."""
    pointer = getattr(parameter, "data_ptr", int)()
    # Tensors on the meta device have no memory.
    return pointer or id(parameter)
