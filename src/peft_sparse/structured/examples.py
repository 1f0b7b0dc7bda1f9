"""Makes small inputs for a model, on which two of its states can be compared."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.inputs import without_cache
from ..model.blocks import base_model, is_encoder_decoder


_SEQUENCES, _TOKENS, _SAMPLES = 2, 12, 4000


def example_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield model inputs that may suit `model`: token ids, an image, a sound, or its `dummy_inputs`.

    They are made from the name of the model's main input and from the sizes in its configuration. Whether the model
    takes them is not tried.

    Args:
        model: a model of Transformers, or a module whose first argument has one of the names that these models use.
    """
    inner: Any = base_model(model)
    accepted = list(inspect.signature(inner.forward).parameters)
    name = getattr(inner, "main_input_name", None) or (accepted or [""])[0]
    generator = torch.Generator("cpu").manual_seed(0)
    options = without_cache(model)
    if name in ("input_ids", "tokens", "x", "input"):
        tokens = _tokens(inner, generator)
        if tokens is not None:
            yield {name: tokens} | options
            yield {name: tokens, "decoder_input_ids": tokens[:, : _TOKENS - 3]} | options
    for shape in _shapes_of(name, getattr(inner, "config", None)):
        values = torch.randn(shape, generator=generator, device="cpu").to(_dtype(inner))
        yield {name: values} | options
        tokens = _tokens(inner, generator) if is_encoder_decoder(inner) else None
        if tokens is not None:
            yield {name: values, "decoder_input_ids": tokens[: shape[0]]} | options
    if isinstance(dummy := getattr(inner, "dummy_inputs", None), dict):
        yield dict(dummy) | options


def _tokens(model: nn.Module, generator: torch.Generator) -> Tensor | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    embeddings = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    size = getattr(config, "vocab_size", None) or max(embeddings, default=0)
    if not isinstance(size, int) or size < 2:
        return None
    # The first ids often mean padding, and the last ones images.
    first = min(4, size // 2)
    last = max(first + 1, min(size, 1000) * 3 // 4)
    return torch.randint(first, last, (_SEQUENCES, _TOKENS), generator=generator, device="cpu")


def _shapes_of(name: str, config: Any) -> Iterator[tuple[int, ...]]:
    """Yield shapes that the input `name` may have, if it is an image or a sound."""
    if name in ("pixel_values", "pixel_values_videos"):
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", None) or getattr(vision, "crop_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        channels = getattr(vision, "num_channels", None) or getattr(vision, "in_chans", None) or 3
        yield _SEQUENCES, channels, height, width
        frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None)
        if isinstance(frames, int):
            yield 1, frames, channels, height, width
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", None) or 80
    if name == "input_values":
        if isinstance(length := getattr(config, "max_length", None), int):
            yield 1, length, bins
        yield _SEQUENCES, _SAMPLES
    if name == "input_features":
        if isinstance(positions := getattr(config, "max_source_positions", None), int):
            yield 1, bins, 2 * positions
            yield 1, positions, getattr(config, "input_feat_per_channel", bins)
        yield 1, 4 * _TOKENS, bins


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
