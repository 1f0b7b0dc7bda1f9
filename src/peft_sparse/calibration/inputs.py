"""Turns calibration and evaluation data, in the forms that users have it, into model inputs."""

import contextlib
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import base_model, is_encoder_decoder
from ..model.processes import place


Calibration = Tensor | Iterable[Mapping[str, Any]]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode within the context. After it, every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def as_inputs(
    model: nn.Module, calibration: Calibration, batch_size: int = 1, argument: str = "calibration"
) -> list[dict[str, Any]]:
    """Return calibration data as a list of model inputs.

    Args:
        model: the model that the inputs are for.
        calibration: token ids (sequences, tokens), or an iterable of model inputs (dicts). An encoder-decoder gets
            token ids as inputs of its encoder and of its decoder.
        batch_size: number of sequences per batch, where `calibration` is token ids. Model inputs stay as they are.
        argument: what the caller calls `calibration`, for error messages.

    Raises:
        ValueError: `calibration` is neither token ids nor model inputs, or it is empty.
    """
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.dtype not in (torch.int32, torch.int64) or 0 in calibration.shape:
            raise ValueError(
                f"Expected `{argument}` as token ids, a LongTensor (sequences, tokens), got "
                f"{calibration.dtype} of shape {tuple(calibration.shape)}."
            )
        names = ("input_ids", "decoder_input_ids") if is_encoder_decoder(model) else ("input_ids",)
        return [dict.fromkeys(names, rows) for rows in calibration.split(batch_size)]
    if isinstance(calibration, (str, Mapping)):
        raise ValueError(
            f"Expected `{argument}` as token ids or an iterable of model inputs, got {type(calibration).__name__}. "
            "Make token ids of text with `pack_sequences` or `sample_sequences`. Put a single batch into a list."
        )
    batches = list(calibration)
    if not batches:
        raise ValueError(f"`{argument}` holds no batch. Give at least one sequence.")
    for batch in batches:
        if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
            raise ValueError(
                f"Expected each batch of `{argument}` as a dict of model inputs with at least one tensor, got "
                f"{type(batch).__name__}. Make token ids of text with `pack_sequences` or `sample_sequences`, or pass "
                '`return_tensors="pt"` to the tokenizer.'
            )
    return [dict(batch) for batch in batches]


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Return the tokens of model inputs as their labels, (sequences, tokens).

    Labels are -100 at padding, and where a token would be predicted from padding. A causal model compares the label of
    a token with the prediction at the token before, so its labels are its tokens. An encoder-decoder compares label
    and prediction at the same position, so its labels are the decoder's tokens, shifted by one position.
    """
    side = "decoder_" if "decoder_input_ids" in batch else ""
    labels = batch[f"{side}input_ids"].long()
    if isinstance(mask := batch.get(f"{side}attention_mask"), Tensor):
        labels = without_padding(labels, mask)
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if side else labels


def without_padding(labels: Tensor, mask: Tensor) -> Tensor:
    """Return `labels` with -100 where `mask` (sequences, tokens) is 0, and where it is 0 at the token before."""
    kept = mask.bool()
    predicted = kept & nn.functional.pad(kept[:, :-1], (1, 0), value=True)
    return labels.masked_fill(~predicted, -100)


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument that keeps `model` from making a key-value cache, if its forward takes that argument."""
    accepted = inspect.signature(base_model(model).forward).parameters
    return {"use_cache": False} if "use_cache" in accepted else {}


def output_of(outputs: Any, name: str) -> Any:
    """Return what a model returned under `name`, in a dict or as an attribute; None if there is no such output."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def sequences_in(batch: Mapping[str, Any]) -> int:
    """Return the number of sequences in one batch of model inputs: the length of its first tensor."""
    # Not accelerate's `find_batch_size`, which refuses inputs whose first value is not a tensor.
    return next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))


def in_words(inputs: list[dict[str, Any]]) -> str:
    """Return the amount of data in words. With several processes a hash is added, by which they compare their data."""
    amount = f"{sum(map(sequences_in, inputs))} sequences in {len(inputs)} batches"
    return amount if place()[1] == 1 else f"{amount}, of hash {fingerprint_of_inputs(inputs)}"


def fingerprint_of_inputs(inputs: Iterable[Mapping[str, Any]]) -> str:
    """Return a hash of model inputs."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in inputs:
        for name, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
