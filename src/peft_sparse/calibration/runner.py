"""Runs a stack of blocks on calibration data, one block after the other.

A runner selects nothing and changes no weight. It holds, for each batch, the calls that the model makes of the blocks,
and the tensors that wait between them (on the device, in CPU memory or on disk). Blocks may run several times, in any
order, or never. Arguments that are equal in several batches are held once.
"""

import contextlib
import copy
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model.blocks import find_stacks, holders
from ..model.processes import place, share_of
from ..model.weights import WeightView
from .activations import Activations, ActivationStore
from .batch import Batch, EnoughSeen, Order, Trait
from .capture import Capture, Stack, placed_once
from .copies import ahead
from .memory import give_back_freed
from .recording import Call, Link, Returned, is_cache, map_leaves, needed_for, returned_by
from .residence import Residence, check_runs, staying


if TYPE_CHECKING:
    from .findings import Proof


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
        orders: the ways in which the stack may run. None given: each way is taken.
        perturb: let blocks that run return slightly other values than they compute.
        wanted: name of a block -> whether there is something to measure in it. By default every block is wanted.

    Raises:
        ValueError: the model does not run on a batch, or runs the stack in another way than `orders` say.
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
        orders: Sequence[Order] = (),
        wanted: Callable[[str], Any] = bool,
    ) -> None:
        self.shared = batches_in_all is not None
        self.batches_in_all = len(inputs) if batches_in_all is None else batches_in_all
        self.stack = Stack(
            names=list(blocks),
            blocks=list(blocks.values()),
            store=ActivationStore(activations),
            residence=residence or (lambda name, block: contextlib.nullcontext()),
            traits={} if traits is None else traits,
            orders=orders,
        )
        self.names, self.blocks = self.stack.names, self.stack.blocks
        self.wanted = wanted
        self.store, self.traits = self.stack.store, self.stack.traits
        self.resident = self.stack.resident
        self._advanced: set[int] = set()
        capture = Capture(model, self.stack, perturb)
        try:
            self.batches = capture.run(inputs)
        except Exception as error:
            check_runs(model, inputs, capture.batch.number, self.stack.residence, error)
            raise
        for batch in self.batches if orders else ():
            if self.order_of(batch) not in orders:
                raise ValueError(
                    f"Batch {batch.number} of the calibration data (of this process) runs the blocks of "
                    f"{self.names[0].rpartition('.')[0]!r} in another way than the batches that were compared with "
                    "the model: other blocks, or blocks that receive other things than the outputs of those before. "
                    "Give batches of one kind, for example all of one length."
                )

    def order_of(self, batch: Batch) -> Order:
        """Return the calls on a batch: (name of the block, links to what earlier calls returned)."""
        return [(self.names[call.block], call.links) for call in batch.calls]

    @cached_property
    def order(self) -> list[int]:
        """The indices of the blocks up to the last wanted one, in the order in which they first run.

        Blocks that never run come last.
        """
        ran = [call.block for batch in self.batches for call in batch.calls]
        order = list(dict.fromkeys((*ran, *range(len(self.blocks)))))
        while order and not self.wanted(self.names[order[-1]]):
            order.pop()
        return order

    def runs(self, index: int) -> int:
        """Return how often block `index` runs on a batch at most."""
        return max((len(batch.calls_of(index)) for batch in self.batches), default=0)

    def sharing(self, index: int, weights: Iterable[WeightView]) -> list[int]:
        """Return the indices of the other blocks that use some of the `weights` of block `index`."""
        names = {name for weight in weights for name in self._sharers.get(id(weight.layer), ())}
        return [other for other, name in enumerate(self.names) if name in names and other != index]

    @cached_property
    def _sharers(self) -> dict[int, set[str]]:
        """The names of the blocks that share a module or a parameter of it, by the module's id.

        The ids of parameters are not kept: blocks on disk get other ones whenever they are loaded.
        """
        held = holders(dict(zip(self.names, self.blocks, strict=True)))
        sharers: dict[int, set[str]] = {}
        for module in (module for block in self.blocks for module in block.modules()):
            names = {name for part in (module, *module.parameters(recurse=False)) for name in held[id(part)]}
            if len(names) > 1:
                sharers[id(module)] = names
        return sharers

    @torch.no_grad()
    def run(
        self, index: int, before_call: Callable[[Batch, list[Tensor]], None], *, sharing: Sequence[int] = ()
    ) -> None:
        """Make all calls of block `index` on every batch so that its hooks are called. What waits stays.

        If a call depends on a later block, or on an earlier call of this block, that runs too, as it is now.

        Args:
            index: number of the block in the stack.
            before_call: called before each call of the block with the batch, and with the tensors among the arguments
                that do not come from the stack.
            sharing: other blocks whose calls are made and announced likewise, as they use weights of this one.
        """
        give_back_freed()
        blocks = {index, *sharing}

        def needed(batch: Batch) -> Iterator[int]:
            wanted = [number for block in blocks for number in batch.calls_of(block)]
            return needed_for(batch.calls, wanted, batch.finished)

        with self.store.overlapping(), staying(self.stack.residence) as residence:
            for batch in ahead(self.batches, lambda batch: self._expect(batch, needed(batch))):
                passing: dict[Link, Tensor] = {}
                for number in needed(batch):
                    announce = before_call if batch.calls[number].block in blocks else None
                    with self._beside(index, batch.calls[number], residence), contextlib.suppress(EnoughSeen):
                        returned = self.call(batch, number, passing, announce)
                        passing |= batch.taken(number, returned.tensors)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Make the calls of block `index` for good, and replace what waits for them by what they return.

        Calls of blocks that have been advanced earlier are made as soon as what they take is there. What a call
        returns is written over what it alone has waited for, so that memory does not grow. Nobody waits for what the
        last block of the order returns, so its calls are not made.
        """
        if index == self.order[-1]:
            return
        self._advanced.add(index)
        give_back_freed()

        def ready_calls(batch: Batch) -> list[int]:
            return [number for number in batch.calls_of(index) if batch.is_ready(number)]

        def expect(batch: Batch) -> None:
            self._expect(batch, filter(batch.is_taken, ready_calls(batch)))

        with self.store.overlapping(), staying(self.stack.residence) as residence:
            for batch in ahead(self.batches, expect):
                ready = ready_calls(batch)
                heapq.heapify(ready)
                while ready:
                    number = heapq.heappop(ready)
                    if batch.is_ready(number) and batch.calls[number].block in self._advanced:
                        for follower in self._make(batch, number, index, residence):
                            heapq.heappush(ready, follower)

    def _beside(self, index: int, call: Call, residence: Residence) -> AbstractContextManager[Any]:
        """Return a context within which a call can be made while block `index` is resident."""
        own = call.block == index
        return contextlib.nullcontext() if own else residence(self.names[call.block], self.blocks[call.block])

    def _make(self, batch: Batch, number: int, index: int, residence: Residence) -> list[int]:
        """Make a call for good while block `index` is resident. Return the calls that may be ready now."""
        block = batch.calls[number].block
        taken: dict[Link, Tensor] = {}
        if batch.is_taken(number):
            with self._beside(index, batch.calls[number], residence):
                taken = batch.taken(number, self.call(batch, number, {}).tensors)
        waited = {link: batch.values.get(link) for link in batch.calls[number].links}
        followers = batch.finish(number)
        rooms = self._rooms({link: value for link, value in waited.items() if link not in batch.values}, batch, taken)
        for link, tensor in taken.items():
            if link.leaf in self.traits[block].states:
                key = f"{batch.number}-{link.call}-{link.leaf}"
                batch.values[link] = self.store.copy(key, tensor, rooms.pop() if rooms else None)
            else:
                # What does not depend on hidden states is mostly equal in all batches, and is held once.
                known = iter([self.batches[0].values.get(link)])
                batch.values[link] = placed_once(known, {}, self.store.offload, tensor)
        return followers

    def _rooms(
        self, dropped: dict[Link, Tensor | Path | None], batch: Batch, taken: dict[Link, Tensor]
    ) -> list[Tensor]:
        """Return those of the values that no call takes any more which are copies of this runner's own.

        A value in whose memory something lies that a call returned is left out.
        """
        in_use = {tensor.untyped_storage().data_ptr() for tensor in taken.values()}
        return [
            value
            for link, value in dropped.items()
            if isinstance(value, Tensor)
            and (link.call < 0 or link.leaf in self.traits[batch.calls[link.call].block].states)
            and value.untyped_storage().data_ptr() not in in_use
        ]

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
        device = self._device_of(call.block)
        trait = self.traits.get(call.block)

        def value_of(link: Link) -> Tensor:
            value = passing.get(link, batch.values.get(link))
            assert value is not None, "each link of a call is taken from what waits or from what passes"
            there = self.store.get(value, device)
            # What waits must stay as it is, also if the block writes into it.
            return there.clone() if there is value and (trait is None or trait.writes) else there

        constants: list[Tensor] = []

        def placed(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                constants.append(self.store.get(leaf, device))
                return constants[-1]
            return copy.deepcopy(leaf) if is_cache(leaf) else leaf

        args, kwargs = map_leaves(placed, (call.args, call.kwargs))
        return Call(call.block, args, kwargs).filled(value_of), constants

    def _expect(self, batch: Batch, numbers: Iterable[int]) -> None:
        """Begin to copy to the GPU what calls of a batch take, if it waits in CPU memory."""
        for number in numbers:
            device = self._device_of(batch.calls[number].block)
            for leaf in batch.calls[number].leaves:
                waiting = batch.values.get(leaf) if isinstance(leaf, Link) else leaf
                if isinstance(waiting, (Tensor, Path)):
                    self.store.expect(waiting, device)

    def _device_of(self, index: int) -> torch.device:
        # A block without parameters, such as a pooling between two others, runs where one of the others is.
        holders = (self.blocks[index], *self.blocks)
        return next(parameter.device for block in holders for parameter in block.parameters())


def in_order(stacks: list[dict[str, nn.Module]], order: Sequence[str]) -> list[dict[str, nn.Module]]:
    """Return `stacks` in the order of the names of their first blocks in `order`. Others come last."""
    places = {name: place for place, name in enumerate(order)}
    return sorted(stacks, key=lambda stack: places.get(next(iter(stack)), len(places)))


def stack_runners(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    wanted: Callable[[str], Any] = bool,
    *,
    activations: Activations = "device",
    residence: Residence | None = None,
    proof: "Proof | None" = None,
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
        proof: what `prove` found out about the model: how its blocks behave, the order of its stacks, and the ways in
            which each stack may run. By default all blocks run while calls are recorded, stacks run in the order in
            which they are registered, and each way is taken.

    Raises:
        ValueError: a batch runs a stack in another way than `proof` says.
    """
    in_all = len(inputs) if place()[1] > 1 else None
    traits, order, orders = ({}, (), {}) if proof is None else (proof.traits, proof.stacks, proof.orders)
    for stack in in_order(find_stacks(model), order):
        if not any(map(wanted, stack)):
            continue
        known = {index: traits[name] for index, name in enumerate(stack) if name in traits}
        yield BlockRunner(
            model,
            stack,
            share_of(inputs),
            activations=activations,
            residence=residence,
            batches_in_all=in_all,
            traits=known,
            orders=orders.get(next(iter(stack)), ()),
            wanted=wanted,
        )
