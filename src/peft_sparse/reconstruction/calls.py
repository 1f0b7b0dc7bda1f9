"""Calls of blocks that take one hidden state and return the next, as reconstruction needs them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batch import Batch, Order
from ..calibration.findings import Proof
from ..calibration.inputs import copied
from ..calibration.recording import Link, is_cache, map_leaves, returned_by
from ..calibration.residence import Residence
from ..calibration.runner import BlockRunner


STATE = Link(-2, 0)


@dataclass(frozen=True)
class StateCall:
    """A call of a block that takes one hidden state and returns the next.

    Args:
        args, kwargs: the arguments, with `STATE` in the place of the hidden state.
        leaf: number of the next hidden state among the tensors that the block returns.
        writes: whether the block writes into its arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaf: int = 0
    writes: bool = False

    def made(self, block: nn.Module, state: Tensor) -> Tensor:
        """Call `block` with a hidden state, and return the next."""
        given = state.clone() if self.writes else state

        def filled(leaf: Any) -> Any:
            # A block appends to a cache, and a call is made again and again.
            return given if leaf is STATE else copied(leaf) if is_cache(leaf) else leaf

        args, kwargs = map_leaves(filled, (self.args, self.kwargs))
        return returned_by(block, args, kwargs).tensors[self.leaf]

    def ready(self, device: torch.device, get: Callable[[Tensor, torch.device], Tensor] = Tensor.to) -> "StateCall":
        """Return the call with its tensors on `device`, and in float32 if they are in half precision.

        Args:
            device: the device.
            get: (tensor, device) -> the tensor on that device.
        """
        args, kwargs = map_leaves(partial(_in_float32, device, get), (self.args, self.kwargs))
        return StateCall(args, kwargs, self.leaf, self.writes)


def check_chains(proof: Proof) -> None:
    """Check that each block runs at most once, in one order, and hands one hidden state on to the next.

    Raises:
        ValueError: blocks of a stack do something else, so that they cannot be fitted one after the other.
    """
    for orders in proof.orders.values():
        first = [name for name, _ in orders[0]]
        for order in orders:
            names = [name for name, _ in order]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(
                    f"{twice!r} runs {names.count(twice)} times in one pass of the model, and a block that is used in "
                    "several places cannot be fitted to the outputs of one. Use `prune`, which measures all its "
                    "inputs, and retrain the model with `SparseTrainer`."
                )
            if names != first:
                raise ValueError(
                    f"Expected the same blocks to run on every batch, got {', '.join(first)} and {', '.join(names)}. "
                    "Give batches of one kind."
                )
            for number, (name, links) in enumerate(order):
                _check_states(proof, order, number, name, links)


def _check_states(proof: Proof, order: Order, number: int, name: str, links: list[Link]) -> None:
    states = {link for link in links if link.call >= 0 and link.leaf in proof.traits[order[link.call][0]].states}
    if number and (len(states) != 1 or next(iter(states)).call != number - 1):
        earlier = ", ".join(sorted({order[link.call][0] for link in states})) or "no block"
        raise ValueError(
            f"Expected {name!r} to take one hidden state, that of {order[number - 1][0]!r}, but it takes "
            f"{len(states)} that depend on {earlier}, so blocks cannot be fitted one after the other. Use `prune`, "
            "and retrain the model with `SparseTrainer`."
        )


@torch.no_grad()
def chain_of(
    runner: BlockRunner,
    batch: Batch,
    kept: Callable[[Link, Tensor], Tensor] = lambda link, tensor: tensor,
    residence: Residence | None = None,
) -> tuple[Tensor, list[StateCall]]:
    """Return the first hidden state of a batch, and the calls of the blocks in their order.

    What blocks take from earlier blocks beside the hidden state is computed by these blocks as they are now. It does
    not depend on the hidden states, as `check_chains` knows.

    Args:
        runner: the stack. None of its blocks has been advanced.
        batch: one of its batches.
        kept: called with what an earlier block computed. Returns the tensor that is kept for it.
        residence: (name, block) -> a context within which a block can run. By default that of the runner.
    """
    residence = residence or runner.stack.residence
    computed: dict[int, list[Tensor]] = {}

    def value(link: Link) -> Tensor:
        if link.call < 0:
            return runner.store.get(batch.values[link])
        if link.call not in computed:
            passing = {own: value(own) for own in batch.calls[link.call].links}
            block = batch.calls[link.call].block
            with residence(runner.names[block], runner.blocks[block]):
                computed[link.call] = runner.call(batch, link.call, passing).tensors
        return computed[link.call][link.leaf]

    constants: dict[Link, Tensor] = {}

    def placed(state: Any, leaf: Any) -> Any:
        if leaf is state or (isinstance(leaf, Link) and leaf == state):
            return STATE
        if not isinstance(leaf, Link):
            return leaf
        if leaf not in constants:
            constants[leaf] = kept(leaf, value(leaf))
        return constants[leaf]

    states = [_state_among(runner, batch, number) for number in range(len(batch.calls))]
    calls = []
    for number, call in enumerate(batch.calls):
        trait = runner.traits[call.block]
        args, kwargs = map_leaves(partial(placed, states[number]), (call.args, call.kwargs))
        leaf = states[number + 1].leaf if number + 1 < len(states) else trait.states[0]
        calls.append(StateCall(args, kwargs, leaf, trait.writes))
    first = states[0]
    return value(first) if isinstance(first, Link) else first, calls


def _state_among(runner: BlockRunner, batch: Batch, number: int) -> Any:
    """Return the leaf among the arguments of a call that is the hidden state: a link, or the first state itself."""
    call = batch.calls[number]
    if number:
        states = runner.traits[batch.calls[number - 1].block].states
        return next(link for link in call.links if link.call == number - 1 and link.leaf in states)
    # Of the tensors with which the chain begins, the hidden state has the shape of what the first block returns.
    mirrored = runner.traits[call.block].mirrored
    return call.links[0] if mirrored is None else call.leaves[mirrored]


def _in_float32(device: torch.device, get: Callable[[Tensor, torch.device], Tensor], leaf: Any) -> Any:
    there = get(leaf, device) if isinstance(leaf, Tensor) else leaf
    return there.float() if isinstance(there, Tensor) and there.dtype in (torch.float16, torch.bfloat16) else there
