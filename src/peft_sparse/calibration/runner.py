"""Runs a stack of blocks block by block on calibration batches.

Decides nothing and changes no weight. Memory: one hidden state per batch, kept on the device, in CPU memory or on
disk; the arguments the model passes its blocks, once where batches share them; and whatever one block needs.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache

from ..model.blocks import base_model, find_stacks
from ..model.processes import place, share_of
from .activations import Activations, ActivationStore
from .inputs import _is_encoder_decoder


Residence = Callable[[str, nn.Module], AbstractContextManager[Any]]


@dataclass
class Call:
    """How the model calls one block on one batch, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Batch:
    """One calibration batch on its way through a stack.

    Args:
        hidden: the hidden states (sequences, tokens, features) the next block takes; on disk, the file they are in.
        keep: False at padding, (sequences, tokens); None without padding.
        keep_context: the same for the encoder's states that a decoder's blocks are handed.
        calls: one per block.
    """

    hidden: Tensor | Path
    keep: Tensor | None
    keep_context: Tensor | None
    calls: list[Call] = field(default_factory=list)


class _CaptureComplete(Exception):
    """Raised by the last block's stand-in: nothing after it is needed. Private, so that no model error is caught."""


class EnoughSeen(Exception):
    """Raised by what runs within a block when nothing that follows is needed: the run of this batch ends there."""


class BlockRunner:
    """The blocks of one stack, and the calibration batches on their way through them.

    Take the blocks in order, each within `resident(i)`: `run(i)` as often as needed, then `advance(i)` once.

    Args:
        model: the model, which is run up to the last block of the stack.
        blocks: the stack, an entry of `find_stacks(model)`.
        inputs: model inputs, as from `as_inputs`.
        activations: where hidden states wait between blocks: "device" leaves them where the model computes them.
        residence: (name, block) -> a context within which the block's weights are where they can be computed with.
        batches_in_all: how many batches all processes have, if `inputs` are this one's share of them.

    Raises:
        ValueError: none of `inputs` comes to the stack, or the model does something to it between two blocks.
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
        self.batches = self._capture(model, inputs)

    def resident(self, index: int) -> AbstractContextManager[Any]:
        """Return a context within which block `index` can be run."""
        return self.residence(self.names[index], self.blocks[index])

    @torch.no_grad()
    def run(self, index: int, before_batch: Callable[[Batch, Call], None]) -> None:
        """Run block `index` on every batch for its hooks' sake, which may raise `EnoughSeen`; the batches stay."""
        for batch in self.batches:
            with contextlib.suppress(EnoughSeen):
                self._run(index, batch, before_batch)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the hidden states of every batch by what block `index` makes of them."""
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

    @torch.no_grad()
    def _capture(self, model: nn.Module, inputs: list[dict[str, Any]]) -> list[Batch]:
        """Run everything before and between the blocks; return what the first is fed, and how each one is called.

        One block of each class runs for real, which shows what it returns; from then on identities stand in wherever
        only hidden states come out. Blocks that hand on more (T5's hand on their position bias) always run.
        """
        device = next(p.device for p in model.parameters() if not p.is_meta)
        accepts = inspect.signature(base_model(model).forward).parameters
        extra = {"use_cache": False} if "use_cache" in accepts else {}
        identities: dict[type, bool] = {}
        captured: list[Batch] = []
        handed_on: tuple[Tensor, int] | None = None

        def stand_in(index: int, block: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal handed_on
                hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                if index == 0:
                    keep, keep_context = masks
                    captured.append(Batch(self.store.put(str(len(captured)), hidden), keep, keep_context))
                elif handed_on is not None and _is_changed(hidden, *handed_on):
                    raise ValueError(
                        f"Between {self.names[index - 1]!r} and {self.names[index]!r} the model changes the hidden "
                        "states, which running block by block leaves out. Prune by a criterion that needs no "
                        "calibration, or give batches without what is added there."
                    )
                args, kwargs = tuple(map(_no_cache, args)), {name: _no_cache(value) for name, value in kwargs.items()}
                captured[-1].calls.append(Call(args, kwargs))
                if index == len(self.blocks) - 1:
                    raise _CaptureComplete
                handed_on = hidden, _version(hidden)
                if identities.get(type(block)):
                    return hidden
                with self.resident(index):
                    output = run(hidden, *args, **kwargs)
                identities[type(block)] = isinstance(output, Tensor)
                handed_on = (first := output if isinstance(output, Tensor) else output[0]), _version(first)
                return output

            return forward

        with contextlib.ExitStack() as replaced:
            for index, block in enumerate(self.blocks):
                run = block.forward
                replaced.callback(restore_forward, block, block.__dict__.get("forward"))
                block.forward = stand_in(index, block, run)
            for batch in inputs:
                masks = _masks(model, self.names[0], batch)
                with contextlib.suppress(_CaptureComplete):
                    model(**send_to_device(dict(batch), device), **extra)
                if captured:
                    self._share_arguments(captured[0], captured[-1])
        # Of a share, other processes may have what reaches these blocks.
        if not captured and not self.shared:
            raise ValueError(
                f"No calibration batch runs the blocks of {self.names[0].rpartition('.')[0]!r}. Give batches that do, "
                "such as some with images, or leave these layers out: by `target_modules` or `exclude_modules`, or by "
                "giving the language model alone."
            )
        return captured

    def _share_arguments(self, first: Batch, batch: Batch) -> None:
        """Keep one copy of the tensors that batches have in common, such as rotary embeddings; offload the others."""
        memo: dict[int, Tensor] = {}
        for call, first_call in zip(batch.calls, first.calls, strict=True):
            known = tree_leaves((first_call.args, first_call.kwargs)) if batch is not first else []
            leaves = iter(known)

            def keep(value: Any, leaves: Iterator[Any] = leaves) -> Any:
                old = next(leaves, None)
                if not isinstance(value, Tensor):
                    return value
                if id(value) not in memo:
                    placed = value.cpu() if self.store.offload else value
                    memo[id(value)] = old if isinstance(old, Tensor) and _same(old, placed) else placed
                return memo[id(value)]

            call.args, call.kwargs = tree_map(keep, (call.args, call.kwargs))


def stack_runners(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    wanted: Callable[[str], Any] = bool,
    *,
    activations: Activations = "device",
    residence: Residence | None = None,
) -> Iterator[BlockRunner]:
    """Yield a runner for each stack of `model` in turn; each is captured when the one before was worked through.

    Several processes, which are given the same `inputs`, share them out.

    Args:
        wanted: block -> whether there is anything to measure in it; stacks without such a block are left out. By
            default there is.
    """
    in_all = len(inputs) if place()[1] > 1 else None
    for stack in find_stacks(model):
        if not any(map(wanted, stack)):
            continue
        yield BlockRunner(
            model, stack, share_of(inputs), activations=activations, residence=residence, batches_in_all=in_all
        )


def on_device(device: torch.device | str | None) -> Residence:
    """Return the residence that moves a block to `device` for its turn and back after; None leaves it where it is."""

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


def _masks(model: nn.Module, first_block: str, batch: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return which tokens of the stack, and which of the encoder before it, are not padding."""
    own = _kept(batch.get("attention_mask"))
    if not _is_encoder_decoder(model) or first_block in find_stacks(model)[0]:
        return own, None
    return _kept(batch.get("decoder_attention_mask")), own


def _kept(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _no_cache(argument: Any) -> Any:
    # It would remember every run of a block, and the next would attend to what it left.
    return None if isinstance(argument, Cache) else argument


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_changed(tensor: Tensor, before: Tensor, version: int) -> bool:
    """Tell whether `tensor` is another than `before`, or the same and written to since it had `version`."""
    return _version(tensor) != version if tensor is before else not _same(before, tensor)


def _same(old: Tensor, new: Tensor) -> bool:
    alike = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return alike and torch.equal(old, new)


def restore_forward(block: nn.Module, own: Any) -> None:
    """Give `block` its forward back: `own` if it had one beside that of its class, else None."""
    if own is None:
        del block.forward
    else:
        block.forward = own
