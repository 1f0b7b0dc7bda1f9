"""Recognises the forms in which users have calibration and evaluation data, and makes model inputs of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from .collation import DIMENSIONS, TOKEN_MASKS, Forward, collate, split


# What tokenizers also return, and models do not take.
TOKENIZER_KEYS = (
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "overflow_to_sample_mapping",
    "overflowing_tokens",
    "num_truncated_tokens",
)

# With more tokens a batch takes more memory, and on a CPU no less time: see docs/numbers/pruning.md.
_TOKENS_TOGETHER = 256


def sequences_together(length: int) -> int:
    """Return how many sequences of `length` tokens run together by default: up to 256 tokens, or one sequence."""
    return max(1, _TOKENS_TOGETHER // max(1, length))


def check_counts(**numbers: int) -> None:
    """Check that arguments, given by their names, are whole numbers of at least 1.

    Raises:
        ValueError: one is not.
    """
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {number!r}.")


class Reader:
    """Makes batches of model inputs from the data of one argument.

    Args:
        model: the model that the inputs are for.
        batch_size: how many sequences run together, where they do not come in batches. None takes as many of one
            length as `sequences_together` says. Sequences with padding, and inputs of other kinds, run one by one.
        argument: what the caller calls the data, for error messages.
    """

    def __init__(self, model: nn.Module, batch_size: int | None, argument: str) -> None:
        self.forward = Forward.of(model)
        self.batch_size = batch_size
        self.argument = argument
        self.columns_of_tokens = False

    def read(self, data: Any) -> list[dict[str, Any]]:
        """Return the batches of `data`.

        Raises:
            ValueError: `data` has none of the forms that `as_inputs` lists, or holds no sequence.
        """
        data = _tensor(data)
        if isinstance(data, Tensor):
            inputs = self._named(data, bare=True)
            return split(inputs, self._together(inputs))
        if isinstance(data, Mapping):
            return self._batches_of_dict(data)
        if isinstance(data, (str, bytes)) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
            raise self._refusal(data)
        self.columns_of_tokens = isinstance(data, DataLoader) and data.collate_fn is default_collate
        # The entries of a data set are single sequences; those of a list or of a loader may be batches.
        is_dataset = hasattr(data, "column_names") or isinstance(data, torch.utils.data.Dataset)
        batches: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        for entry in _entries(data):
            inputs, is_row = self._inputs(entry, is_dataset)
            if rows and (not is_row or len(rows) == self._together(rows[0]) or not self._alike(rows[0], inputs)):
                batches += collate(rows, self.forward)
                rows = []
            if not is_row:
                batches.append(inputs)
            elif not _is_empty(inputs):
                rows.append(inputs)
        batches += collate(rows, self.forward) if rows else []
        if not batches:
            raise ValueError(
                f"`{self.argument}` holds no batch. Give at least one sequence."
                + (" An iterator gives its data once only: give a list." if isinstance(data, Iterator) else "")
            )
        return batches

    def _together(self, inputs: dict[str, Any]) -> int:
        """Return how many sequences like these run together."""
        if self.batch_size is not None:
            return self.batch_size
        return sequences_together(inputs["input_ids"].shape[-1]) if _are_tokens(inputs) else 1

    def _alike(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Return whether two sequences may run together."""
        if one.keys() != other.keys():
            return False
        return self.batch_size is not None or (_shapes(one) == _shapes(other) and _are_tokens(other))

    def _batches_of_dict(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        if data and all(hasattr(value, "column_names") for value in data.values()):
            first = next(iter(data))
            raise ValueError(
                f"Expected `{self.argument}` as one split of a data set, got a dict of {len(data)} splits. Choose "
                f"one, such as `data[{first!r}]`."
            )
        inputs = self._checked(data, is_dataset=False)
        if self._is_row(inputs, is_dataset=False):
            return collate([self.forward.both_sides(inputs)], self.forward)
        if not any(isinstance(value, list) for value in inputs.values()):
            inputs = self.forward.both_sides(inputs)
            return split(inputs, self._together(inputs))
        return self.read(self._rows_of(inputs))

    def _rows_of(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the sequences of a dict that holds them as lists of different lengths."""
        sizes = {name: len(value) for name, value in inputs.items() if isinstance(value, (Tensor, list))}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"Expected the same number of sequences under every name of `{self.argument}`, got {sizes}. Give a "
                "list of dicts, one for each batch."
            )
        count = next(iter(sizes.values()))
        return [{n: value[i] if n in sizes else value for n, value in inputs.items()} for i in range(count)]

    def _inputs(self, entry: Any, is_dataset: bool) -> tuple[dict[str, Any], bool]:
        """Return one entry of the data as model inputs, and whether it is a single sequence."""
        if isinstance(entry, Mapping):
            inputs = self._checked(entry, is_dataset)
            ragged = next((name for name, value in inputs.items() if isinstance(value, list)), None)
            if ragged is not None:
                padded = collate([self.forward.both_sides(row) for row in self._rows_of(inputs)], self.forward)
                if len(padded) == 1:
                    return padded[0], False
                raise ValueError(
                    f"Expected the sequences of a batch of `{self.argument}` to be equally long, or a model that "
                    f"takes an attention mask; {ragged!r} holds sequences of different lengths. Give them one by one."
                )
            is_row = self._is_row(inputs, is_dataset)
            return (self.forward.both_sides(inputs) if is_row else inputs), is_row
        if isinstance(entry, (list, tuple)) and not entry and self.forward.main == "input_ids":
            # A text without tokens.
            return {"input_ids": torch.zeros(0, dtype=torch.long)}, True
        inputs = self._named(self._first(entry), bare=False)
        if self._is_row(inputs, is_dataset):
            return inputs, True
        if all(len(value) == 1 for value in inputs.values()):
            return {name: value[0] for name, value in inputs.items()}, True
        return inputs, False

    def _first(self, entry: Any) -> Tensor:
        """Return the tensor of an entry that is a tensor, a list of token ids, or a pair (input, target)."""
        parts = list(entry) if isinstance(entry, (list, tuple)) else None
        if parts and all(isinstance(part, Integral) for part in parts):
            return torch.tensor(parts)
        value = _tensor(parts[0] if parts else entry)
        if isinstance(value, list) and value and all(isinstance(number, Integral) for number in value):
            value = torch.tensor(value)
        if not isinstance(value, Tensor) or not value.dim():
            raise self._refusal(entry)
        if parts and self.columns_of_tokens and value.dim() == 1:
            # Torch's collation makes one tensor per position of what were lists of token ids.
            return torch.stack(parts, 1)
        if parts and (len(parts) > 2 or (len(parts) == 2 and _looks_like_a_mask(value, _tensor(parts[1])))):
            raise ValueError(
                f"Expected entries of `{self.argument}` as (input,) or (input, target), got {len(parts)} tensors "
                "that may be masks. Give dicts, such as "
                '`{"input_ids": input_ids, "attention_mask": attention_mask}`.'
            )
        return value

    def _named(self, value: Tensor, bare: bool) -> dict[str, Any]:
        """Return a tensor under the names of the model's main inputs."""
        main, shape = self.forward.main, tuple(value.shape)
        is_tokens = main == "input_ids"
        if is_tokens:
            fits = value.dtype in (torch.int32, torch.int64) and (value.dim() == 2 or (value.dim() == 1 and not bare))
        else:
            fits = main not in DIMENSIONS or value.is_floating_point()
        if not fits or 0 in shape:
            expected = (
                "token ids, a LongTensor (sequences, tokens)" if is_tokens else f"`{main}` of {self.forward.name}"
            )
            raise ValueError(f"Expected `{self.argument}` as {expected}, got {value.dtype} of shape {shape}.")
        value = usable(value)
        return self.forward.both_sides({main: value})

    def _is_row(self, inputs: dict[str, Any], is_dataset: bool) -> bool:
        known = [
            inputs[name].dim() == size for name, size in DIMENSIONS.items() if isinstance(inputs.get(name), Tensor)
        ]
        if not known or not known[0]:
            return is_dataset and not known
        # An image has channels first, and nothing else has as many. Images as rows of patches are several.
        first = next(inputs[name] for name in DIMENSIONS if isinstance(inputs.get(name), Tensor))
        others = (x for x in inputs.values() if isinstance(x, Tensor) and x is not first and x.dim() > 1)
        return first.dim() < 3 or not any(other.shape[0] == first.shape[0] for other in others)

    def _checked(self, entry: Mapping[str, Any], is_dataset: bool) -> dict[str, Any]:
        """Return a dict of model inputs, its values as tensors, or as lists of tensors of different lengths."""
        inputs = {name: self._value(name, value) for name, value in entry.items()}
        texts = [name for name, value in inputs.items() if _is_text(value) and name not in self.forward.arguments]
        if is_dataset:
            mask = inputs.get("attention_mask")
            if isinstance(mask, Tensor) and not self.forward.takes("attention_mask"):
                inputs.setdefault("token_mask", mask)
            inputs = {n: value for n, value in inputs.items() if self.forward.takes(n) or n in TOKEN_MASKS}
        of_tokenizer = {name for name in TOKENIZER_KEYS if not self.forward.takes(name)}
        inputs = {name: value for name, value in inputs.items() if name not in (*texts, *of_tokenizer)}
        if not any(isinstance(value, (Tensor, list)) for value in inputs.values()):
            raise self._refusal(entry, texts)
        for name in ("input_ids", "decoder_input_ids"):
            for tokens in inputs[name] if isinstance(inputs.get(name), list) else [inputs.get(name)]:
                if isinstance(tokens, Tensor) and tokens.dtype not in (torch.int32, torch.int64):
                    raise ValueError(
                        f"Expected `{name}` of `{self.argument}` as int64 or int32, got {tokens.dtype} of shape "
                        f"{tuple(tokens.shape)}. Use `.long()` on token ids, and `inputs_embeds` for embeddings."
                    )
        return inputs

    def _value(self, name: str, value: Any) -> Any:
        value = _tensor(value)
        if isinstance(value, Tensor):
            return usable(value)
        if not isinstance(value, (list, tuple)) or _is_text(value):
            return value
        of_tokens = name == self.forward.main or name.endswith(("input_ids", "_mask", "labels", "token_type_ids"))
        if not value:
            return torch.zeros(0, dtype=torch.long) if of_tokens else value
        if all(isinstance(number, Real) for number in value):
            return torch.tensor(value)
        parts = [_tensor(torch.tensor(part) if _is_numbers(part) else part) for part in value]
        of_numbers = all(_is_numbers(part) for part in value)
        if not all(isinstance(part, Tensor) for part in parts) or not (of_tokens or of_numbers):
            return _nested(value)
        if self.columns_of_tokens and parts[0].dim() == 1:
            return usable(torch.stack(parts, 1))
        return usable(torch.stack(parts)) if len({part.shape for part in parts}) == 1 else list(map(usable, parts))

    def _refusal(self, entry: Any, texts: Sequence[str] = ()) -> ValueError:
        """Return the error for data of an unknown form, with the call that helps."""
        if isinstance(entry, Mapping):
            if texts:
                return ValueError(
                    f"Expected token ids or model inputs in `{self.argument}`, got only texts, under {texts[0]!r}. "
                    f"Make token ids of them: `pack_sequences(data[{texts[0]!r}], tokenizer)`."
                )
            return ValueError(
                f"Expected each batch of `{self.argument}` as a dict of inputs of {self.forward.name} with at least "
                f"one tensor, got {', '.join(map(repr, entry)) or 'an empty dict'}. It takes "
                f"{', '.join(map(repr, self.forward.arguments)) or 'any name'}."
            )
        if _is_text(entry):
            return ValueError(
                f"Expected `{self.argument}` as token ids or model inputs, got text. Make token ids of it: "
                "`pack_sequences(texts, tokenizer)`."
            )
        return ValueError(
            f"Expected `{self.argument}` as token ids (sequences, tokens), a dict of model inputs, or an iterable of "
            f"dicts, of token ids or of pairs (input, target), got {type(entry).__name__}. Make token ids of text "
            "with `pack_sequences(texts, tokenizer)`, and put a single sequence into a list."
        )


def usable(value: Tensor) -> Tensor:
    """Return `value`, copied if it was made within `torch.inference_mode`, outside of which it could not be used."""
    if not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def _entries(data: Any) -> Iterator[Any]:
    # A data set without an iterator of its own need not raise the IndexError that ends a loop over it.
    is_sequence = not isinstance(data, Iterable) and hasattr(data, "__len__")
    return (data[i] for i in range(len(data))) if is_sequence else iter(data)


def _tensor(value: Any) -> Any:
    """Return an array of numpy as a tensor, or as a list if it holds objects. Anything else comes back as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return value.tolist() if value.dtype.kind in "OUS" else torch.from_numpy(np.ascontiguousarray(value))


def _nested(value: Any) -> Any:
    """Return lists of lists of numbers as a tensor, such as the pixels of a data set. Others come back as they are."""
    if not isinstance(value, list):
        return value
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(number, Real) for number in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, bytes)) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(part, (str, bytes)) for part in value)
    )


def _are_tokens(inputs: dict[str, Any]) -> bool:
    """Return whether inputs are token ids without padding, and nothing else, such as images."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    masks = [tensors.pop(name) for name in list(tensors) if name.endswith("mask")]
    others = any(value.is_floating_point() for value in tensors.values())
    tokens = tensors.get("input_ids")
    return tokens is not None and tokens.dim() > 0 and not others and all(bool(mask.all()) for mask in masks)


def _shapes(inputs: dict[str, Any]) -> list[Any]:
    return [value.shape for _, value in sorted(inputs.items()) if isinstance(value, Tensor)]


def _is_empty(row: dict[str, Any]) -> bool:
    tokens = row.get("input_ids")
    return isinstance(tokens, Tensor) and not tokens.numel()


def _looks_like_a_mask(tokens: Tensor, second: Any) -> bool:
    """Tell whether the second of two tensors holds only 0 and 1, as no target of a language model does."""
    if not isinstance(second, Tensor) or second.shape != tokens.shape:
        return False
    return bool(((second == 0) | (second == 1)).all()) and not bool(((tokens == 0) | (tokens == 1)).all())
