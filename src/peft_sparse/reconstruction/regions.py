"""Regions of a model that are reconstructed on their own, and how hidden states pass through them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..calibration.runner import Call, restore_forward
from ..model.blocks import attention_and_mlp
from ..model.weights import PRUNABLE_LAYERS


RegionSize = Literal["matrix", "submodule", "block"] | int


@dataclass
class Region:
    """One block, several in a row, or the attention or MLP of one with the residual around it.

    Args:
        name: of its blocks, and which part of them.
        first: index of its first block.
        blocks: its blocks, by name.
        silenced: modules that add nothing while this region runs, the other part of the block, and how many values
            each returns; 0 for one that returns a tensor.
        parameters: what belongs to the region, by the model's names.
        joins: "input" for an attention whose MLP reads the same input (parallel residual), "output" for that MLP;
            None where one region's output is the next one's input.
    """

    name: str
    first: int
    blocks: dict[str, nn.Module]
    silenced: dict[nn.Module, int] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    joins: Literal["input", "output"] | None = None

    def __call__(self, hidden: Tensor, calls: list[Call]) -> Tensor:
        """Return the hidden states after the region.

        Args:
            hidden: (sequences, tokens, features).
            calls: the arguments of each of its blocks.
        """
        with _silent(self.silenced):
            for block, call in zip(self.blocks.values(), calls, strict=True):
                output = block(hidden, *call.args, **call.kwargs)
                hidden = output if isinstance(output, Tensor) else output[0]
        return hidden

    def holds(self, weight: Tensor) -> bool:
        """Tell whether the parameter `weight` belongs to the region."""
        return any(weight is parameter for parameter in self.parameters.values())


def regions_in(stack: dict[str, nn.Module], size: RegionSize) -> int:
    """Return how many regions of `size` a stack of blocks has; single matrices of a block count as one."""
    if isinstance(size, int):
        return -(-len(stack) // size)
    if size != "submodule":
        return len(stack)
    return sum(2 if all(attention_and_mlp(block)) else 1 for block in stack.values())


def regions_of_blocks(blocks: dict[str, nn.Module], first: int, label: str | None = None) -> list[Region]:
    """Return the one region that consists of `blocks`, the first of which is number `first`."""
    names = list(blocks)
    name = label or (names[0] if len(names) == 1 else f"{names[0]} .. {names[-1].rpartition('.')[2]}")
    parameters = {key: value for n, block in blocks.items() for key, value in _parameters(n, block).items()}
    return [Region(name, first, blocks, parameters=parameters)]


def regions_of_submodules(name: str, block: nn.Module, index: int, hidden: Tensor, call: Call) -> list[Region]:
    """Return attention and MLP of one block as two regions, having tried on `hidden` that they make up the block.

    Raises:
        ValueError: they do not: the block normalises after its residual, or is built otherwise.
    """
    attention, mlp = attention_and_mlp(block)
    if not attention or not mlp:
        return regions_of_blocks({name: block}, index)
    returned: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        returned[module] = len(output) if isinstance(output, tuple) else 0

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for module in (*attention, *mlp):
            hooks.callback(module.register_forward_hook(note).remove)
        whole = regions_of_blocks({name: block}, index)[0](hidden, [call])
    first = Region(f"{name} (attention)", index, {name: block}, {module: returned.get(module, 0) for module in mlp})
    second = Region(f"{name} (mlp)", index, {name: block}, {module: returned.get(module, 0) for module in attention})
    with torch.no_grad():
        after_attention = first(hidden, [call])
        in_a_row = _close(second(after_attention, [call]), whole)
        side_by_side = not in_a_row and _close(second(hidden, [call]) + after_attention - hidden, whole)
    if not in_a_row and not side_by_side:
        raise ValueError(
            f"Attention and MLP of {name!r} cannot be told apart: one after the other they do not give the block's "
            'output, as where a norm follows the residual. Use `region="block"`.'
        )
    if side_by_side:
        first.joins, second.joins = "input", "output"
    _assign(_parameters(name, block), first, second, hidden, call)
    return [first, second]


def _parameters(name: str, block: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a block computes with, by the model's names.

    Not its embeddings, T5's position bias: what they make is handed on to blocks that have been given theirs already.
    """
    handed_on = {id(p) for module in block.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return {f"{name}.{key}": value for key, value in block.named_parameters() if id(value) not in handed_on}


def _assign(parameters: dict[str, nn.Parameter], first: Region, second: Region, hidden: Tensor, call: Call) -> None:
    """Give each parameter to the region whose output depends on it.

    Neither gets what both depend on, such as the one norm before a parallel residual: fitting one region would change
    what the other computes. What did not run, an expert that no token was sent to, goes with the MLP.
    """
    trained = {key: value for key, value in parameters.items() if value.is_floating_point()}
    reached = [_gradients(region, list(trained.values()), hidden, call) for region in (first, second)]
    for (key, parameter), gradients in zip(trained.items(), zip(*reached, strict=True), strict=True):
        depends = [gradient is not None for gradient in gradients]
        if all(depends):
            # A norm of what is silenced is in the graph, and changes nothing.
            depends = [bool(gradient.any()) for gradient in gradients if gradient is not None]
        if not all(depends):
            (first if depends[0] else second).parameters[key] = parameter


def _gradients(
    region: Region, parameters: list[nn.Parameter], hidden: Tensor, call: Call
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the sum of the region's output."""
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
    # Half precision rounds each of the two differently.
    precision = 1e-4 if one.dtype in (torch.float32, torch.float64) else 0.05
    return bool((one.float() - other.float()).norm() <= precision * other.float().norm())


@contextlib.contextmanager
def _silent(modules: dict[nn.Module, int]) -> Iterator[None]:
    """Have `modules` return zeros without computing anything."""
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


def widened(value: Any) -> Any:
    """Return `value`, in float32 if it is a tensor of half precision."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


def widened_call(call: Call) -> Call:
    """Return `call` with its tensors of half precision in float32."""
    return Call(tree_map(widened, call.args), tree_map(widened, call.kwargs))
