"""Records the calls that a model makes of the blocks of one stack."""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import find_blocks
from .activations import ActivationStore
from .batch import Batch, Order, Trait
from .inputs import copied
from .padding import TokenMasks
from .recording import (
    Call,
    Link,
    Links,
    Returned,
    is_cache,
    leaves_of,
    map_leaves,
    same_values,
    tensors_of,
    version_of,
)
from .residence import Residence, arguments_there, in_residence, restore_forward, run_there, staying, with_tensors


@dataclass
class Stack:
    """The blocks of one stack, and what is known of them.

    Args:
        names: their names.
        blocks: the blocks, in the same order.
        store: keeps the tensors that wait between them.
        residence: (name, block) -> a context within which the block's weights are on the device that computes.
        traits: how each block behaves, by index, as far as it is known.
        orders: the ways in which the stack may run. None given: each way is taken.
    """

    names: list[str]
    blocks: list[nn.Module]
    store: ActivationStore
    residence: Residence
    traits: dict[int, Trait]
    orders: Sequence[Order] = ()

    def resident(self, index: int) -> AbstractContextManager[Any]:
        """Return a context within which block `index` can be run."""
        return self.residence(self.names[index], self.blocks[index])


class _CaptureComplete(Exception):
    """Ends the run of a model at the last block, whose output is not needed. No model raises this private class."""


class _RecordOverwritten(Exception):
    """A block wrote into what was recorded of its arguments. The batch must be recorded again."""


class Capture:
    """Runs the model up to the last block of a stack, and records the calls of its blocks.

    A block whose trait is known does not run: one of its arguments takes the place of what it returns. What blocks get
    beside the states that earlier blocks returned must not depend on these states, which `prove` checks.
    """

    def __init__(self, model: nn.Module, stack: Stack, perturb: bool) -> None:
        self.stack = stack
        self.model = model
        # Changes what blocks return, so that arguments that depend on it change too.
        self.perturb = perturb
        self.staying = stack.residence
        self.masks = TokenMasks(model, stack.names)
        self.batch = Batch(0)
        self.links = Links()
        self.prefix: Any = None
        self.ends_early = bool(stack.orders) and all(map(self._ends_with_the_stack, self._proved_orders()))
        # How many batches of the shape of this one are left, this one included.
        self.alike = 1

    @torch.no_grad()
    def run(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        batches: list[Batch] = []
        with contextlib.ExitStack() as replaced:
            self.staying = replaced.enter_context(staying(self.stack.residence))
            self._replace_blocks(replaced)
            replaced.enter_context(self.masks.watching())
            left = Counter(map(_shape_of, inputs))
            for number, inputs_of_batch in enumerate(inputs):
                self.alike = left[_shape_of(inputs_of_batch)]
                left[_shape_of(inputs_of_batch)] -= 1
                self._record(number, inputs_of_batch)
                if self.batch.calls:
                    self._end(batches[0] if batches else None)
                    batches.append(self.batch)
        return batches

    def _record(self, number: int, inputs: dict[str, Any]) -> None:
        """Run the model on one batch, and record in `self.batch` the calls that it makes of the blocks of the stack.

        If only these calls are wanted, the run ends after that of the last block. If a block turns out to write into
        the tensors that it gets, the batch is recorded again, with copies of them.
        """
        self.batch, self.links, self.prefix = Batch(number), Links(), None
        self.masks.start(inputs)
        try:
            self.model(**arguments_there(self.model, inputs))
        except _CaptureComplete:
            pass
        except _RecordOverwritten:
            self._record(number, inputs)

    def _replace_blocks(self, replaced: contextlib.ExitStack) -> None:
        own = {id(block): index for index, block in enumerate(self.stack.blocks)}
        for name, block in find_blocks(self.model).items():
            if id(block) in own:
                stand_in = partial(self._stand_in, own[id(block)], block.forward)
            else:
                stand_in = partial(in_residence, self._resident, name, block, block.forward)
            replaced.callback(restore_forward, block, block.__dict__.get("forward"))
            block.forward = stand_in

    def _stand_in(self, index: int, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Take the place of a block's `forward`: record the call, and return something of the right shape."""
        batch, number = self.batch, len(self.batch.calls)
        args, kwargs = map_leaves(self._without_cache, (args, kwargs), keep=True)
        trait = self.stack.traits.get(index)
        # What stands for an output equals an input, so that values tell no copy. Only proved ones are looked for.
        proved = {link for order in self.stack.orders if number < len(order) for link in order[number][1]}
        recorded = self.links.linked((args, kwargs), proved if self.stack.orders else None)
        if trait is not None and trait.writes:
            # What is recorded must stay as it is.
            recorded = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, recorded)
        batch.calls.append(Call(index, *recorded))
        self.masks.at_call(self.stack.blocks[index], args, kwargs)
        if self.ends_early and index == len(self.stack.blocks) - 1:
            raise _CaptureComplete
        leaves = leaves_of((args, kwargs))
        if trait is not None and trait.mirrored is not None and not self.perturb:
            mirrored = leaves[trait.mirrored] if trait.mirrored < len(leaves) else None
            if isinstance(mirrored, Tensor):
                # A tensor of its own, by which later calls are recognised to take what this call returned.
                instead = mirrored.detach()
                tree = map_leaves(lambda leaf: instead if leaf is Tensor else leaf, trait.tree)
                return self._returned(number, Returned(tree, [instead])).tree
        versions = [version_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        # The block appends to a cache, and what is recorded must stay as it is.
        own_args, own_kwargs = map_leaves(
            lambda leaf: copied(leaf) if is_cache(leaf) else leaf, (args, kwargs), keep=True
        )
        block = self.stack.blocks[index]
        with self._resident(self.stack.names[index], block):
            returned = run_there(block, forward, own_args, own_kwargs)
        if trait is None:
            written = versions != [version_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
            self.stack.traits[index] = _trait_of(returned, leaves, written)
            if written:
                raise _RecordOverwritten
        if self.perturb:
            returned = _perturbed(returned, {id(leaf) for leaf in leaves})
        return self._returned(number, returned).tree

    def _resident(self, name: str, block: nn.Module) -> AbstractContextManager[Any]:
        # No block stays while the rest of the model runs after the blocks, which may need the memory.
        return (self.staying if self.ends_early else self.stack.residence)(name, block)

    def _returned(self, number: int, returned: Returned) -> Returned:
        self.links.add(number, returned.tensors)
        return returned

    def _without_cache(self, leaf: Any) -> Any:
        """Return what stands for a cache: nothing, or its tokens before this batch, if the batch gave some.

        A cache that the model makes would keep the states of every run of a block, and the next run would attend to
        them.
        """
        if not is_cache(leaf):
            return leaf
        if self.prefix is None and leaf.get_seq_length() and not self.batch.calls:
            self.prefix = copy.deepcopy(leaf)
        return copy.deepcopy(self.prefix)

    def _end(self, first: Batch | None) -> None:
        """Complete the batch: its padding, the tensors that wait, and constants that are those of the first batch."""
        batch, store = self.batch, self.stack.store
        batch.padding = self.masks.padding()
        self._set_sources_apart()
        placed: dict[int, Tensor] = {}
        alike = first is not None and [call.block for call in first.calls] == [call.block for call in batch.calls]
        for number, call in enumerate(batch.calls):
            known = iter(first.calls[number].leaves if first is not None and alike else ())
            place_next = partial(placed_once, known, placed, store.offload)
            call.args, call.kwargs = map_leaves(place_next, (call.args, call.kwargs))
        batch.complete()
        self.ends_early = self._ends_with_the_stack([call.block for call in batch.calls])

    def _proved_orders(self) -> list[list[int]]:
        places = {name: index for index, name in enumerate(self.stack.names)}
        return [[places[name] for name, _ in order] for order in self.stack.orders]

    def _ends_with_the_stack(self, blocks: list[int]) -> bool:
        """Return whether the rest of the model is not needed after the last block: if each block runs once.

        It must not run, either: it may take what modules in the blocks leave behind, such as the logits of routers,
        and blocks that are stood in for leave nothing.
        """
        in_turn = len(set(blocks)) == len(blocks) and bool(blocks) and blocks[-1] == len(self.stack.blocks) - 1
        return in_turn and all(block in self.stack.traits for block in blocks[:-1])

    def _set_sources_apart(self) -> None:
        """Let the state with which a chain of calls begins wait as what calls return does, and not as a constant."""
        calls = self.batch.calls
        used: dict[int, int] = {}
        for call in calls:
            for leaf in {id(leaf) for leaf in call.leaves if isinstance(leaf, Tensor)}:
                used[leaf] = used.get(leaf, 0) + 1
        for call in calls:
            source = None if call.links else _source_of(call, self.stack.traits.get(call.block))
            if source is not None and used[id(source)] == 1:
                link = Link(-1, sum(known.call < 0 for known in self.batch.values))
                key = f"{self.batch.number}-source-{link.leaf}"
                self.batch.values[link] = self.stack.store.copy(key, source, alike=self.alike)
                replaced = partial(_replaced, source, link)
                call.args, call.kwargs = map_leaves(replaced, (call.args, call.kwargs))


def _shape_of(inputs: dict[str, Any]) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, value.shape) for name, value in inputs.items() if isinstance(value, Tensor))


def _source_of(call: Call, trait: Trait | None) -> Tensor | None:
    """Return the state with which a chain of calls begins: what has the shape of what the block returns."""
    leaves = call.leaves
    if trait is not None and trait.mirrored is not None and trait.mirrored < len(leaves):
        leaves = [leaves[trait.mirrored]]
    states = (x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1)
    return next(states, None)


def _replaced(old: Any, new: Any, leaf: Any) -> Any:
    return new if leaf is old else leaf


def _trait_of(returned: Returned, leaves: list[Any], written: bool) -> Trait:
    mirrored = None
    passed_on = any(leaf is tensor for leaf in leaves for tensor in returned.tensors)
    if len(returned.tensors) == 1 and returned.tensors[0].is_floating_point() and (written or not passed_on):
        output = returned.tensors[0]
        like = [
            number
            for number, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and (leaf.shape, leaf.dtype) == (output.shape, output.dtype)
        ]
        mirrored = like[0] if like else None
    tree = map_leaves(lambda leaf: Tensor if isinstance(leaf, Tensor) else leaf, returned.tree)
    return Trait(tree, mirrored, written)


def _perturbed(returned: Returned, passed_on: set[int]) -> Returned:
    """Return what a block returned with every floating-point tensor changed a little, except those it passes on.

    Entries are changed by different shares, because a norm would undo one share for all.
    """
    changed = {
        id(tensor): tensor * (1 + torch.rand_like(tensor) / 16)
        for tensor in tensors_of(returned.tree)
        if tensor.is_floating_point() and id(tensor) not in passed_on
    }
    return with_tensors(returned, changed)


def placed_once(known: Iterator[Any], placed: dict[int, Tensor], offload: bool, leaf: Any) -> Any:
    """Return a constant of a call: the equal one of the first batch, or the tensor itself, in CPU memory if wanted."""
    old = next(known, None)
    if not isinstance(leaf, Tensor):
        return leaf
    if id(leaf) not in placed:
        new = leaf.cpu() if offload else leaf
        placed[id(leaf)] = old if isinstance(old, Tensor) and same_values(old, new) else new
    return placed[id(leaf)]
