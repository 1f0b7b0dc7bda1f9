"""Divides a block into its attention and its MLP, and tries out whether the two parts make up the block."""

import contextlib
import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.recording import map_leaves
from ..model.blocks import attention_and_mlp
from .calls import StateCall
from .regions import Region, RegionSize, halves_of, regions_of_blocks


def regions_tried(
    blocks: dict[str, nn.Module], first: int, size: RegionSize, hidden: Tensor, calls: list[StateCall]
) -> list[Region]:
    """Return the regions of a window of blocks.

    Args:
        blocks: the blocks of the window, by name.
        first: index of the first block in its stack.
        size: size of the regions.
        hidden: hidden states before the window, (sequences, tokens, features).
        calls: the call of each block.
    """
    if size == "submodule":
        ((name, block),) = blocks.items()
        return regions_of_submodules(name, block, first, hidden, calls[0])
    (whole,) = regions_of_blocks(blocks, first)
    whole.writes = any(call.writes for call in calls)
    return [whole]


def regions_of_submodules(name: str, block: nn.Module, index: int, hidden: Tensor, call: StateCall) -> list[Region]:
    """Return the attention and the MLP of a block as two regions, or the block as one region that says why.

    The block is run on `hidden`, and so are its two parts, to see whether they make up the block, which of the two
    comes first, and which parameters each depends on. If the parts fail, the block is one region. An error of the
    block itself, when it runs whole, is raised.

    Args:
        name: name of the block.
        block: the block.
        index: index of the block in its stack.
        hidden: hidden states before the block, (sequences, tokens, features).
        call: the call of the block.
    """
    (whole,) = regions_of_blocks({name: block}, index)
    whole.writes = call.writes
    outputs, returned = run_noting_values(whole, hidden, call)
    attention, mlp = attention_and_mlp(block)
    if not attention or not mlp:
        whole.whole = f"no {'MLP' if attention else 'attention'} was found in it"
        return [whole]
    halves = halves_of(name, block, index, attention, mlp, returned)
    for half in halves:
        half.writes = call.writes
    try:
        whole.whole = _try_halves(whole, halves, outputs, hidden, call)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever the parts of a block cannot do alone, the block has just done as a whole.
        whole.whole = f"its parts do not run apart from each other ({type(error).__name__}: {error})"
    return halves if whole.whole is None else [whole]


def _try_halves(whole: Region, halves: list[Region], outputs: Tensor, hidden: Tensor, call: StateCall) -> str | None:
    """Give `halves` what each of them needs to be a region, or return why they do not make up the block."""
    first, second = halves
    with torch.no_grad():
        after_attention = first(hidden, [call])
        in_a_row = _close(second(after_attention, [call]), outputs)
        side_by_side = not in_a_row and _close(second(hidden, [call]) + after_attention - hidden, outputs)
    if not in_a_row and not side_by_side:
        return "its attention followed by its MLP computes something else, as where a norm follows the residual"
    if side_by_side:
        first.joins, second.joins = "input", "output"
    shared = _assign(whole.parameters, first, second, hidden, call)
    # A norm that both read is not trained. A matrix that both use would not even be pruned.
    matrices = [key for key in shared if whole.parameters[key].dim() > 1]
    return f"its attention and its MLP both use {matrices[0]!r}" if matrices else None


@torch.no_grad()
def hands_on(name: str, block: nn.Module, halves: list[Region], hidden: Tensor, call: StateCall) -> bool:
    """Return whether a block whose attention and MLP are both silenced hands on what it receives.

    Otherwise the two do not make up the block, as where a norm follows the residual. This needs no weight of the
    attention or the MLP, so it can be told of a block without values.

    Args:
        name: name of the block.
        block: the block, which may be on the meta device. A copy of it runs.
        halves: its attention and its MLP.
        hidden: hidden states before the block; only their shape is used.
        call: the call of the block; only the shapes of its tensors are used.
    """
    silenced = {module: values for half in halves for module, values in half.silenced.items()}
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(block, memo)
    copies = {memo[id(module)]: values for module, values in silenced.items()}
    inside = {id(below) for module in copies for below in module.modules()}
    for module in (below for below in twin.modules() if id(below) not in inside):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                # Not ones, because two norms in a row that scale by one are as one norm.
                module._parameters[key] = nn.Parameter(torch.rand(parameter.shape, device="cpu") + 0.5)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.ones(buffer.shape, dtype=buffer.dtype, device="cpu")

    def plain(leaf: Any) -> Any:
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu") if isinstance(leaf, Tensor) else leaf

    args, kwargs = map_leaves(plain, (call.args, call.kwargs))
    inputs = torch.rand(hidden.shape, device="cpu")
    try:
        outputs = Region(name, 0, {name: twin}, copies)(inputs, [replace(call, args=args, kwargs=kwargs)])
        return _close(outputs, inputs)
    except Exception:
        # What fails here fails when the parts are tried out in a run.
        return False


def run_noting_values(whole: Region, hidden: Tensor, call: StateCall) -> tuple[Tensor, dict[nn.Module, int]]:
    """Run a whole block.

    Returns:
        The outputs, and the number of values that each module of the attention and the MLP returned, 0 for a single
        tensor. A module that returned neither a tensor nor a sequence of values is left out.
    """
    returned: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, (Tensor, tuple, list)):
            returned[module] = 0 if isinstance(output, Tensor) else len(output)

    (block,) = whole.blocks.values()
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for modules in attention_and_mlp(block):
            for module in modules:
                hooks.callback(module.register_forward_hook(note).remove)
        outputs = whole(hidden, [call])
    return outputs, returned


def _assign(
    parameters: dict[str, nn.Parameter], first: Region, second: Region, hidden: Tensor, call: StateCall
) -> list[str]:
    """Give each parameter to the region whose output depends on it, and return the names of those that both use.

    A parameter that both depend on, such as the one norm before a parallel residual, belongs to neither: fitting one
    region would change the output of the other. A parameter that neither depends on belongs to the region in which its
    module is not silenced, or to the second. It may be that of an expert that received no token, or of an indexer that
    chooses which tokens the attention reads.
    """
    shared = []
    of_first = {id(parameter) for module in second.silenced for parameter in module.parameters()}
    trained = {key: value for key, value in parameters.items() if value.is_floating_point()}
    reached = [_gradients(region, list(trained.values()), hidden, call) for region in (first, second)]
    for (key, parameter), gradients in zip(trained.items(), zip(*reached, strict=True), strict=True):
        depends = [gradient is not None for gradient in gradients]
        if all(depends):
            # The norm before a silenced module is part of the graph, but its gradient is zero.
            depends = [bool(gradient.any()) for gradient in gradients if gradient is not None]
        if all(depends):
            shared.append(key)
        else:
            is_first = depends[0] or (not depends[1] and id(parameter) in of_first)
            (first if is_first else second).parameters[key] = parameter
    return shared


def _gradients(
    region: Region, parameters: list[nn.Parameter], hidden: Tensor, call: StateCall
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the sum of the region's output. They are None for parameters that were not used."""
    wanted = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad(), region.recording():
            return torch.autograd.grad(region(hidden, [call]).float().sum(), parameters, allow_unused=True)
    finally:
        for parameter, was in wanted:
            parameter.requires_grad_(was)


def _close(one: Tensor, other: Tensor) -> bool:
    # In half precision the two computations round at different places.
    precision = 1e-4 if one.dtype in (torch.float32, torch.float64) else 0.05
    return bool((one.float() - other.float()).norm() <= precision * other.float().norm())
