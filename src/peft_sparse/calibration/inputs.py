"""Calibration data in the forms that people have it, turned into model inputs."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import base_model
from ..model.processes import place


Calibration = Tensor | Iterable[Mapping[str, Any]]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off within the context, and put every module back into its own mode after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def as_inputs(model: nn.Module, calibration: Calibration, batch_size: int = 1) -> list[dict[str, Any]]:
    """Return calibration data as a list of model inputs.

    Args:
        calibration: token ids (sequences, tokens), which an encoder-decoder gets on both sides, or an iterable of
            model inputs.
        batch_size: sequences of a tensor that run together.

    Raises:
        ValueError: neither token ids nor model inputs, or nothing at all.
    """
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.dtype not in (torch.int32, torch.int64) or 0 in calibration.shape:
            raise ValueError(
                "Expected `calibration` as token ids, a LongTensor (sequences, tokens), got "
                f"{calibration.dtype} of shape {tuple(calibration.shape)}."
            )
        names = ("input_ids", "decoder_input_ids") if _is_encoder_decoder(model) else ("input_ids",)
        return [dict.fromkeys(names, rows) for rows in calibration.split(batch_size)]
    batches = [dict(batch) for batch in calibration]
    if not batches:
        raise ValueError("`calibration` holds no batch. Give at least one sequence.")
    return batches


def sequences_in(batch: Mapping[str, Any]) -> int:
    """Return how many sequences the model inputs `batch` hold."""
    return next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))


def in_words(inputs: list[dict[str, Any]]) -> str:
    """Return how much data model inputs are and, for other processes to compare theirs, which."""
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


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))
