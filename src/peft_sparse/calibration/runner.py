"""Runs a stack of blocks on calibration data, one block after the other.

A runner selects nothing and changes no weight. It holds the hidden states of each batch (on the device, in CPU memory
or on disk) and the other arguments that the model passes to its blocks. Arguments that are equal in several batches
are held once.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache

from ..model.blocks import find_stacks, is_encoder_decoder
from ..model.processes import place, share_of
from .activations import Activations, ActivationStore
from .inputs import without_cache


Residence = Callable[[str, nn.Module], AbstractContextManager[Any]]


@dataclass
class Call:
    """The arguments with which the model calls one block on one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Batch:
    """One calibration batch on its way through a stack.

    Args:
        hidden: hidden states (sequences, tokens, features) that the next block takes. With activations on disk, the
            path of their file.
        keep: which tokens are not padding, (sequences, tokens), True = kept. None if there is no padding.
        keep_context: the same for the encoder's states that the blocks of a decoder get.
        calls: the arguments of each block, in the order of the blocks.
    """

    hidden: Tensor | Path
    keep: Tensor | None
    keep_context: Tensor | None
    calls: list[Call] = field(default_factory=list)


class _CaptureComplete(Exception):
    """Ends the run of a model at the last block, whose output is not needed. No model raises this private class."""


class EnoughSeen(Exception):
    """Raised within a block to end the run of this batch, because nothing that follows is needed."""


class BlockRunner:
    """The blocks of one stack, and the calibration batches on their way through them.

    Take the blocks in order. Within `resident(i)`, call `run(i)` as often as needed, then `advance(i)` once.

    Args:
        model: the model. It is run up to the last block of the stack.
        blocks: the stack, an entry of `find_stacks(model)`.
        inputs: model inputs, as `as_inputs` returns them.
        activations: where hidden states wait between blocks: "device" (the device that computes them), "cpu" or
            "disk".
        residence: (name, block) -> a context within which the block's weights are on the device that computes.
        batches_in_all: the number of batches of all processes, if `inputs` is the share of this process.

    Raises:
        ValueError: no batch runs the blocks (not checked if processes share the batches), or the model changes the
            hidden states between two blocks.
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
    ) -> None:
        self.shared = batches_in_all is not None
        self.batches_in_all = len(inputs) if batches_in_all is None else batches_in_all
        self.names = list(blocks)
        self.blocks = list(blocks.values())
        self.residence = residence or (lambda name, block: contextlib.nullcontext())
        self.store = ActivationStore(activations)
        self.batches = _Capture(self, model).run(inputs)

    def resident(self, index: int) -> AbstractContextManager[Any]:
        """Return a context within which block `index` can be run."""
        return self.residence(self.names[index], self.blocks[index])

    @torch.no_grad()
    def run(self, index: int, before_batch: Callable[[Batch, Call], None]) -> None:
        """Run block `index` on every batch so that its hooks are called. The hidden states of the batches stay.

        Args:
            index: number of the block in the stack.
            before_batch: called before each batch with the arguments that the block is about to get.
        """
        for batch in self.batches:
            with contextlib.suppress(EnoughSeen):
                self._run(index, batch, before_batch)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the hidden states of every batch by the output of block `index`."""
        for number, batch in enumerate(self.batches):
            batch.hidden = self.store.put(str(number), self._run(index, batch))

    def _run(self, index: int, batch: Batch, before_batch: Callable[[Batch, Call], None] | None = None) -> Tensor:
        block = self.blocks[index]
        device = next(block.parameters()).device
        call = batch.calls[index]
        call = Call(send_to_device(call.args, device), send_to_device(call.kwargs, device))
        if before_batch is not None:
            before_batch(batch, call)
        output = block(self.store.get(batch.hidden).to(device), *call.args, **call.kwargs)
        return output if isinstance(output, Tensor) else output[0]


class _Capture:
    """Runs the model up to the last block of a stack. Notes the input of the first block and the arguments of all.

    The first block of each class runs, to find out what the class returns. If that is the hidden states alone, the
    other blocks of the class return their input and do not run. Blocks that return more always run. Those of T5, for
    example, return a position bias too.
    """

    def __init__(self, runner: BlockRunner, model: nn.Module) -> None:
        self.runner = runner
        self.model = model
        self.is_decoder = is_encoder_decoder(model) and runner.names[0] not in find_stacks(model)[0]
        self.batches: list[Batch] = []
        # `keep` and `keep_context` of the batch that runs.
        self.masks: tuple[Tensor | None, Tensor | None] = (None, None)
        # The hidden states that the previous block returned, and their version at that time.
        self.returned: tuple[Tensor, int] | None = None
        self.returns_tensor: dict[type, bool] = {}

    @torch.no_grad()
    def run(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        device = next(p.device for p in self.model.parameters() if not p.is_meta)
        options = without_cache(self.model)
        with contextlib.ExitStack() as replaced:
            for index, block in enumerate(self.runner.blocks):
                stand_in = partial(self._stand_in, index, block, block.forward)
                replaced.callback(restore_forward, block, block.__dict__.get("forward"))
                block.forward = stand_in
            for batch in inputs:
                self.masks = self._masks(batch)
                with contextlib.suppress(_CaptureComplete):
                    self.model(**send_to_device(dict(batch), device), **options)
                if self.batches:
                    self._share_arguments(self.batches[-1])
        # Where processes share the batches, those of another process may run these blocks.
        if not self.batches and not self.runner.shared:
            stack = self.runner.names[0].rpartition(".")[0]
            raise ValueError(
                f"No calibration batch runs the blocks of {stack!r}. Give batches that do, such as some with images, "
                "or leave these layers out: use `target_modules` or `exclude_modules`, or give the language model "
                "alone."
            )
        return self.batches

    def _stand_in(
        self, index: int, block: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the place of `block.forward`."""
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if index == 0:
            key = str(len(self.batches))
            self.batches.append(Batch(self.runner.store.put(key, hidden), *self.masks))
        else:
            self._check_unchanged(index, hidden)
        args, kwargs = tuple(map(_no_cache, args)), {name: _no_cache(value) for name, value in kwargs.items()}
        self.batches[-1].calls.append(Call(args, kwargs))
        if index == len(self.runner.blocks) - 1:
            raise _CaptureComplete
        self.returned = hidden, _version(hidden)
        if self.returns_tensor.get(type(block)):
            return hidden
        with self.runner.resident(index):
            # Within this context the block may be on another device than the model that calls it.
            device = next(block.parameters()).device
            output = forward(*send_to_device((hidden, *args), device), **send_to_device(kwargs, device))
        output = send_to_device(output, hidden.device)
        self.returns_tensor[type(block)] = isinstance(output, Tensor)
        first = output if isinstance(output, Tensor) else output[0]
        self.returned = first, _version(first)
        return output

    def _check_unchanged(self, index: int, hidden: Tensor) -> None:
        if self.returned is not None and _is_changed(hidden, *self.returned):
            raise ValueError(
                f"Between {self.runner.names[index - 1]!r} and {self.runner.names[index]!r} the model changes the "
                "hidden states, and blocks that run one by one would miss that. Prune by a criterion that needs no "
                "calibration, or give batches for which the model changes nothing there."
            )

    def _masks(self, batch: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Return which tokens of the stack are not padding, and which of the encoder that a decoder attends to."""
        own = _as_mask(batch.get("attention_mask"))
        return (_as_mask(batch.get("decoder_attention_mask")), own) if self.is_decoder else (own, None)

    def _share_arguments(self, batch: Batch) -> None:
        """Replace tensors by equal ones of the first batch, such as rotary embeddings. Offload the others."""
        first = self.batches[0]
        placed: dict[int, Tensor] = {}
        for call, first_call in zip(batch.calls, first.calls, strict=True):
            leaves = [] if batch is first else tree_leaves((first_call.args, first_call.kwargs))
            place_next = partial(self._place, iter(leaves), placed)
            call.args, call.kwargs = tree_map(place_next, (call.args, call.kwargs))

    def _place(self, leaves_of_first: Iterator[Any], placed: dict[int, Tensor], value: Any) -> Any:
        old = next(leaves_of_first, None)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in placed:
            new = value.cpu() if self.runner.store.offload else value
            placed[id(value)] = old if isinstance(old, Tensor) and _same(old, new) else new
        return placed[id(value)]


def stack_runners(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    wanted: Callable[[str], Any] = bool,
    *,
    activations: Activations = "device",
    residence: Residence | None = None,
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

    Raises:
        ValueError: no batch runs the blocks of a stack, or the model changes the hidden states between two blocks.
    """
    in_all = len(inputs) if place()[1] > 1 else None
    for stack in find_stacks(model):
        if not any(map(wanted, stack)):
            continue
        yield BlockRunner(
            model, stack, share_of(inputs), activations=activations, residence=residence, batches_in_all=in_all
        )


def on_device(device: torch.device | str | None) -> Residence:
    """Return a residence that moves a block to `device` and back. With None, the block stays where it is."""

    # Not accelerate's `align_module_device`: it moves the parameters of one module, but no children and no buffers.
    @contextlib.contextmanager
    def resident(name: str, block: nn.Module) -> Iterator[None]:
        home = next(block.parameters()).device
        if device is None or torch.device(device) == home:
            yield
            return
        block.to(device)
        try:
            yield
        finally:
            block.to(home)

    return resident


def restore_forward(block: nn.Module, own: Any) -> None:
    """Undo a replacement of `block.forward`: `own` is the attribute that the block had, None if it had none."""
    if own is None:
        del block.forward
    else:
        block.forward = own


def _as_mask(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _no_cache(argument: Any) -> Any:
    # A cache would keep the states of every run of a block, and the next run would attend to them.
    return None if isinstance(argument, Cache) else argument


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_changed(tensor: Tensor, before: Tensor, version: int) -> bool:
    """Tell whether `tensor` differs from `before`; if both are one tensor, whether it was written to since."""
    return _version(tensor) != version if tensor is before else not _same(before, tensor)


def _same(old: Tensor, new: Tensor) -> bool:
    alike = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return alike and torch.equal(old, new)
