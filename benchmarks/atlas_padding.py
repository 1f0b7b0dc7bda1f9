"""Passes in which padding does not count: each sequence of a padded batch alone, or else rows by their place."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atlas_inputs import Batch, leaves, run
from atlas_sizes import PLAIN_TOKENS


@dataclass
class Pass:
    """One run of the model: a batch, and which tokens count where padding is in it."""

    batch: Batch
    masks: list[Tensor] = field(default_factory=list)


@dataclass
class Given:
    """One batch as it was given, and the passes that stand for it.

    Args:
        batch: the batch.
        passes: the passes in which padding does not count.
        changed: the batch with other values for all tokens of which some are padding; None if none are.
        unpadded: targets whose inputs do not depend on these tokens.
    """

    batch: Batch
    passes: list[Pass]
    changed: Batch | None = None
    unpadded: set[str] = field(default_factory=set)


def passes_of(model: nn.Module, batches: list[Batch]) -> tuple[list[Given], str]:
    """Return the batches with passes in which padding does not count, and how it was left out."""
    found: list[Given] = []
    how = "no padding"
    for batch in batches:
        tensors = {key: v for key, v in batch.items() if isinstance(v, Tensor) and v.dim() == 2}
        masks = {key: v for key, v in tensors.items() if "mask" in key and not key.startswith("global")}
        padded = {key: v for key, v in masks.items() if not v.bool().all()}
        if not padded:
            found.append(Given(batch, [Pass(batch)]))
            continue
        alone = list(_alone(batch, padded))
        if _same_outputs(model, batch, alone):
            passes, how = [Pass(each) for each in alone], "sequences alone"
        else:
            others = [torch.ones(b.shape[:2]) for k, b in batch.items() if k.endswith("input_ids")]
            reduced = _reduced(model, batch, masks)
            passes, how = [Pass(batch, [*padded.values(), *masks.values(), *reduced, *others])], "rows by place"
        found.append(Given(batch, passes, _changed(batch, padded)))
    return found, how


@torch.no_grad()
def _reduced(model: nn.Module, batch: Batch, masks: dict[str, Tensor]) -> list[Tensor]:
    """Return the masks over frames that the model itself makes of masks over samples."""
    makers: list[Any] = [m for m in model.modules() if hasattr(m, "_get_feature_vector_attention_mask")]
    try:
        frames = next(leaf.shape[1] for leaf in leaves(run(model, batch)) if leaf.dim() == 3)
        return [makers[-1]._get_feature_vector_attention_mask(frames, m).bool() for m in masks.values() if makers]
    except Exception:
        return []


def _alone(batch: Batch, padded: dict[str, Tensor]) -> Iterator[Batch]:
    """Yield each sequence of a batch, cut to its real tokens."""
    count = len(next(iter(padded.values())))
    for i in range(count):
        single = dict(batch)
        for key, value in batch.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) % count:
                continue
            # Patches of all images may stand in one dimension.
            one = value.chunk(count)[i]
            for mask_key, mask in padded.items():
                axis = _axis_of(mask_key, mask, key, value)
                if axis is not None:
                    one = one.index_select(axis, mask[i].nonzero().flatten())
            single[key] = one
        yield single


def _changed(batch: Batch, padded: dict[str, Tensor]) -> Batch:
    """Return a batch with other values for all tokens that the masks `padded` describe."""
    changed = dict(batch)
    for mask_key, mask in padded.items():
        for key, value in batch.items():
            if not isinstance(value, Tensor) or "mask" in key or _axis_of(mask_key, mask, key, value) is None:
                continue
            if key.endswith("input_ids"):
                # Tokens that stand for images must be as many as there are images.
                changed[key] = value.masked_fill(value < PLAIN_TOKENS.stop, PLAIN_TOKENS.stop - 1)
            elif value.dim() > 2 or value.is_floating_point():
                changed[key] = value + 1
    return changed


def _axis_of(mask_key: str, mask: Tensor, key: str, value: Tensor) -> int | None:
    """Return the dimension of a model input that the mask (sequences, tokens) describes, or None."""
    if any(key.startswith(side) != mask_key.startswith(side) for side in ("decoder_", "pixel_")):
        return None
    if value.dim() > 3 or len(value) != len(mask):
        return None
    return next((axis for axis in (1, 2) if value.dim() > axis and value.shape[axis] == mask.shape[1]), None)


@torch.no_grad()
def _same_outputs(model: nn.Module, batch: Batch, alone: list[Batch]) -> bool:
    """Return whether sequences alone give the outputs that they have in the padded batch."""
    try:
        together = leaves(run(model, batch))
        for i, single in enumerate(alone):
            compared = False
            for whole, one in zip(together, leaves(run(model, single)), strict=True):
                if whole.dim() < 3 or whole.dim() != one.dim() or whole.shape[2:] != one.shape[2:]:
                    continue
                # Padding is on the right, so the tokens of the sequence come first.
                expected = whole[i, : one.shape[1]]
                if whole.shape[0] != len(alone) or expected.shape != one[0].shape:
                    continue
                if not torch.allclose(one[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
                    return False
                compared = True
            if not compared:
                return False
    except Exception:
        return False
    return True
