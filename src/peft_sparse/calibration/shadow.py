"""Runs a model once as it is, and beside each call of a block the same call from its record."""

import contextlib
import contextvars
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .comparing import close, linked_leaves
from .findings import Findings
from .inputs import copied
from .padding import Padding, TokenMasks, align, marks_padding
from .products import ProductObserver
from .recording import (
    Call,
    Link,
    Returned,
    is_cache,
    last_uses,
    leaves_of,
    map_leaves,
    returned_by,
    tensors_of,
    tensors_out_of_sight,
)
from .residence import arguments_there, restore_forward, run_in_residence, run_there
from .row_search import RowSearch
from .runner import BlockRunner


_WITHOUT = "Prune by a criterion that needs no calibration, or give batches for which the model does not do this."


class Shadow:
    """Runs the model once as it is, and beside each call of a block the same call from its record."""

    def __init__(self, findings: Findings, batch: dict[str, Any], runners: dict[int, BlockRunner]) -> None:
        self.findings = findings
        self.model = findings.model
        self.batch = batch
        self.runners = runners
        self.masks = {n: TokenMasks(self.model, list(stack)) for n, stack in enumerate(findings.stacks)}
        # The states that calls from the record return, by stack.
        self.states: dict[int, dict[Link, Tensor]] = {number: {} for number in runners}
        self.made: dict[int, int] = dict.fromkeys(runners, 0)
        self.lasts = {number: last_uses(runner.batches[0].calls) for number, runner in runners.items()}
        self.phase = "model"
        # Number of the stack whose block is called.
        self.present = 0
        self.rows = RowSearch(findings, partial(self._make, phase="again"))
        self.counts: dict[str, dict[str, int]] = {"model": {}, "engine": {}}
        self.products: ProductObserver | None = None

    def run(self) -> None:
        model = self.model
        arguments = arguments_there(model, self.batch)
        with contextlib.ExitStack() as undo:
            self._replace_blocks(undo)
            for masks in self.masks.values():
                masks.start(self.batch)
                undo.enter_context(masks.watching())
            self._count_inputs(undo)
            torch.manual_seed(0)
            model(**arguments)
        for number, runner in self.runners.items():
            calls = len(runner.batches[0].calls)
            if self.made[number] != calls:
                raise ValueError(
                    f"The model calls the blocks of {runner.names[0].rpartition('.')[0]!r} {self.made[number]} times, "
                    f"and {calls} times if its blocks return slightly other values: which blocks run depends on the "
                    f"hidden states. {_WITHOUT}"
                )
        self._check_counts()
        self._check_masks()

    def _replace_blocks(self, undo: contextlib.ExitStack) -> None:
        for number, stack in enumerate(self.findings.stacks):
            for index, (name, block) in enumerate(stack.items()):
                undo.callback(restore_forward, block, block.__dict__.get("forward"))
                block.forward = partial(self._call, number, index, name, block, block.forward)

    def _count_inputs(self, undo: contextlib.ExitStack) -> None:
        findings = self.findings
        watched = {
            name: weight
            for name, weight in findings.all_weights.items()
            if weight.expert is not None or name in findings.sight.products
        }
        for name, layer in findings.layers():
            if name not in watched:
                hook = partial(self._on_layer, name)
                undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if watched:
            self.products = ProductObserver(watched, self._on_product)
            self.products.locate_all()
            undo.enter_context(self.products.watching())

    def _on_layer(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._count(name, tensors_of((args, kwargs))[0])

    def _on_product(self, name: str, layer: nn.Module, inputs: Tensor) -> None:
        self._count(name, inputs)

    def _count(self, name: str, inputs: Tensor) -> None:
        if self.phase in self.counts:
            counts = self.counts[self.phase]
            counts[name] = counts.get(name, 0) + inputs.numel()
        if self.phase == "engine" and inputs.numel():
            sizes = self.findings.sizes
            size = inputs.detach().float().abs().sum()
            sizes[name] = sizes[name] + size if name in sizes else size
        if self.phase != "model":
            self.rows.note(name, inputs)

    def _call(
        self,
        number: int,
        index: int,
        name: str,
        block: nn.Module,
        forward: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Take the place of a block's `forward`."""
        if self.phase != "model":
            return forward(*args, **kwargs)
        first = next(iter(self.findings.stacks[number]))
        if first not in self.findings.ran:
            self.findings.ran.append(first)
        self.masks[number].at_call(block, args, kwargs)
        with self.findings.residence(name, block):
            if self.products is not None:
                self.products.locate_all()
            if number not in self.runners:
                return run_there(block, forward, args, kwargs).tree
            runner, call = self.runners[number], self._next_call(number, index)
            self.present = number
            filled, constants = runner.filled(runner.batches[0], call, self.states[number])
            self._compare_arguments(runner, call, leaves_of((args, kwargs)), filled)
            generator = torch.get_rng_state()
            returned = run_there(block, forward, args, kwargs)
            after = torch.get_rng_state()
            torch.set_rng_state(generator)
            self.rows.start(runner.batches[0].padding.keep is not None)
            own = self._make(runner, filled, "engine")
            self._compare_returned(name, returned, own)
            self._find_states(runner, call, own)
            self.rows.find(runner, call, self.states[number], constants, own)
            self.states[number] |= runner.batches[0].taken(call, own.tensors)
            lasts = self.lasts[number]
            self.states[number] = {link: state for link, state in self.states[number].items() if lasts[link] > call}
            self.rows.start(False)
            torch.set_rng_state(after)
        return returned.tree

    def _make(self, runner: BlockRunner, call: Call, phase: str) -> Returned:
        """Make a call from a record."""
        self.phase = phase
        # A block appends to a cache, and the record is used again.
        args, kwargs = map_leaves(
            lambda leaf: copied(leaf) if is_cache(leaf) else leaf, (call.args, call.kwargs), keep=True
        )
        try:
            # The model may be collecting what its blocks return, and keeps the list of it in a context variable.
            return contextvars.Context().run(returned_by, runner.blocks[call.block], args, kwargs)
        finally:
            self.phase = "model"

    def _next_call(self, number: int, index: int) -> int:
        runner, call = self.runners[number], self.made[number]
        self.made[number] += 1
        calls = runner.batches[0].calls
        if call >= len(calls) or calls[call].block != index:
            raise ValueError(
                f"The model calls {runner.names[index]!r}, and another block or none in its place if its blocks "
                f"return slightly other values: which blocks run depends on the hidden states. {_WITHOUT}"
            )
        return call

    def _compare_arguments(self, runner: BlockRunner, number: int, given: list[Any], filled: Call) -> None:
        """Raise ValueError if a call from the record does not get what the model gives."""
        calls = runner.batches[0].calls
        recorded, own = calls[number].leaves, filled.leaves
        name = runner.names[calls[number].block]
        before = f"Between {runner.names[calls[number - 1].block]!r} and" if number else "Before"
        alike = len(given) == len(own) == len(recorded)
        for place, leaf, mine in zip(recorded, given, own, strict=False):
            if alike and isinstance(leaf, Tensor) != isinstance(mine, Tensor):
                alike = False
            if isinstance(leaf, (bool, int, float, str)) and leaf != mine:
                alike = False
            if alike and isinstance(leaf, Tensor) and not close(leaf, mine):
                if isinstance(place, Link) or place.is_floating_point():
                    raise ValueError(
                        f"{before} {name!r} the model changes the hidden states, or computes something "
                        f"from them that {name!r} receives, and blocks that run one by one would miss that. {_WITHOUT}"
                    )
                alike = False
        alike = alike and _all_close(tensors_out_of_sight(given), tensors_out_of_sight(own))
        if not alike:
            raise ValueError(
                f"What {name!r} receives beside the hidden states depends on what earlier blocks computed, and blocks "
                f"that run one by one would miss that. {_WITHOUT}"
            )

    def _compare_returned(self, name: str, returned: Returned, own: Returned) -> None:
        if tensors_out_of_sight(returned.tree):
            raise ValueError(
                f"{name!r} returns states within an object that is no tuple, list, dict or dataclass, so they cannot "
                "be handed on when blocks run one by one. Return one of these, or prune by a criterion that needs no "
                "calibration."
            )
        if not _all_close(returned.tensors, own.tensors):
            raise ValueError(
                f"Called alone, {name!r} returns something else than within the model: it depends on more than its "
                f"arguments and its weights. {_WITHOUT}"
            )

    def _check_counts(self) -> None:
        for name, count in self.counts["model"].items():
            seen = self.counts["engine"].get(name, 0)
            if seen != count:
                raise ValueError(
                    f"The model multiplies {name!r} with {count} entries of inputs, and calls of its block with "
                    f"{seen}: the model also uses this layer outside of its block. {_WITHOUT}"
                )

    def _check_masks(self) -> None:
        """Raise ValueError if padding is marked, and it is not known which states of some stack are padding."""
        marked = marks_padding(self.batch)
        paddings = {n: masks.padding() for n, masks in self.masks.items() if masks.shape is not None}
        if not marked or not paddings:
            return
        if not any(padding.found or padding.keep_context is not None for padding in paddings.values()):
            shapes = ", ".join(str(tuple(self.masks[number].shape or ())) for number in paddings)
            raise ValueError(
                f"{marked[0]!r} of shape {tuple(self.batch[marked[0]].shape)} marks padding, but fits the tokens of "
                f"no stack of blocks, whose hidden states have the shapes {shapes}. Give batches without padding, or "
                "say which tokens count with `token_mask` of shape (sequences, tokens)."
            )
        for number in self._changed_by_padding(marked, paddings):
            raise ValueError(
                f"{marked[0]!r} marks padding, which changes states of shape {tuple(self.masks[number].shape or ())} "
                f"that come to {self.runners[number].names[0]!r}, and it is not known which of them are padding. Give "
                "batches without padding, such as one sequence per batch, or leave these blocks out with "
                "`exclude_modules`."
            )

    def _changed_by_padding(self, marked: list[str], paddings: dict[int, Padding]) -> list[int]:
        """Return the stacks that get states without a known mask which change if padding does.

        These are the stack's own first states, or states beside them, such as those of another stack.
        """
        stacks = [n for n in self.runners if not paddings[n].found or paddings[n].keep_context is None]
        states: dict[int, list[Tensor]] = {number: [] for number in stacks}
        with contextlib.ExitStack() as hooks:
            for number in stacks:
                runner = self.runners[number]
                block = runner.blocks[runner.batches[0].calls[0].block]
                hook = partial(_note_states, states[number], paddings[number])
                hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for batch in (self.batch, _with_other_padding(self.batch, marked)):
                torch.manual_seed(0)
                run_in_residence(self.model, batch, self.findings.residence)
                if not any(states.values()):
                    # Masks of all states are known.
                    return []
        halves = {n: (noted[: len(noted) // 2], noted[len(noted) // 2 :]) for n, noted in states.items()}
        return [n for n, (one, other) in halves.items() if not all(map(torch.equal, one, other))]

    def _find_states(self, runner: BlockRunner, call: int, own: Returned) -> None:
        """Find out which of the tensors that a block returns depend on what earlier calls returned."""
        name = runner.names[runner.batches[0].calls[call].block]
        if len(own.tensors) > 1:
            filled, _ = runner.filled(runner.batches[0], call, self.states[self.present])
            linked = linked_leaves(runner, call, filled)

            def tracked(leaf: Any) -> Any:
                return leaf.detach().requires_grad_() if id(leaf) in linked and leaf.is_floating_point() else leaf

            with torch.enable_grad():
                # Blocks may write into what they get, which is refused for leaves of autograd.
                args, kwargs = map_leaves(
                    lambda leaf: tracked(leaf).clone() if id(leaf) in linked else leaf, (filled.args, filled.kwargs)
                )
                again = self._make(runner, Call(filled.block, args, kwargs), "again")
            states = tuple(number for number, tensor in enumerate(again.tensors) if tensor.requires_grad)
            self.findings.traits[name] = replace(self.findings.traits[name], states=states)


def _all_close(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(close, some, others))


def _note_states(noted: list[Tensor], padding: Padding, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Note the states (sequences, tokens, features) that a block gets and of which no mask is known."""
    own, *others = [x for x in tensors_of((args, kwargs)) if x.is_floating_point() and x.dim() > 1]
    if not padding.found:
        noted.append(own.clone())
    if padding.keep_context is None:
        keep = padding.keep if padding.context_is_own else None
        for other in others:
            if other.dim() == 3 and (keep is None or align(keep, other.shape[:-1]) is None):
                noted.append(other.clone())


def _with_other_padding(batch: dict[str, Any], marked: list[str]) -> dict[str, Any]:
    """Return a batch with other tokens where the masks in `marked` say that tokens do not count."""
    changed = dict(batch)
    for name_of_mask in marked:
        mask = batch[name_of_mask].bool()
        if mask.dim() != 2 or not mask.any():
            continue
        over = {
            name: value
            for name, value in batch.items()
            if isinstance(value, Tensor)
            and name not in marked
            and value.shape[:2] == mask.shape
            and name.startswith("decoder_") == name_of_mask.startswith("decoder_")
        }
        ids = {name: value for name, value in over.items() if not value.is_floating_point()}
        # Beside token ids, numbers of the same shape are something else, such as patches of an image.
        for name, value in (ids or over).items():
            where = mask.view(*mask.shape, *[1] * (value.dim() - 2))
            other = value + 1 if value.is_floating_point() else value[mask].flatten()[:1]
            changed[name] = torch.where(where, value, other)
    return changed
