"""Makes batches of single sequences, padded to the longest of their batch, from what the forward of a model takes."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.blocks import base_model, is_encoder_decoder


# These say of each token whether it counts, (sequences, tokens), 1 = counts. The model never sees them.
TOKEN_MASKS = ("token_mask", "decoder_token_mask")

# Number of dimensions that an input has without that of the sequences.
DIMENSIONS = {
    "input_ids": 1,
    "decoder_input_ids": 1,
    "input_values": 1,
    "input_features": 2,
    "inputs_embeds": 2,
    "pixel_values": 3,
}


@dataclass(frozen=True)
class Forward:
    """What the forward of a model takes.

    Args:
        name: what errors call the model.
        arguments: the names of its arguments.
        open: whether it takes arguments of any other name too.
        main: the argument that a bare tensor is given as.
        two_sided: whether the model is an encoder-decoder.
        pad: the token that fills up a sequence.
    """

    name: str
    arguments: tuple[str, ...]
    open: bool
    main: str
    two_sided: bool
    pad: int

    @classmethod
    def of(cls, model: nn.Module) -> "Forward":
        inner = base_model(model)
        parameters = inspect.signature(inner.forward).parameters.values()
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        arguments = tuple(p.name for p in parameters if p.kind not in several)
        main = inner.main_input_name if isinstance(inner, PreTrainedModel) else next(iter(arguments), "input_ids")
        config: Any = getattr(inner, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        pad = getattr(text, "pad_token_id", None)
        return cls(
            type(inner).__name__,
            arguments,
            any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
            main if "input_ids" not in arguments else "input_ids",
            is_encoder_decoder(model),
            pad if isinstance(pad, int) and pad >= 0 else 0,
        )

    def takes(self, name: str) -> bool:
        return name in self.arguments or (self.open and not self.arguments)

    def both_sides(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return `inputs` with the decoder's tokens: those of the encoder, if an encoder-decoder got no others."""
        given = {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & set(inputs)
        if not self.two_sided or given or "input_ids" not in inputs:
            return inputs
        masks = {f"decoder_{name}": inputs[name] for name in ("attention_mask", "token_mask") if name in inputs}
        return {**inputs, "decoder_input_ids": inputs["input_ids"]} | masks


def collate(rows: list[dict[str, Any]], forward: Forward) -> list[dict[str, Any]]:
    """Return `rows`, inputs of single sequences with the same names, as one batch.

    Sequences of different lengths are padded at their end, and the masks that the model takes say so. What cannot be
    padded becomes batches of one sequence.
    """
    padded = _padded(rows, forward)
    if padded is None:
        return [batch for row in rows if (batch := _stacked([row])) is not None]
    batch = _stacked(padded)
    return [batch] if batch is not None else [one for row in rows if (one := _stacked([row])) is not None]


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the batch of `rows`; None if values that are not tensors differ, or tensors do in their shapes."""
    batch: dict[str, Any] = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, Tensor):
            if any(not isinstance(value, Tensor) or value.shape != first.shape for value in values):
                return None
            batch[name] = torch.stack(values)
        elif isinstance(first, Real) and not isinstance(first, bool):
            batch[name] = torch.tensor(values)
        elif all(value is first or (isinstance(first, (bool, str)) and value == first) for value in values):
            batch[name] = first
        else:
            return None
    return batch


def _padded(rows: list[dict[str, Any]], forward: Forward) -> list[dict[str, Any]] | None:
    """Return `rows` with all sequences as long as the longest, and with masks; None if the model takes no mask."""
    lengths = {
        name: [len(row[name]) for row in rows]
        for name, value in rows[0].items()
        if all(isinstance(row[name], Tensor) and row[name].dim() for row in rows)
    }
    ragged = {name: counts for name, counts in lengths.items() if len(set(counts)) > 1}
    if not ragged:
        return rows
    of_tokens = lengths.get("input_ids")
    own = {name for name, counts in ragged.items() if counts == of_tokens and not name.startswith("decoder_")}
    of_decoder = {name for name in ragged if name.startswith("decoder_") or (name == "labels" and forward.two_sided)}
    if ragged.keys() - own - of_decoder:
        return None
    rows = [dict(row) for row in rows]
    for side, names in (("", own - of_decoder), ("decoder_", of_decoder)):
        if not names:
            continue
        mask, reference = f"{side}attention_mask", f"{side}input_ids"
        if not forward.takes(mask):
            return None
        counts = lengths[reference] if reference in lengths else lengths[min(names)]
        for row, count in zip(rows, counts, strict=True):
            row.setdefault(mask, torch.ones(count, dtype=torch.long))
    for name in own | of_decoder | {mask for mask in ("attention_mask", "decoder_attention_mask") if mask in rows[0]}:
        longest = max(len(row[name]) for row in rows)
        for row in rows:
            row[name] = _filled(row[name], longest, _filling(name, forward))
    return rows


def _filling(name: str, forward: Forward) -> int:
    return forward.pad if name.endswith("input_ids") else -100 if name == "labels" else 0


def _filled(value: Tensor, length: int, filling: int) -> Tensor:
    padding = value.new_full((length - len(value), *value.shape[1:]), filling)
    return torch.cat([value, padding])


def split(inputs: dict[str, Any], batch_size: int) -> list[dict[str, Any]]:
    """Return the sequences of one dict of model inputs in batches, or the dict itself where it cannot be split."""
    if not can_be_split(inputs):
        return [inputs]
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    count = len(next(iter(tensors.values())))
    return [
        {**inputs, **{name: value[start : start + batch_size] for name, value in tensors.items()}}
        for start in range(0, count, batch_size)
    ]


def can_be_split(inputs: Mapping[str, Any]) -> bool:
    """Return whether model inputs can be split into single sequences.

    The first dimension of every tensor must be the number of sequences, and there must be no other objects. Flattened
    images and a key-value cache, for example, cannot be split.
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    others = [value for value in inputs.values() if not isinstance(value, (Tensor, bool, int, float, str, type(None)))]
    # Positions of several kinds have the kinds in their first dimension, and these two are no matter of a sequence.
    positions = inputs.get("position_ids")
    if others or "cache_position" in inputs or (isinstance(positions, Tensor) and positions.dim() > 2):
        return False
    return all(value.dim() for value in tensors) and len({len(value) for value in tensors}) == 1
