"""Makes model inputs from the signature of a model's forward, by trying until the model runs."""

import inspect
import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from atlas_sizes import PLAIN_TOKENS


Batch = dict[str, Any]
# (generator of random numbers, whether the last sequence is padded) -> some inputs
Part = Callable[[torch.Generator, bool], Batch]
SEQUENCES, TOKENS = 2, 16
# The real tokens of a padded sequence: a multiple of the windows, so that models need no padding of their own.
REAL = 8
SECONDS = 12


class NoInputs(Exception):
    """No inputs were found with which the model runs; the message is the last error of the model."""


def find_batches(model: nn.Module) -> list[Batch]:
    """Return two batches with which `model` runs; the second has padding if the model knows attention masks.

    Raises:
        NoInputs: none were found, or the model returns NaN or other numbers each time.
    """
    deadline, failures = time.monotonic() + SECONDS, []
    for parts in _choices(model):
        if time.monotonic() > deadline:
            break
        make = _together(parts)
        error = _error(model, make(_generator(0), False))
        if error is not None:
            make, error = _with_images(model, make, error, deadline)
        if error is None:
            batches = [make(_generator(0), False), make(_generator(1), True)]
            if _error(model, batches[1]) is not None:
                batches[1] = make(_generator(1), False)
            return batches
        failures.append(error)
    raise NoInputs(failures[0] if failures else "its forward takes no input that is known here")


def run(model: nn.Module, batch: Batch) -> Any:
    """Run `model` on a batch, without a cache."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(**batch, **options)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a model returned."""
    values = dict(output) if hasattr(output, "keys") else output
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@torch.no_grad()
def _error(model: nn.Module, batch: Batch) -> str | None:
    try:
        first, second = leaves(run(model, batch)), leaves(run(model, batch))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not first:
        return "it returns no tensor"
    if first[0].isnan().any():
        return "it returns NaN"
    if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, second, strict=False)):
        return "two runs give different results"
    return None


def _together(parts: list[Part]) -> Part:
    def make(generator: torch.Generator, padded: bool) -> Batch:
        return {key: value for part in parts for key, value in part(generator, padded).items()}

    return make


def _choices(model: nn.Module) -> Iterator[list[Part]]:
    """Yield combinations of one part per kind of input, those with most kinds first."""
    known = inspect.signature(model.forward).parameters
    config = model.config
    kinds = [list(_text(known, config)), list(_pixels(known, config)), list(_audio(known, config))]
    kinds += [list(_series(known, config))]
    with_none: list[list[Part | None]] = [[*options, None] for options in kinds if options]
    combinations = [[part for part in parts if part is not None] for parts in itertools.product(*with_none)]
    yield from sorted(filter(None, combinations), key=len, reverse=True)


# Text.


def _text(known: Any, config: PretrainedConfig) -> Iterator[Part]:
    if "input_ids" not in known and "decoder_input_ids" not in known:
        return
    # With few image tokens this is often the number of patches: a mask must not be taken for that of another stack.
    length = TOKENS - 4 if "pixel_values" in known else TOKENS

    def make(generator: torch.Generator, padded: bool, both: bool = True) -> Batch:
        batch: Batch = {}
        pad = find(config, "pad_token_id")
        pad = pad if isinstance(pad, int) and pad >= 0 else 0
        sides = ["", "decoder_"] if "decoder_input_ids" in known and both else [""]
        for side in sides:
            if f"{side}input_ids" not in known:
                continue
            count = length if not side else 7
            ids = torch.randint(PLAIN_TOKENS.start, PLAIN_TOKENS.stop, (SEQUENCES, count), generator=generator)
            mask = torch.ones_like(ids)
            if padded:
                mask[-1, 4 if side else REAL :] = 0
            batch[f"{side}input_ids"] = ids.masked_fill(mask == 0, pad)
            if f"{side}attention_mask" in known and "input_features" not in known and "input_values" not in known:
                batch[f"{side}attention_mask"] = mask
        if "global_attention_mask" in known:
            batch["global_attention_mask"] = torch.zeros(SEQUENCES, length, dtype=torch.long)
            batch["global_attention_mask"][:, 0] = 1
        if "bbox" in known:
            corner = torch.randint(0, 40, (SEQUENCES, length, 2), generator=generator)
            batch["bbox"] = torch.cat([corner, corner + 20], dim=-1)
        return batch

    yield make
    if "decoder_input_ids" in known and "input_ids" in known:
        yield lambda generator, padded: make(generator, padded, both=False)


# Images.


@dataclass
class _Images:
    """The sizes of the images that a model takes, as its configuration says."""

    height: int
    width: int
    patch: int
    channels: int
    frames: int
    temporal: int
    merge: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "_Images":
        size = find(config, "image_size", "input_size", "img_size") or 32
        sides = (
            [size, size] if isinstance(size, int) else list(size)[-2:] if isinstance(size, list | tuple) else [32] * 2
        )
        patch = find(config, "patch_size", "spatial_patch_size") or 8
        channels = find(config, "num_channels", "in_channels", "in_chans") or 3
        temporal = find(config, "temporal_patch_size") or 1
        merge = find(config, "spatial_merge_size", "merge_kernel_size") or 1
        height, width = sides
        return cls(
            height,
            width,
            patch if isinstance(patch, int) else list(patch)[-1],
            channels if isinstance(channels, int) else 3,
            find(config, "num_frames", "frames_per_clip") or 4,
            temporal if isinstance(temporal, int) else 1,
            merge if isinstance(merge, int) else list(merge)[0],
        )

    @property
    def grid(self) -> tuple[int, int]:
        """The patches of an image, in numbers that can be merged."""
        merge = self.merge
        rows, columns = (side // self.patch // merge * merge for side in (self.height, self.width))
        return max(merge, rows), max(merge, columns)

    def sizes(self) -> Batch:
        return {
            "image_sizes": torch.tensor([[self.height, self.width]] * SEQUENCES),
            "pixel_attention_mask": torch.ones(SEQUENCES, 1, self.height, self.width, dtype=torch.long),
        }

    def grids(self) -> Batch:
        where = torch.tensor([[1, *self.grid]] * SEQUENCES)
        return {
            "image_grid_thw": where,
            "grid_thw": where,
            "merge_sizes": torch.full((SEQUENCES,), self.merge),
            "image_grid_hws": where[:, 1:],
            "spatial_shapes": where[:, 1:],
            "pixel_attention_mask": torch.ones(SEQUENCES, self.grid[0] * self.grid[1], dtype=torch.long),
            "pixel_position_ids": _positions(self.grid),
            "image_position_ids": _positions(self.grid),
        }


def _pixels(known: Any, config: PretrainedConfig) -> Iterator[Part]:
    names = ("pixel_values", "pixel_values_videos", "images", "flattened_patches")
    name = next((n for n in names if n in known), None)
    if name is None and "grid_thw" in known and "hidden_states" in known:
        name = "hidden_states"
    if name is None:
        return
    images = _Images.of(config)
    image = images.channels, images.height, images.width

    def plain(*shape: int, extra: Callable[[], Batch] | None = None) -> Part:
        def make(generator: torch.Generator, padded: bool) -> Batch:
            batch = {name: torch.randn(*shape, generator=generator)} | (extra() if extra is not None else {})
            return {key: value for key, value in batch.items() if key in known}

        return make

    count, features = images.grid[0] * images.grid[1], images.channels * images.patch**2
    if {"image_grid_thw", "grid_thw", "image_grid_hws"} & set(known):
        yield plain(SEQUENCES * count, features * images.temporal, extra=images.grids)
        yield plain(SEQUENCES * count, images.channels, images.patch, images.patch, extra=images.grids)
    if {"spatial_shapes", "pixel_position_ids", "image_position_ids"} & set(known):
        yield plain(SEQUENCES, count, features, extra=images.grids)
    of_videos = "video" in type(config).__name__.lower() or name == "pixel_values_videos"
    if of_videos or find(config, "tubelet_size", "num_frames"):
        yield plain(SEQUENCES, images.frames, *image)
    if "image_sizes" in known:
        yield plain(SEQUENCES, *image, extra=images.sizes)
        yield plain(SEQUENCES, 5, *image, extra=images.sizes)
        yield plain(SEQUENCES, 1, *image, extra=images.sizes)
    yield plain(SEQUENCES, *image)
    yield plain(SEQUENCES, 1, *image, extra=lambda: {"pixel_attention_mask": images.sizes()["pixel_attention_mask"]})
    for other in (64, 128, 224):
        if other > images.height:
            yield plain(SEQUENCES, images.channels, other, other)
    yield plain(SEQUENCES, images.frames, *image)
    yield plain(SEQUENCES, 2, *image)
    if name == "flattened_patches":
        yield plain(SEQUENCES, 10, features + 2)


def _positions(grid: tuple[int, int]) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], dim=-1).expand(SEQUENCES, -1, -1)


def _with_images(model: Any, make: Part, error: str, deadline: float) -> tuple[Part, str | None]:
    """Put image, video or audio tokens into the text, as many as the error of the model asks for."""
    config = model.config
    batch = make(_generator(0), False)
    names = [
        "image_token_id",
        "image_token_index",
        "media_placeholder_token_id",
        "audio_token_id",
        "audio_token_index",
    ]
    if "pixel_values" not in batch and "images" not in batch:
        names = [*names[3:], "video_token_id", *names[:3]]
    token = find(config, *names)
    if "input_ids" not in batch or len(batch) < 3 or not isinstance(token, int):
        return make, error
    typed = "mm_token_type_ids" in inspect.signature(model.forward).parameters

    def fails(count: int) -> str | None:
        return _error(model, _inserted(make, config, token, count, typed)(_generator(0), False))

    first = fails(1)
    if first is None:
        return _inserted(make, config, token, 1, typed), None
    numbers = [int(n) for n in re.findall(r"\d+", first + error)]
    width = find(config.get_text_config(), "hidden_size") or 32
    guesses = [n // d for n in numbers for d in (1, SEQUENCES, width, SEQUENCES * width) if n % d == 0]
    # An error that says the same of one and of two tokens has another reason.
    more = range(2, 40) if fails(2) != first else ()
    for count in dict.fromkeys([*guesses, *more]):
        if time.monotonic() > deadline:
            break
        if 0 < count <= 100 and fails(count) is None:
            return _inserted(make, config, token, count, typed), None
    return make, first


def _inserted(make: Part, config: PretrainedConfig, token: int, count: int, typed: bool) -> Part:
    """Return `make` with `count` times `token` in each sequence, behind the token that begins an image."""

    def new(generator: torch.Generator, padded: bool) -> Batch:
        batch = make(generator, padded)
        start = find(config, "vision_start_token_id", "image_start_token_id", "boi_token_id")
        marks = [start] if isinstance(start, int) else []
        ids = batch["input_ids"]
        extra = torch.tensor([*marks, *[token] * count]).expand(len(ids), -1)
        batch["input_ids"] = torch.cat([ids[:, :2], extra, ids[:, 2:]], dim=1)
        if "attention_mask" in batch and batch["attention_mask"].shape == ids.shape:
            mask = batch["attention_mask"]
            batch["attention_mask"] = torch.cat([mask[:, :2], torch.ones_like(extra), mask[:, 2:]], dim=1)
        if typed:
            batch["mm_token_type_ids"] = (batch["input_ids"] == token).long()
        return batch

    return new


# Sound.


def _audio(known: Any, config: PretrainedConfig) -> Iterator[Part]:
    name = next((n for n in ("input_features", "input_values", "audio_values", "audio_features") if n in known), None)
    if name is None:
        return
    mels = (
        find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", "n_mels", "mel_bins") or 16
    )
    mels = mels if isinstance(mels, int) else 16
    source = find(config, "max_source_positions")
    frames = 2 * source if isinstance(source, int) else 64
    # The frames of a sound must not be as many as the tokens of a decoder.
    samples = 4000

    def plain(*shape: int, axis: int = 1) -> Part:
        def make(generator: torch.Generator, padded: bool) -> Batch:
            values = torch.randn(*shape, generator=generator)
            batch = {name: values}
            mask = torch.ones(shape[0], shape[axis], dtype=torch.long)
            if padded:
                mask[-1, shape[axis] // 2 :] = 0
                values[-1] = values[-1] * mask[-1].view([-1 if i == axis else 1 for i in range(1, len(shape))])
            masks = ["attention_mask", "input_features_mask", "feature_attention_mask", "padding_mask"]
            wanted = [m for m in masks if m in known]
            if "input_ids" in known and "attention_mask" in wanted:
                wanted.remove("attention_mask")
            for key in wanted[:1]:
                batch[key] = mask
            return batch

        return make

    if name == "input_features":
        yield plain(SEQUENCES, mels, frames, axis=2)
        yield plain(SEQUENCES, frames, mels)
        yield plain(SEQUENCES, mels, 3000, axis=2)
        yield plain(SEQUENCES, 1, frames, mels, axis=2)
    else:
        length = find(config, "max_length")
        yield plain(SEQUENCES, samples)
        yield plain(SEQUENCES, length if isinstance(length, int) and length > 20 else frames, mels)
        yield plain(SEQUENCES, 1, samples, axis=2)
        yield plain(SEQUENCES, samples * 5)


# Series and boxes.


def _series(known: Any, config: PretrainedConfig) -> Iterator[Part]:
    if "past_values" in known and "past_time_features" in known:
        past = (find(config, "context_length") or 16) + max(find(config, "lags_sequence") or [0])
        steps, features = find(config, "prediction_length") or 8, find(config, "num_time_features") or 0

        def long(generator: torch.Generator, padded: bool) -> Batch:
            return {
                "past_values": torch.rand(SEQUENCES, past, generator=generator),
                "past_time_features": torch.randn(SEQUENCES, past, features, generator=generator),
                "past_observed_mask": torch.ones(SEQUENCES, past),
                "future_values": torch.rand(SEQUENCES, steps, generator=generator),
                "future_time_features": torch.randn(SEQUENCES, steps, features, generator=generator),
            }

        yield long
    elif "past_values" in known:
        channels, length = find(config, "num_input_channels") or 1, find(config, "context_length") or 32
        yield lambda generator, padded: {"past_values": torch.randn(SEQUENCES, length, channels, generator=generator)}
        yield lambda generator, padded: {"past_values": torch.randn(SEQUENCES, length, generator=generator)}
    if "hidden_states" in known and not {"input_ids", "grid_thw"} & set(known):
        width = find(config, "hidden_size", "d_model", "dim", "embed_dim") or 32
        yield lambda generator, padded: {"hidden_states": torch.randn(SEQUENCES, TOKENS, width, generator=generator)}
    if "inputs_embeds" in known and "input_ids" not in known:
        width = find(config, "hidden_size", "d_model") or 32
        yield lambda generator, padded: {"inputs_embeds": torch.randn(SEQUENCES, TOKENS, width, generator=generator)}
    if "inputs" in known:
        yield lambda generator, padded: {
            "inputs": torch.randint(PLAIN_TOKENS.start, PLAIN_TOKENS.stop, (SEQUENCES, TOKENS), generator=generator)
        }


def find(config: PretrainedConfig, *names: str) -> Any:
    """Return the first value called so in a configuration, else in its sub-configurations; None if there is none."""
    below = [v for v in vars(config).values() if isinstance(v, PretrainedConfig)]
    below.sort(key=lambda c: "vision" not in type(c).__name__.lower())
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for sub in below:
        value = find(sub, *names)
        if value is not None:
            return value
    return None
