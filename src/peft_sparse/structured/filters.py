"""Finds the filters of a convolutional network that can be removed, with everything that belongs to them.

A unit is a channel, or several channels that can only be removed together: those that a residual sum adds, those of a
depthwise convolution, and those at one place of each group of a convolution with groups. It has the filters that make
it, the entries of normalisations that scale it, and the input channels of the layers that read it.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..model.blocks import Targets, base_model, excluded_names, matching_names
from ..model.kinds import obstacle
from ..model.offload import is_offloaded
from ..model.tree import has_adapters
from ..model.weights import WeightView, stored_weight
from .channel_trace import Traced
from .cutting import Cuts


Role = Literal["rows", "columns", "norm"]

_OF_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Part:
    """One dimension of one layer, whose entries belong to units.

    Args:
        name: name of the layer.
        layer: a convolution, a linear layer, or a batch or instance normalisation.
        role: "rows" are the outputs of a convolution or linear layer, "columns" its inputs, "norm" the channels of a
            normalisation. The rows of a depthwise convolution are its inputs as well.
        units: the unit of each entry, or a number that is no unit. For the columns of a convolution with groups it has
            the entries of one group.
    """

    name: str
    layer: nn.Module
    role: Role
    units: tuple[int, ...]

    @property
    def depthwise(self) -> bool:
        """Whether the layer is a convolution whose every group has one input channel."""
        conv: Any = self.layer
        return isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels > 1

    @property
    def dim(self) -> int:
        """The dimension of the parameters that the part is about."""
        return 1 if self.role == "columns" else 0

    def parameters(self) -> list[str]:
        """Return the names of the tensors of the layer that have entries for units."""
        names = _OF_NORM if self.role == "norm" else ("weight",) if self.role == "columns" else ("weight", "bias")
        return [name for name in names if getattr(self.layer, name, None) is not None]

    def kept(self, removed: set[int], like: Tensor) -> Tensor:
        """Return the mask of the entries that stay, on the device of `like`."""
        return like.new_tensor([unit not in removed for unit in self.units], dtype=torch.bool)

    def cut(self, removed: set[int], cuts: Cuts) -> None:
        """Cut the entries of the units `removed` out of the layer. In place."""
        layer: Any = self.layer
        left = sum(unit not in removed for unit in self.units)
        if left == len(self.units):
            return
        for name in self.parameters():
            cuts.cut_tensor(layer, name, self.dim, self.kept(removed, getattr(layer, name)).cpu())
        if self.role == "norm":
            sizes = {"num_features": left}
        elif self.role == "columns":
            sizes = {"in_features": left, "in_channels": left * getattr(layer, "groups", 1)}
        else:
            sizes = {"out_features": left, "out_channels": left}
            if self.depthwise:
                sizes |= dict.fromkeys(("in_channels", "groups"), left * layer.groups // len(self.units))
        cuts.set_existing(layer, sizes)


@dataclass(frozen=True)
class FilterSet:
    """Units that the same convolutions make: their filters are compared with each other.

    Args:
        convs: number of filters that one unit has in each of these convolutions, by name, in the order in which the
            convolutions run.
        units: the units.
    """

    convs: dict[str, int]
    units: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the first convolution."""
        return next(iter(self.convs))

    @property
    def filters(self) -> int:
        """Number of filters of one unit."""
        return sum(self.convs.values())


@dataclass(frozen=True)
class Filters:
    """The filters of a model.

    Args:
        sets: the units that can be removed.
        parts: the parts of layers that have entries for them.
        left_out: the convolutions with filters that cannot be removed or were not chosen, by name, each with the
            reason.
    """

    sets: tuple[FilterSet, ...]
    parts: tuple[Part, ...]
    left_out: dict[str, str]

    def cut(self, removed: set[int], cuts: Cuts) -> None:
        """Cut the units `removed` out of all layers. In place."""
        for part in self.parts:
            part.cut(removed, cuts)

    def zeroed(self, removed: set[int]) -> dict[str, Tensor]:
        """Return copies of all parameters that have entries of the units `removed`, with zeros in these entries.

        Running statistics stay as they are: a normalisation with zeros as weight and bias returns zeros.
        """
        changed: dict[str, Tensor] = {}
        for part in self.parts:
            for name in part.parameters():
                parameter, key = getattr(part.layer, name), f"{part.name}.{name}"
                gone = ~part.kept(removed, parameter)
                if isinstance(parameter, nn.Parameter) and gone.any():
                    copy = changed.setdefault(key, parameter.detach().clone())
                    copy.index_fill_(part.dim, gone.nonzero().flatten(), 0)
        return changed

    def unread(self) -> set[int]:
        """Return the units that no layer reads: all input channels that read them are zero."""
        read: set[int] = set()
        for part in self.parts:
            if part.role == "columns":
                weight = stored_weight(part.layer).detach()
                zero = (weight.transpose(0, 1).flatten(1) == 0).all(1).tolist()
                read |= {unit for unit, gone in zip(part.units, zero, strict=True) if not gone}
        return {unit for own in self.sets for unit in own.units} - read


def chosen_filters(
    model: nn.Module, found: Traced, target_modules: Targets = None, exclude_modules: Targets = None
) -> Filters:
    """Return the filters that can be removed, of the convolutions that the arguments choose.

    A unit is chosen if all convolutions that have filters of it are.

    Args:
        model: the model.
        found: what a run of it showed.
        target_modules: None for all convolutions, a list of names or name endings, or a regular expression for the
            whole name.
        exclude_modules: a list of names or name endings, or a regular expression for the whole name.

    Raises:
        ValueError: a listed name matches no convolution; no unit is left.
    """
    modules = dict(base_model(model).named_modules())
    convs = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    targets = None if target_modules == "all-linear" else target_modules
    chosen = set(matching_names(list(convs), targets, exclude_modules, list(modules))) if convs else set()
    units = _units(found, set(convs))
    read = {found.labels.root(label) for labels in found.columns.values() for label in labels}
    left_out = {name: "no input reaches it" for name in convs if name not in found.rows}
    left_out |= {name: "not in `target_modules`" for name in convs if target_modules and name not in chosen}
    left_out |= dict.fromkeys(excluded_names(list(convs), exclude_modules), "excluded")
    removable: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for unit, makers in units.items():
        reason = found.labels.reason(unit) or _why_not(makers, unit in read, chosen)
        if reason is None:
            removable.setdefault(tuple(makers.items()), []).append(unit)
        for name in makers if reason else ():
            left_out.setdefault(name, reason or "")
    if not removable:
        raise ValueError(_nothing_left(left_out))
    sets = tuple(FilterSet(dict(makers), tuple(own)) for makers, own in removable.items())
    order = {name: place for place, name in enumerate(convs)}
    parts = _parts(modules, found, {unit for own in sets for unit in own.units})
    return Filters(sets, parts, dict(sorted(left_out.items(), key=lambda item: order[item[0]])))


def check_filters(model: nn.Module) -> None:
    """Check that the layers of a model can be cut.

    Raises:
        ValueError: the model has adapters; a weight is computed, quantised, split among processes or not loaded.
    """
    if has_adapters(model):
        raise ValueError(
            "Expected a model without adapters, which would not fit their layers after filters are cut out. Call "
            "`merge_and_unload()` first, or attach the adapters afterwards."
        )
    for name, module in base_model(model).named_modules():
        reason = obstacle(WeightView(module)) if isinstance(module, (nn.Conv2d, nn.Linear)) else None
        if is_offloaded(module) and reason is None:
            reason = "is offloaded. Load the model into memory first."
        if reason is not None:
            raise ValueError(f"Filters cannot be removed while the weight of {name!r} {reason}")


def _units(found: Traced, convs: set[str]) -> dict[int, Counter[str]]:
    """Return every unit with the number of filters that it has in each convolution, in the order of their calls."""
    units: dict[int, Counter[str]] = {}
    for name, labels in found.rows.items():
        for label in labels if name in convs else ():
            units.setdefault(found.labels.root(label), Counter())[name] += 1
    return units


def _why_not(makers: Counter[str], read: bool, chosen: set[str]) -> str | None:
    missing = [name for name in makers if name not in chosen]
    if missing:
        return f"its filters can only be removed with those of {missing[0]!r}, which is not chosen"
    return None if read else "no layer reads them"


def _parts(modules: dict[str, nn.Module], found: Traced, units: set[int]) -> tuple[Part, ...]:
    kinds: tuple[tuple[Role, dict[str, tuple[int, ...]]], ...] = (
        ("rows", found.rows), ("columns", found.columns), ("norm", found.norms)
    )  # fmt: skip
    parts = [
        Part(name, modules[name], role, tuple(found.labels.root(label) for label in labels))
        for role, noted in kinds
        for name, labels in noted.items()
    ]
    # The columns of a depthwise convolution are noted as its rows.
    return tuple(part for part in parts if units & set(part.units))


def _nothing_left(left_out: dict[str, str]) -> str:
    name, reason = next(iter(left_out.items()), ("", ""))
    example = f" For example, the filters of {name!r} stay: {reason}." if name else " It has no `nn.Conv2d`."
    return (
        f"Expected convolutions with filters that can be removed, found none.{example} Choose other layers with "
        "`target_modules` and `exclude_modules`, or call `prune`, which writes single zeros."
    )
