"""Regions: the parts of a model that are reconstructed one at a time, and how hidden states pass through them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibration.runner import restore_forward
from ..model.blocks import attention_and_mlp
from ..model.weights import PRUNABLE_LAYERS
from .calls import StateCall


RegionSize = Literal["matrix", "submodule", "block"] | int


@dataclass
class Region:
    """One block, several consecutive blocks, or the attention or the MLP of one block with the residual around it.

    Args:
        name: the name of its block or blocks, with "(attention)" or "(mlp)" if it is a part of one.
        first: index of its first block in the stack.
        blocks: its blocks, by name.
        silenced: module -> number of values that it returns, 0 for a single tensor. These modules are the other part
            of the block. They return zeros while this region runs.
        parameters: the parameters that belong to the region, by their names in the model.
        joins: "input" for an attention whose MLP reads the same input (parallel residual), and "output" for that MLP.
            None if the output of this region is the input of the next.
    """

    name: str
    first: int
    blocks: dict[str, nn.Module]
    silenced: dict[nn.Module, int] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    joins: Literal["input", "output"] | None = None

    def __call__(self, hidden: Tensor, calls: list[StateCall]) -> Tensor:
        """Return the hidden states after the region.

        Args:
            hidden: hidden states before the region, (sequences, tokens, features).
            calls: the call of each block.
        """
        with _silent(self.silenced):
            for block, call in zip(self.blocks.values(), calls, strict=True):
                hidden = call.made(block, hidden)
        return hidden

    def holds(self, weight: Tensor) -> bool:
        """Return whether the parameter `weight` belongs to the region."""
        return any(weight is parameter for parameter in self.parameters.values())


def regions_in(stack: dict[str, nn.Module], size: RegionSize) -> int:
    """Return how many regions of `size` a stack of blocks has. The single matrices of a block count as one region."""
    if isinstance(size, int):
        return -(-len(stack) // size)
    if size != "submodule":
        return len(stack)
    return sum(2 if all(attention_and_mlp(block)) else 1 for block in stack.values())


def regions_of_blocks(blocks: dict[str, nn.Module], first: int) -> list[Region]:
    """Return a list with the one region that consists of `blocks`.

    Args:
        blocks: the blocks, by name.
        first: index of the first block in its stack.
    """
    names = list(blocks)
    name = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1].rpartition('.')[2]}"
    parameters = {key: value for n, block in blocks.items() for key, value in _parameters(n, block).items()}
    return [Region(name, first, blocks, parameters=parameters)]


def regions_of_submodules(name: str, block: nn.Module, index: int, hidden: Tensor, call: StateCall) -> list[Region]:
    """Return the attention and the MLP of a block as two regions, or the block if one of the two is not found.

    The block is run on `hidden` to see which of the two comes first and which parameters each depends on.

    Args:
        name: name of the block.
        block: the block.
        index: index of the block in its stack.
        hidden: hidden states before the block, (sequences, tokens, features).
        call: the call of the block.

    Raises:
        ValueError: attention and MLP together do not give the output of the block, for example because the block
            normalises after the residual.
    """
    attention, mlp = attention_and_mlp(block)
    if not attention or not mlp:
        return regions_of_blocks({name: block}, index)
    whole, returned = _run_noting_values(name, block, index, hidden, call)
    first, second = _halves(name, block, index, attention, mlp, returned)
    with torch.no_grad():
        after_attention = first(hidden, [call])
        in_a_row = _close(second(after_attention, [call]), whole)
        side_by_side = not in_a_row and _close(second(hidden, [call]) + after_attention - hidden, whole)
    if not in_a_row and not side_by_side:
        raise ValueError(
            f"Expected a block whose output is that of its attention followed by its MLP, but {name!r} computes "
            'something else; this is so if a norm follows the residual. Use `region="block"`.'
        )
    if side_by_side:
        first.joins, second.joins = "input", "output"
    _assign(_parameters(name, block), first, second, hidden, call)
    return [first, second]


def regions_by_names(
    blocks: dict[str, nn.Module], first: int, size: RegionSize, returned: Mapping[nn.Module, int]
) -> list[Region]:
    """Return the regions of a window of blocks without running it: parameters are assigned by the module they lie in.

    This is for tensors without values, because `regions_of_submodules` needs values. A norm before attention or MLP
    belongs to both regions here.

    Args:
        blocks: the blocks of the window, by name.
        first: index of the first block in its stack.
        size: size of the regions.
        returned: module of attention or MLP -> number of values that it returns, 0 for a single tensor.
    """
    (whole,) = regions_of_blocks(blocks, first)
    attention, mlp = attention_and_mlp(next(iter(blocks.values())))
    if size != "submodule" or not attention or not mlp:
        return [whole]
    ((name, block),) = blocks.items()
    halves = _halves(name, block, first, attention, mlp, returned)
    for half in halves:
        others = {id(parameter) for module in half.silenced for parameter in module.parameters()}
        half.parameters = {key: value for key, value in whole.parameters.items() if id(value) not in others}
    return halves


def _halves(
    name: str,
    block: nn.Module,
    index: int,
    attention: Sequence[nn.Module],
    mlp: Sequence[nn.Module],
    returned: Mapping[nn.Module, int],
) -> list[Region]:
    """Return the regions of attention and MLP of a block, without parameters."""
    return [
        Region(f"{name} ({part})", index, {name: block}, {module: returned.get(module, 0) for module in silenced})
        for part, silenced in (("attention", mlp), ("mlp", attention))
    ]


def _run_noting_values(
    name: str, block: nn.Module, index: int, hidden: Tensor, call: StateCall
) -> tuple[Tensor, dict[nn.Module, int]]:
    """Return the output of a block, and the number of values that each module of its attention and MLP returned."""
    returned: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        returned[module] = len(output) if isinstance(output, tuple) else 0

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for modules in attention_and_mlp(block):
            for module in modules:
                hooks.callback(module.register_forward_hook(note).remove)
        whole = regions_of_blocks({name: block}, index)[0](hidden, [call])
    return whole, returned


def _parameters(name: str, block: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that can be trained with it, by their names in the model.

    Embeddings inside a block are left out. In T5 they are the position bias. Its values have already been computed for
    the later blocks, which would not see a change.
    """
    handed_on = {id(p) for module in block.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return {f"{name}.{key}": value for key, value in block.named_parameters() if id(value) not in handed_on}


def _assign(
    parameters: dict[str, nn.Parameter], first: Region, second: Region, hidden: Tensor, call: StateCall
) -> None:
    """Give each parameter to the region whose output depends on it.

    A parameter that both depend on, such as the one norm before a parallel residual, belongs to neither: fitting one
    region would change the output of the other. A parameter that neither depends on, such as that of an expert that
    received no token, belongs to the second region.
    """
    trained = {key: value for key, value in parameters.items() if value.is_floating_point()}
    reached = [_gradients(region, list(trained.values()), hidden, call) for region in (first, second)]
    for (key, parameter), gradients in zip(trained.items(), zip(*reached, strict=True), strict=True):
        depends = [gradient is not None for gradient in gradients]
        if all(depends):
            # The norm before a silenced module is part of the graph, but its gradient is zero.
            depends = [bool(gradient.any()) for gradient in gradients if gradient is not None]
        if not all(depends):
            (first if depends[0] else second).parameters[key] = parameter


def _gradients(
    region: Region, parameters: list[nn.Parameter], hidden: Tensor, call: StateCall
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the sum of the region's output. They are None for parameters that were not used."""
    wanted = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            return torch.autograd.grad(region(hidden, [call]).float().sum(), parameters, allow_unused=True)
    finally:
        for parameter, was in wanted:
            parameter.requires_grad_(was)


def _close(one: Tensor, other: Tensor) -> bool:
    # In half precision the two computations round at different places.
    precision = 1e-4 if one.dtype in (torch.float32, torch.float64) else 0.05
    return bool((one.float() - other.float()).norm() <= precision * other.float().norm())


@contextlib.contextmanager
def _silent(modules: dict[nn.Module, int]) -> Iterator[None]:
    """Make `modules` return zeros without computing anything."""
    with contextlib.ExitStack() as undo:
        for module, values in modules.items():
            undo.callback(restore_forward, module, module.__dict__.get("forward"))
            module.forward = _zeros_for(module, values)
        yield


def _zeros_for(module: nn.Module, values: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = args[0] if args else kwargs["hidden_states"]
        if isinstance(module, PRUNABLE_LAYERS):
            return inputs.new_zeros(*inputs.shape[:-1], _outputs(module))
        zeros = torch.zeros_like(inputs)
        return (zeros, *[None] * (values - 1)) if values else zeros

    return forward


def _outputs(module: Any) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.nf)
