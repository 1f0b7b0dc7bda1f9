"""compact: cuts out the heads and neurons whose output columns are zero, and the filters that no layer reads."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.inputs import Calibration, as_inputs
from ..model.blocks import base_model
from ..model.settings import ordinary_settings
from .cutting import Cuts
from .filter_cutting import has_convolutions, removed_filters
from .proof import SameOutputs
from .saving import make_savable, put_back_unless_finished
from .units import Units, check_loaded, known_units, units_or_none


@ordinary_settings()
def compact(model: nn.Module, calibration: Calibration | None = None) -> nn.Module:
    """Cut out all heads, neurons and filters that contribute nothing, and change the configuration. In place.

    A head or neuron is cut out if its columns of the output projection W (out, in) are zero. It does not matter what
    wrote the zeros. The outputs of the model stay the same up to rounding. This is shown on a small input before and
    after the change. If the outputs differ, the model is put back as it was: the same parameters, which an optimizer
    may hold, with their values and gradients, and the same configuration.

    A key head and its value head are cut out if all their query heads are. In grouped-query attention all remaining
    key heads need equally many query heads. Each keeps as many as the key head with the most query heads that
    contribute, so some query heads that contribute nothing may stay. Each attention and each MLP keeps at least one
    head or neuron. An attention or MLP whose heads or neurons cannot be found, such as a set of experts, is left as it
    is.

    The filters of a channel, and its entries in normalisations, are cut out if the input channels of all layers that
    read it are zero. These are cut out as well. Channels that a sum couples are cut out together, and each layer keeps
    at least one filter.

    `save_pretrained` then saves the smaller model. If the configuration class of the model's family can describe it,
    which needs layers of equal width, plain `from_pretrained` loads it. Otherwise the class of the model becomes a
    subclass that stores the width of every layer, and `from_pretrained` loads it after `import peft_sparse`. Filters
    are also cut out of models that are not from Transformers. Save such a model whole, by `torch.save(model, path)`.

    Args:
        model: a model without adapters, with loaded floating-point weights; a model of Transformers, unless it has
            convolutions.
        calibration: token ids (sequences, tokens), or an iterable of model inputs, of which the first batch is used.
            It is needed if the model takes none of the inputs that are made for it: token ids, an image, a sound, or
            the `dummy_inputs` of Transformers; or if these do not run a block from which something is cut out.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a model of Transformers and has no convolutions.
        ValueError: the model has no blocks or has adapters; its weights are quantised or not loaded; no heads, no
            neurons and no convolutions can be found in it; the compact model computes something else, or no input
            shows that it does not. The model is then as it was before.
    """
    inner: Any = base_model(model)
    batches = [] if calibration is None else as_inputs(model, calibration)[:1]
    convolutional = has_convolutions(inner)
    if not isinstance(inner, PreTrainedModel) and not convolutional:
        raise TypeError(
            f"Expected a model of Transformers, whose configuration stores the widths of its layers, got "
            f"{type(inner).__name__}. Wrap the layers in a `PreTrainedModel`, or cut out the zeros in your own code."
        )
    found = units_or_none(inner) if convolutional else known_units(inner)
    filters = removed_filters(inner, batches, required=not found)
    check_loaded(found)
    kept = [(units, _contributing(units)) for units in found]
    cut = [(units, mask) for units, mask in kept if not mask.all()]
    with Cuts() as cuts, put_back_unless_finished(inner):
        if filters is not None:
            filters.cut_out(inner, cuts)
        same = SameOutputs(inner, [units for units, _ in cut], batches)
        for units, mask in cut:
            units.cut(mask, cuts)
        if isinstance(inner, PreTrainedModel):
            make_savable(inner)
        same.check()
    return model


def _contributing(units: Units) -> Tensor:
    """Return the mask of heads to keep, (count, heads_per_unit).

    Heads that contribute are kept. Others are kept where a unit would otherwise have fewer heads than another unit.
    """
    columns = (units.output.weight.detach() != 0).any(0)
    alive = columns.view(units.count, units.heads_per_unit, units.head_dim).any(2)
    if not alive.any():
        alive[0, 0] = True
    # The lowest ranks are kept: first the heads that contribute, by index, then the others, by index.
    rank = (~alive).to(torch.int8).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < alive.sum(1).max()) & alive.any(1, keepdim=True)
