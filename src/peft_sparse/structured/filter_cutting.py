"""Cuts the filters that no layer reads out of a model, and shows that it computes the same."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .cutting import Cuts
from .filter_inputs import output_of, traced_on_image
from .filters import Filters, check_filters, chosen_filters
from .proof import is_close


def has_convolutions(model: nn.Module) -> bool:
    """Return whether a model has layers whose filters may be cut out."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


@dataclass(frozen=True)
class RemovedFilters:
    """The units of a model that are cut out, and an input on which it computes the same without them.

    Args:
        filters: the filters of the model.
        units: the units that no layer reads. Each set keeps at least one unit.
        batch: model inputs.
    """

    filters: Filters
    units: set[int]
    batch: dict[str, Any]

    def cut_out(self, model: nn.Module, cuts: Cuts) -> None:
        """Cut the units out of `model`. In place.

        Raises:
            ValueError: the model returns something else than before, or does not run any more. `cuts` puts it back.
        """
        before = output_of(model, self.batch)
        self.filters.cut(self.units, cuts)
        try:
            after = output_of(model, self.batch)
        except Exception as error:
            raise ValueError(_said(f"fails with {type(error).__name__}: {str(error).strip().rstrip('.')}")) from error
        if not _same(before, after):
            raise ValueError(_said("computes something else"))


def removed_filters(model: nn.Module, batches: list[dict[str, Any]], required: bool) -> RemovedFilters | None:
    """Return the filters that can be cut out of `model`; None if it has no convolution with a channel of zeros.

    Args:
        model: the model.
        batches: model inputs of the caller.
        required: whether the model has nothing else that could be cut out. Where it has, such as a vision transformer
            that embeds patches by a convolution, filters that cannot be followed are left as they are.

    Raises:
        ValueError: the model has such channels, and has adapters, or weights that cannot be cut, or takes no input.
    """
    if not any(isinstance(module, nn.Conv2d) and _has_zero_channel(module) for module in model.modules()):
        return None
    try:
        check_filters(model)
        found, batch = traced_on_image(model, batches)
        filters = chosen_filters(model, found)
    except ValueError:
        if required:
            raise
        return None
    gone = filters.unread()
    gone -= {own.units[0] for own in filters.sets if gone.issuperset(own.units)}
    return RemovedFilters(filters, gone, batch)


def _has_zero_channel(conv: nn.Conv2d) -> bool:
    weight = conv.weight.detach()
    if weight.is_meta or not weight.is_floating_point() or weight.dim() != 4:
        return False
    kept = weight.flatten(2).any(2)
    return not bool(kept.any(1).all() and kept.any(0).all())


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(map(is_close, before, after))


def _said(what: str) -> str:
    return (
        f"Expected the compact model to compute what the masked one does, but it {what}. Its widths are also used "
        "where they were not changed, for example as a number in its code. The model is as it was before: use it with "
        "its zeros, or leave out the layers before that place, with `exclude_modules` of `prune_structured`."
    )
