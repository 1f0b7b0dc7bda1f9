"""compact: cuts out the heads and neurons that the zeros of the weights spell."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.blocks import base_model
from .saving import make_savable
from .units import Units, check_loaded, find_units


def compact(model: nn.Module) -> nn.Module:
    """Cut out all heads and neurons that contribute nothing, and have the configuration say so. In place.

    A head or neuron is cut out if its columns of the output projection are zero, whatever wrote the zeros: the outputs
    stay the same up to rounding. A key and value head goes with the last of its query heads; single query heads go as
    far as every key head that stays loses equally many. Each attention and each MLP keeps one unit.

    `save_pretrained` then saves the smaller model. If its family's configuration can express it (every layer equally
    wide), plain `from_pretrained` loads it; else `from_pretrained` does after `import peft_sparse`, and the model's
    class becomes a subclass that knows the width of every layer.

    Returns:
        `model` itself.

    Raises:
        TypeError: not a model of transformers.
        ValueError: a model whose units cannot be told, with adapters, or quantised.
    """
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            "Expected a model of transformers, whose configuration can say how wide it is, got "
            f"{type(inner).__name__}. Cut it by hand, by the zeros that `prune_structured` left."
        )
    found = find_units(inner)
    check_loaded(found)
    for units in found:
        kept = _contributing(units)
        if not kept.all():
            units.cut(kept)
    make_savable(inner)
    return model


def _contributing(units: Units) -> Tensor:
    """Return which heads to keep, (count, query heads of a unit): what contributes, and fillers for uniformity."""
    columns = (units.output.weight.detach() != 0).any(0)
    alive = columns.view(units.count, units.heads_per_unit, units.head_dim).any(2)
    if not alive.any():
        alive[0, 0] = True
    # Heads that contribute come first, then the earliest of the others.
    rank = (~alive).to(torch.int8).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < alive.sum(1).max()) & alive.any(1, keepdim=True)
