"""Regions: the parts of a model that are reconstructed one at a time, and how hidden states pass through them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from ..calibration.residence import restore_forward
from ..model.blocks import attention_and_mlp
from ..model.kinds import is_quantised
from ..model.weights import PRUNABLE_LAYERS, WeightView
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
        whole: why a block was not divided into attention and MLP; None if it was, or if this was not asked for.
        writes: whether its blocks write into their arguments.
    """

    name: str
    first: int
    blocks: dict[str, nn.Module]
    silenced: dict[nn.Module, int] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    joins: Literal["input", "output"] | None = None
    whole: str | None = None
    writes: bool = False

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

    def recording(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context within which the region runs forward and backward to get gradients."""
        return allow_mutation_on_saved_tensors() if self.writes else contextlib.nullcontext()

    def among(self, weights: Mapping[str, WeightView]) -> dict[str, WeightView]:
        """Return those of `weights` whose parameter belongs to the region, by name."""
        own = {id(parameter) for parameter in self.parameters.values()}
        return {name: weight for name, weight in weights.items() if id(weight.storage) in own}


def blocks_together(size: RegionSize) -> int:
    """Return how many blocks are at work together: as many as a region has, at least one."""
    return size if isinstance(size, int) else 1


def regions_in(blocks: dict[str, nn.Module], size: RegionSize) -> int:
    """Return how many regions of `size` consecutive blocks have at most: those of a window, or of a whole stack.

    So many numbers are kept for them before they run. A block in which an attention and an MLP are found keeps two
    numbers. If it turns out that it can only be fitted whole, its second number is not used. The number of a region,
    from which its seed is computed, then does not depend on other blocks. The single matrices of a block count as one
    region.
    """
    if isinstance(size, int):
        return -(-len(blocks) // size)
    if size != "submodule":
        return len(blocks)
    return sum(2 if all(attention_and_mlp(block)) else 1 for block in blocks.values())


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
    halves = halves_of(name, block, first, attention, mlp, returned)
    for half in halves:
        others = {id(parameter) for module in half.silenced for parameter in module.parameters()}
        half.parameters = {key: value for key, value in whole.parameters.items() if id(value) not in others}
    return halves


def halves_of(
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


def _parameters(name: str, block: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that can be trained with it, by their names in the model.

    Embeddings inside a block are left out. In T5 they are the position bias. Its values have already been computed for
    the later blocks, which would not see a change. Quantised weights are left out, too.
    """
    handed_on = {id(p) for module in block.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return {
        f"{name}.{key}": value
        for key, value in block.named_parameters()
        if id(value) not in handed_on and not is_quantised(value)
    }


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
        inputs = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))
        if isinstance(module, PRUNABLE_LAYERS):
            return inputs.new_zeros(*inputs.shape[:-1], _outputs(module))
        zeros = torch.zeros_like(inputs)
        return (zeros, *[None] * (values - 1)) if values else zeros

    return forward


def _outputs(module: Any) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.nf)
