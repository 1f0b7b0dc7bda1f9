"""Runs a stack of blocks on calibration data, one block after the other.

A runner selects nothing and changes no weight. It holds, for each batch, the calls that the model makes of the blocks,
and the tensors that wait between them (on the device, in CPU memory or on disk). Blocks may run several times, in any
order, or never. Arguments that are equal in several batches are held once.
"""

import contextlib
import copy
import heapq
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import find_blocks, find_stacks
from ..model.offload import execution_device, has_hooks, resident_through_hooks
from ..model.processes import place, share_of
from .activations import Activations, ActivationStore
from .inputs import copied, model_arguments
from .padding import Padding, TokenMasks
from .recording import (
    Call,
    Link,
    Links,
    Returned,
    give_back,
    is_cache,
    leaves_of,
    map_leaves,
    needed_for,
    returned_by,
    same_values,
    tensors_of,
    version_of,
)


Residence = Callable[[str, nn.Module], AbstractContextManager[Any]]


@dataclass
class Batch:
    """One calibration batch on its way through a stack.

    Args:
        number: number of the batch.
        padding: which tokens count.
        calls: the calls of the blocks, in the order in which the model makes them.
        values: the tensors that unfinished calls take, by link. With activations on disk, the paths of their files.
        finished: numbers of the calls that have been made for good.
    """

    number: int
    padding: Padding = field(default_factory=Padding)
    calls: list[Call] = field(default_factory=list)
    values: dict[Link, Tensor | Path] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    # Link -> the calls that take it; number of a call -> the calls that take what it returns; block -> its calls.
    _takers: dict[Link, set[int]] = field(default_factory=dict)
    _followers: dict[int, set[int]] = field(default_factory=dict)
    _of_block: dict[int, list[int]] = field(default_factory=dict)

    def complete(self) -> None:
        """Note which call takes what. Call it once, when all calls are known."""
        for number, call in enumerate(self.calls):
            self._of_block.setdefault(call.block, []).append(number)
            for link in call.links:
                self._takers.setdefault(link, set()).add(number)
                self._followers.setdefault(link.call, set()).add(number)

    def calls_of(self, block: int) -> list[int]:
        """Return the numbers of the calls of a block."""
        return self._of_block.get(block, [])

    def taken(self, call: int, tensors: list[Tensor]) -> dict[Link, Tensor]:
        """Return those of the tensors that call number `call` returned which later calls take."""
        links = {Link(call, leaf): tensor for leaf, tensor in enumerate(tensors)}
        return {link: tensor for link, tensor in links.items() if link in self._takers}

    def is_taken(self, call: int) -> bool:
        """Return whether a later call takes anything that call number `call` returns."""
        return call in self._followers

    def finish(self, call: int) -> list[int]:
        """Note that a call was made for good. Return the calls that may be ready now."""
        self.finished.add(call)
        for link in self.calls[call].links:
            self._takers[link].discard(call)
            if not self._takers[link]:
                self._drop(link)
        # The constants of this call are not needed any more.
        self.calls[call].args, self.calls[call].kwargs = (), {}
        return sorted(self._followers.get(call, ()))

    def _drop(self, link: Link) -> None:
        waiting = self.values.pop(link, None)
        if isinstance(waiting, Path):
            waiting.unlink()

    def is_ready(self, call: int) -> bool:
        """Return whether a call is unfinished, and all that it takes comes from finished calls."""
        unfinished = call not in self.finished
        return unfinished and all(link.call < 0 or link.call in self.finished for link in self.calls[call].links)


@dataclass(frozen=True)
class Trait:
    """How a block behaves when it is called.

    Args:
        tree: what it returned, without values of tensors.
        mirrored: number of the leaf among its arguments that has the shape and dtype of the one tensor it returns.
            None if it returns several tensors, or one of another shape: then it cannot be stood in for.
        writes: whether it writes into tensors among its arguments.
        states: numbers of the returned tensors that depend on what earlier calls returned.
    """

    tree: Any
    mirrored: int | None
    writes: bool
    states: tuple[int, ...] = (0,)


class _CaptureComplete(Exception):
    """Ends the run of a model at the last block, whose output is not needed. No model raises this private class."""


class _RecordOverwritten(Exception):
    """A block wrote into what was recorded of its arguments. The batch must be recorded again."""


class EnoughSeen(Exception):
    """Raised within a block to end the run of this batch, because nothing that follows is needed."""


class BlockRunner:
    """The blocks of one stack, and the calibration batches on their way through them.

    Take the blocks in the order of `order`. Within `resident(i)`, call `run(i)` as often as needed, then `advance(i)`
    once.

    Args:
        model: the model. It is run up to the last block of the stack.
        blocks: the stack, an entry of `find_stacks(model)`.
        inputs: model inputs, as `as_inputs` returns them.
        activations: where hidden states wait between blocks: "device" (the device that computes them), "cpu" or
            "disk".
        residence: (name, block) -> a context within which the block's weights are on the device that computes.
        batches_in_all: the number of batches of all processes, if `inputs` is the share of this process.
        traits: how each block behaves, by index. Blocks whose trait is known need not run while calls are recorded.
            Blocks without an entry run, and their traits are added.
        perturb: let blocks that run return slightly other values than they compute.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[str, nn.Module],
        inputs: list[dict[str, Any]],
        *,
        activations: Activations = "device",
        residence: Residence | None = None,
        batches_in_all: int | None = None,
        traits: dict[int, Trait] | None = None,
        perturb: bool = False,
    ) -> None:
        self.shared = batches_in_all is not None
        self.batches_in_all = len(inputs) if batches_in_all is None else batches_in_all
        self.names = list(blocks)
        self.blocks = list(blocks.values())
        self.residence = residence or (lambda name, block: contextlib.nullcontext())
        self.store = ActivationStore(activations)
        self.traits = {} if traits is None else traits
        self._advanced: set[int] = set()
        self.batches = _Capture(self, model, perturb).run(inputs)

    @property
    def order(self) -> list[int]:
        """The indices of all blocks, in the order in which they first run. Blocks that never run come last."""
        ran = [call.block for batch in self.batches for call in batch.calls]
        return list(dict.fromkeys((*ran, *range(len(self.blocks)))))

    def runs(self, index: int) -> int:
        """Return how often block `index` runs on a batch at most."""
        return max((len(batch.calls_of(index)) for batch in self.batches), default=0)

    def resident(self, index: int) -> AbstractContextManager[Any]:
        """Return a context within which block `index` can be run."""
        return self.residence(self.names[index], self.blocks[index])

    @torch.no_grad()
    def run(self, index: int, before_call: Callable[[Batch, list[Tensor]], None]) -> None:
        """Make all calls of block `index` on every batch so that its hooks are called. What waits stays.

        If a call depends on a later block, or on an earlier call of this block, that runs too, as it is now.

        Args:
            index: number of the block in the stack.
            before_call: called before each call of the block with the batch, and with the tensors among the arguments
                that do not come from the stack.
        """
        for batch in self.batches:
            passing: dict[Link, Tensor] = {}
            for number in needed_for(batch.calls, batch.calls_of(index), batch.finished):
                own = batch.calls[number].block == index
                residence = contextlib.nullcontext() if own else self.resident(batch.calls[number].block)
                with residence, contextlib.suppress(EnoughSeen):
                    returned = self.call(batch, number, passing, before_call if own else None)
                    passing |= batch.taken(number, returned.tensors)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Make the calls of block `index` for good, and replace what waits for them by what they return.

        Calls of blocks that have been advanced earlier are made as soon as what they take is there.
        """
        self._advanced.add(index)
        for batch in self.batches:
            ready = [number for number in batch.calls_of(index) if batch.is_ready(number)]
            heapq.heapify(ready)
            while ready:
                number = heapq.heappop(ready)
                if batch.is_ready(number) and batch.calls[number].block in self._advanced:
                    self._make(batch, number, index)
                    for follower in batch.finish(number):
                        heapq.heappush(ready, follower)

    def _make(self, batch: Batch, number: int, resident: int) -> None:
        if not batch.is_taken(number):
            return
        block = batch.calls[number].block
        with contextlib.nullcontext() if block == resident else self.resident(block):
            returned = self.call(batch, number, {})
        for link, tensor in batch.taken(number, returned.tensors).items():
            if link.leaf in self.traits[block].states:
                batch.values[link] = self.store.put(f"{batch.number}-{link.call}-{link.leaf}", tensor)
            else:
                # What does not depend on hidden states is mostly equal in all batches, and is held once.
                known = iter([self.batches[0].values.get(link)])
                batch.values[link] = _placed(known, {}, self.store.offload, tensor)

    def call(
        self,
        batch: Batch,
        number: int,
        passing: dict[Link, Tensor],
        before_call: Callable[[Batch, list[Tensor]], None] | None = None,
    ) -> Returned:
        """Make a call of a block and return what it returned.

        Args:
            batch: the batch.
            number: number of the call.
            passing: values of links that are not among the batch's own.
            before_call: see `run`.
        """
        call, constants = self.filled(batch, number, passing)
        if before_call is not None:
            before_call(batch, constants)
        return returned_by(self.blocks[call.block], call.args, call.kwargs)

    def filled(self, batch: Batch, number: int, passing: dict[Link, Tensor]) -> tuple[Call, list[Tensor]]:
        """Return a call with all values, on the device of its block, and the tensors in it that are constants."""
        call = batch.calls[number]
        device = next(self.blocks[call.block].parameters()).device
        trait = self.traits.get(call.block)

        def value_of(link: Link) -> Tensor:
            value = passing[link] if link in passing else self.store.get(batch.values[link])
            there = value.to(device)
            # What waits must stay as it is, also if the block writes into it.
            return there.clone() if there is value and (trait is None or trait.writes) else there

        constants: list[Tensor] = []

        def placed(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                constants.append(leaf.to(device))
                return constants[-1]
            return copy.deepcopy(leaf) if is_cache(leaf) else leaf

        args, kwargs = map_leaves(placed, (call.args, call.kwargs))
        return Call(call.block, args, kwargs).filled(value_of), constants


class _Capture:
    """Runs the model up to the last block of a stack, and records the calls of its blocks.

    A block whose trait is known does not run: one of its arguments takes the place of what it returns. What blocks get
    beside the states that earlier blocks returned must not depend on these states, which `prove` checks.
    """

    def __init__(self, runner: BlockRunner, model: nn.Module, perturb: bool) -> None:
        self.runner = runner
        self.model = model
        # Changes what blocks return, so that arguments that depend on it change too.
        self.perturb = perturb
        self.masks = TokenMasks(model, runner.names)
        self.batch = Batch(0)
        self.links = Links()
        self.prefix: Any = None
        self.ends_early = False

    @torch.no_grad()
    def run(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        device = execution_device(self.model)
        batches: list[Batch] = []
        with contextlib.ExitStack() as replaced:
            self._replace_blocks(replaced)
            replaced.enter_context(self.masks.watching())
            for number, inputs_of_batch in enumerate(inputs):
                self._record(number, inputs_of_batch, device)
                if self.batch.calls:
                    self._end(batches[0] if batches else None)
                    batches.append(self.batch)
        return batches

    def _record(self, number: int, inputs: dict[str, Any], device: torch.device) -> None:
        """Run the model on one batch."""
        self.batch, self.links, self.prefix = Batch(number), Links(), None
        self.masks.start(inputs)
        try:
            self.model(**map_leaves(partial(to_device, device), model_arguments(self.model, inputs)))
        except _CaptureComplete:
            pass
        except _RecordOverwritten:
            self._record(number, inputs, device)

    def _replace_blocks(self, replaced: contextlib.ExitStack) -> None:
        own = {id(block): index for index, block in enumerate(self.runner.blocks)}
        for name, block in find_blocks(self.model).items():
            if id(block) in own:
                stand_in = partial(self._stand_in, own[id(block)], block.forward)
            else:
                stand_in = partial(self._elsewhere, name, block, block.forward)
            replaced.callback(restore_forward, block, block.__dict__.get("forward"))
            block.forward = stand_in

    def _elsewhere(
        self, name: str, block: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a block of another stack where its residence puts it."""
        with self.runner.residence(name, block):
            return run_there(block, forward, args, kwargs).tree

    def _stand_in(self, index: int, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Take the place of a block's `forward`: record the call, and return something of the right shape."""
        batch, number = self.batch, len(self.batch.calls)
        args, kwargs = map_leaves(self._without_cache, (args, kwargs), keep=True)
        trait = self.runner.traits.get(index)
        recorded = self.links.linked((args, kwargs))
        if trait is not None and trait.writes:
            # What is recorded must stay as it is.
            recorded = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, recorded)
        batch.calls.append(Call(index, *recorded))
        self.masks.at_call(self.runner.blocks[index], args, kwargs)
        if self.ends_early and index == len(self.runner.blocks) - 1:
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
        with self.runner.resident(index):
            returned = run_there(self.runner.blocks[index], forward, own_args, own_kwargs)
        if trait is None:
            written = versions != [version_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
            self.runner.traits[index] = _trait_of(returned, leaves, written)
            if written:
                raise _RecordOverwritten
        if self.perturb:
            returned = _perturbed(returned, {id(leaf) for leaf in leaves})
        return self._returned(number, returned).tree

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
        batch, store = self.batch, self.runner.store
        batch.padding = self.masks.padding()
        self._set_sources_apart()
        placed: dict[int, Tensor] = {}
        alike = first is not None and [call.block for call in first.calls] == [call.block for call in batch.calls]
        for number, call in enumerate(batch.calls):
            known = iter(first.calls[number].leaves if first is not None and alike else ())
            place_next = partial(_placed, known, placed, store.offload)
            call.args, call.kwargs = map_leaves(place_next, (call.args, call.kwargs))
        batch.complete()
        blocks = [call.block for call in batch.calls]
        # The rest of the model is not needed after the last block, if each block runs once.
        in_turn = len(set(blocks)) == len(blocks) and blocks[-1] == len(self.runner.blocks) - 1
        self.ends_early = in_turn and all(block in self.runner.traits for block in blocks[:-1])

    def _set_sources_apart(self) -> None:
        """Let the state with which a chain of calls begins wait as what calls return does, and not as a constant."""
        calls = self.batch.calls
        used: dict[int, int] = {}
        for call in calls:
            for leaf in {id(leaf) for leaf in call.leaves if isinstance(leaf, Tensor)}:
                used[leaf] = used.get(leaf, 0) + 1
        for call in calls:
            source = None if call.links else _source_of(call, self.runner.traits.get(call.block))
            if source is not None and used[id(source)] == 1:
                link = Link(-1, sum(known.call < 0 for known in self.batch.values))
                self.batch.values[link] = self.runner.store.put(f"{self.batch.number}-source-{link.leaf}", source)
                replaced = partial(_replaced, source, link)
                call.args, call.kwargs = map_leaves(replaced, (call.args, call.kwargs))


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
    if len(returned.tensors) == 1 and returned.tensors[0].is_floating_point():
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
    return _with_tensors(returned, changed)


def _with_tensors(returned: Returned, replaced: dict[int, Tensor]) -> Returned:
    """Return what a block returned, with other tensors by the ids of those they replace."""
    tree = map_leaves(lambda leaf: replaced.get(id(leaf), leaf), returned.tree)
    return Returned(tree, [replaced.get(id(tensor), tensor) for tensor in returned.tensors])


def run_there(
    block: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Returned:
    """Run `forward` of `block` on the device of its weights, and return what it returned.

    What it returns comes back to the device of the first tensor among the arguments.
    """
    home = next((leaf.device for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)), None)
    device = next((p.device for p in block.parameters()), home)
    if device is None or home is None or device == home:
        return returned_by(forward, args, kwargs)
    own = args, kwargs
    there = map_leaves(partial(to_device, device), own)
    returned = returned_by(forward, *there)
    moved = {id(tensor): tensor.to(home) for tensor in returned.tensors}
    give_back(there, own, lambda leaf: moved.get(id(leaf), leaf))
    return _with_tensors(returned, moved)


def stack_runners(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    wanted: Callable[[str], Any] = bool,
    *,
    activations: Activations = "device",
    residence: Residence | None = None,
    traits: dict[str, Trait] | None = None,
) -> Iterator[BlockRunner]:
    """Yield a runner for each stack of `model`, in the order in which the stacks run.

    The inputs of a stack are computed when its runner is asked for. If the caller has pruned the earlier stacks by
    then, the inputs come from pruned stacks. If there are several processes, each gets its share of `inputs`.

    Args:
        model: the model.
        inputs: model inputs, as `as_inputs` returns them, the same in all processes.
        wanted: name of a block -> whether there is something to measure in it. A stack without such a block is left
            out. By default every block is wanted.
        activations: where hidden states wait between blocks: "device", "cpu" or "disk".
        residence: (name, block) -> a context within which the block's weights are on the device that computes.
        traits: how blocks behave, by name. By default all blocks run while calls are recorded.
    """
    in_all = len(inputs) if place()[1] > 1 else None
    for stack in find_stacks(model):
        if not any(map(wanted, stack)):
            continue
        known = {index: traits[name] for index, name in enumerate(stack) if traits and name in traits}
        yield BlockRunner(
            model,
            stack,
            share_of(inputs),
            activations=activations,
            residence=residence,
            batches_in_all=in_all,
            traits=known,
        )


def on_device(device: torch.device | str | None) -> Residence:
    """Return a residence that moves a block to `device` and back. With None, the block stays where it is.

    Weights that accelerate has offloaded are loaded within it, and what was written into them is kept.
    """

    # Not accelerate's `align_module_device`: it moves the parameters of one module, but no children and no buffers.
    @contextlib.contextmanager
    def resident(name: str, block: nn.Module) -> Iterator[None]:
        if has_hooks(block):
            with resident_through_hooks(block, device):
                yield
            return
        homes = {tensor.device for tensor in (*block.parameters(), *block.buffers())}
        if device is None or homes <= {torch.device(device)}:
            yield
            return
        if len(homes) > 1:
            with resident_through_hooks(block, device):
                yield
            return
        block.to(device)
        try:
            yield
        finally:
            block.to(homes.pop())

    return resident


def restore_forward(block: nn.Module, own: Any) -> None:
    """Undo a replacement of `block.forward`: `own` is the attribute that the block had, None if it had none."""
    if own is None:
        del block.forward
    else:
        block.forward = own


def to_device(device: torch.device, leaf: Any) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _placed(known: Iterator[Any], placed: dict[int, Tensor], offload: bool, leaf: Any) -> Any:
    """Return a constant of a call: the equal one of the first batch, or the tensor itself, in CPU memory if wanted."""
    old = next(known, None)
    if not isinstance(leaf, Tensor):
        return leaf
    if id(leaf) not in placed:
        new = leaf.cpu() if offload else leaf
        placed[id(leaf)] = old if isinstance(old, Tensor) and same_values(old, new) else new
    return placed[id(leaf)]
