"""Finds which tokens of a stack count: padding does not, and `token_mask` says it outright.

A mask belongs to the stack whose tokens it describes. It is found by what reaches that stack: the arguments of the
blocks and of the modules around them, so that masks over samples or pixels have gone through the model's own
reduction.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from ..model.blocks import base_model, is_encoder_decoder
from .recording import tensors_of


# Arguments of such names say something else about tokens than which of them are padding.
_OTHER_MASKS = re.compile("global|head_mask|causal|cross_attention|src_mask|tgt_mask|memory_mask|time_indices|labels")
_MASK = re.compile("mask$")


@dataclass(frozen=True)
class Padding:
    """Which tokens of a batch count in one stack.

    Args:
        keep: (sequences, tokens), True = counts. None if all tokens of the stack count.
        keep_context: the same for states that the blocks get beside their own, such as an encoder's.
        found: whether a mask of the stack's tokens was found.
        context_is_own: whether states beside the stack's own, of which no mask is known, may be of the same tokens.
    """

    keep: Tensor | None = None
    keep_context: Tensor | None = None
    found: bool = False
    context_is_own: bool = True
    _places: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def places_of_rows(
        self, shape: torch.Size, from_context: bool, tokens_first: bool, device: torch.device
    ) -> Tensor | None:
        """Return the indices of the rows that count, on `device`; None if all do. See `of_rows`.

        They are found once and kept, because the host waits for the device to learn how many there are.
        """
        key = shape, from_context, tokens_first, device
        if key not in self._places:
            keep = self.of_rows(shape, from_context, tokens_first)
            if keep is None:
                return None
            self._places[key] = keep.to(device).nonzero().squeeze(1)
        return self._places[key]

    def of_rows(self, shape: torch.Size, from_context: bool, tokens_first: bool = False) -> Tensor | None:
        """Return which rows of inputs (..., in) count, flat; None if all do.

        Args:
            shape: the shape of the inputs without their last dimension.
            from_context: whether the inputs are states beside the stack's own.
            tokens_first: whether rows in one dimension are those of the first token first.

        Raises:
            RowsUnknown: some tokens do not count, and the rows are not those of the tokens.
        """
        if from_context and self.keep_context is None:
            fits = self.context_is_own and self.keep is not None
            return align(self.keep, shape) if fits and self.keep is not None else None
        mask = self.keep_context if from_context else self.keep
        if mask is None:
            return None
        aligned = mask.T.flatten() if tokens_first and len(shape) == 1 else align(mask, shape)
        if aligned is None:
            raise RowsUnknown
        return aligned


class RowsUnknown(Exception):
    """Rows cannot be told apart by the mask of the tokens. The caller knows what to do."""


def align(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Return `mask` (sequences, tokens) laid out as rows of `shape`, flat; None if the rows are not those tokens.

    The sequences and the tokens must be two dimensions of `shape`, in any order, or one that is both.
    """
    sequences, tokens = mask.shape
    sizes = list(shape)
    if len(sizes) == 1:
        return mask.flatten() if sizes[0] == mask.numel() else None
    pairs = [(i, j) for i in range(len(sizes)) for j in range(len(sizes)) if i != j]
    # Neighbours first, sequences before tokens.
    for i, j in sorted(pairs, key=lambda pair: (abs(pair[0] - pair[1]), pair[0] > pair[1])):
        if (sizes[i], sizes[j]) == (sequences, tokens):
            own = mask if i < j else mask.T
            view = [size if k in (i, j) else 1 for k, size in enumerate(sizes)]
            return own.reshape(view).expand(shape).flatten()
    flat = [k for k, size in enumerate(sizes) if size == mask.numel()]
    # With a dimension for sequences beside it, it is one of other tokens.
    if flat and sequences not in sizes:
        return mask.flatten().reshape([-1 if k == flat[0] else 1 for k in range(len(sizes))]).expand(shape).flatten()
    return None


class TokenMasks:
    """Collects the masks that reach one stack while the model runs, and chooses the one of its tokens.

    Args:
        model: the model.
        names: the names of the stack's blocks.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model = model
        self.names = names
        self.is_decoder = _is_in_decoder(base_model(model), names[0])
        self.start({})

    def start(self, batch: Mapping[str, Any]) -> None:
        """Forget the batch before; `batch` is the next one."""
        self.batch = batch
        # The shape of the states that come to the stack first.
        self.shape: torch.Size | None = None
        # The masks, with the names of their arguments, of each module around the stack and of the first block.
        self.around: list[list[tuple[str, Tensor]]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context, note the masks with which the modules around the stack are called."""
        path = self.names[0].split(".")[:-1]
        with contextlib.ExitStack() as undo:
            for end in range(len(path) + 1):
                module = base_model(self.model).get_submodule(".".join(path[:end]))
                undo.callback(module.register_forward_pre_hook(self._on_call, with_kwargs=True).remove)
            yield

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.shape is None:
            self.around.append(_masks_among(module, args, kwargs))

    def at_call(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a block receives. Only the first call counts."""
        states = [x for x in tensors_of((args, kwargs)) if x.is_floating_point() and x.dim() > 1]
        if self.shape is None and states:
            self.shape = states[0].shape
            self.around.append(_masks_among(block, args, kwargs))

    def padding(self) -> Padding:
        """Return which tokens count in the stack, for the present batch."""
        found = self._reaching()
        if self.shape is None or any(isinstance(mask, FakeTensor) for _, mask in found):
            return Padding()
        own = [(name, mask) for name, mask in found if not _is_of_encoder(name)]
        if not self.is_decoder:
            own = [(name, mask) for name, mask in own if not name.startswith("decoder_")]
        context = next((self._kept(n, m) for n, m in reversed(found) if _is_of_encoder(n) and m.dim() == 2), None)
        said = self.batch.get("token_mask")
        if self.is_decoder:
            context = said.bool() if isinstance(said, Tensor) else context
            said = self.batch.get("decoder_token_mask")
            own = [("labels", mask) for mask in self._by_labels()] + own
        keep = self._fitting(said) if isinstance(said, Tensor) else None
        keep = self._chosen(own) if keep is None else keep
        return Padding(_unless_all(keep), _unless_all(context), keep is not None, not self.is_decoder)

    def _reaching(self) -> list[tuple[str, Tensor]]:
        """Return the masks that reach the stack, from the outermost module to the blocks.

        A module inside another one, which gets no mask from it, may have tokens of its own, such as those of an image.
        The mask of the whole model is then one of these tokens only if the batch holds no images and no sound.
        """
        if not self.around:
            return []
        *levels, of_block = self.around
        # Blocks need no mask of their own.
        between = [of_block]
        of_tokens_alone = not any(isinstance(x, Tensor) and x.is_floating_point() for x in self.batch.values())
        for depth, level in reversed(list(enumerate(levels))):
            if not of_tokens_alone and (not level or (depth == 0 and not any(between))):
                break
            between.append(level)
        found = [mask for level in reversed(between) for mask in level]
        # In an encoder-decoder, what the whole model gets for its encoder is no mask of the decoder.
        whole = (
            {id(mask) for name, mask in self.around[0] if not name.startswith("decoder_")} if self.is_decoder else ()
        )
        return [(name, mask) for name, mask in found if id(mask) not in whole or _is_of_encoder(name)]

    def _chosen(self, found: list[tuple[str, Tensor]]) -> Tensor | None:
        """Return the innermost mask that fits: first of those over tokens, then of those over pairs of tokens."""
        for dims in (2, 4):
            for name, mask in reversed(found):
                if mask.dim() == dims:
                    fitting = self._fitting(self._kept(name, mask) if dims == 2 else self._pairs(name, mask))
                    if fitting is not None:
                        return fitting
        return None

    def _pairs(self, name: str, mask: Tensor) -> Tensor | None:
        kept = _as_kept(name, mask)
        if mask.dtype == torch.bool and _says_what_is_left_out(kept):
            kept = ~kept
        return _of_pairs(kept, cached=self.batch.get("past_key_values") is not None)

    def _kept(self, name: str, mask: Tensor) -> Tensor | None:
        """Return a mask over tokens as bools, True = kept; None if it keeps nothing."""
        kept = _as_kept(name, mask)
        given = (
            x for n, x in self.batch.items() if isinstance(x, Tensor) and _MASK.search(n) and x.shape == mask.shape
        )
        if mask.dtype == torch.bool and any(torch.equal(~mask, x.to(mask.device).bool()) for x in given):
            kept = ~mask
        return kept if bool(kept.any()) else None

    def _fitting(self, mask: Tensor | None) -> Tensor | None:
        assert self.shape is not None, "a block was called"
        fits = mask is not None and align(mask, self.shape[:-1]) is not None
        return mask.bool() if mask is not None and fits else None

    def _by_labels(self) -> list[Tensor]:
        """Return the mask of labels from which the decoder's inputs are made: those of -100 are padding."""
        given = any(f"decoder_{name}" in self.batch for name in ("input_ids", "inputs_embeds", "attention_mask"))
        labels = self.batch.get("labels")
        return [labels != -100] if isinstance(labels, Tensor) and labels.dim() == 2 and not given else []


def _is_in_decoder(model: nn.Module, block: str) -> bool:
    """Return whether a block belongs to the decoder of an encoder-decoder."""
    if not is_encoder_decoder(model) or not isinstance(model, PreTrainedModel):
        return False
    part = model.get_submodule(block)
    of_encoder, of_decoder = model.get_encoder(), model.get_decoder()
    in_encoder = of_encoder is not model and any(module is part for module in of_encoder.modules())
    return not in_encoder and any(module is part for module in of_decoder.modules())


def marks_padding(batch: Mapping[str, Any]) -> list[str]:
    """Return the names of inputs that say that some tokens of a batch do not count."""
    names = []
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and _MASK.search(name) and not _OTHER_MASKS.search(name):
            kept = _as_kept(name, value)
            pairs = _of_pairs(kept) if value.dim() == 4 else kept
            if pairs is not None and not bool(pairs.all()):
                names.append(name)
    return names


def _masks_among(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the masks among the arguments of a module, by name."""
    forward = inspect.unwrap(type(module).forward)
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind != p.VAR_KEYWORD][1:]
    named = [*zip(names, args, strict=False), *kwargs.items()]
    return [
        (name, value)
        for name, value in named
        if isinstance(value, Tensor) and value.dim() in (2, 4) and _MASK.search(name) and not _OTHER_MASKS.search(name)
    ]


def _is_of_encoder(name: str) -> bool:
    return "encoder_" in name.replace("decoder_", "")


def _as_kept(name: str, mask: Tensor) -> Tensor:
    """Return `mask` as bools, True = kept. Numbers below zero are added to scores of what is left out."""
    if "padding_mask" in name and mask.dtype == torch.bool:
        # The convention of torch: True = left out.
        return ~mask
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all() & (mask == 1).any()):
        return mask > -1
    return mask.bool()


def _says_what_is_left_out(mask: Tensor) -> bool:
    """Return whether True means left out in a mask of bools (sequences, heads, queries, keys).

    A token attends to itself if it attends to any. So in such a mask a row is either True as a whole, which is that of
    padding, or False at its own token.
    """
    if mask.shape[-1] != mask.shape[-2]:
        return False
    own, whole = mask.diagonal(dim1=-2, dim2=-1), mask.all(-1)
    return bool((~own & mask.any(-1)).any()) and not bool((own & ~whole).any())


def _of_pairs(kept: Tensor, cached: bool = False) -> Tensor | None:
    """Return the tokens that attend to themselves in a mask (sequences, heads, queries, keys), (sequences, tokens).

    None if queries and keys are not the same tokens. With a cache, its keys come before those of the tokens.
    """
    queries, keys = kept.shape[-2:]
    if queries == 1:
        return kept[:, 0, 0]
    if keys != queries and not (cached and keys > queries):
        return kept[:, 0, :, 0] if keys == 1 else None
    return kept[:, 0].diagonal(keys - queries, -2, -1)


def _unless_all(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or bool(mask.all()) else mask
