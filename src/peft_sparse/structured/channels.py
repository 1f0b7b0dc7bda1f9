"""Follows channels through the operations of torch: which channels of a result are which channels of its inputs.

Every channel that a layer makes has a label. An operation that combines two tensors entry by entry unites their
labels: such channels can only be removed together. A label is pinned if its channels reach an operation without a
rule, or a tensor of fixed width. Pinned channels cannot be removed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Labels:
    """Labels of channels, which can be united and pinned. A label is a number."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}

    def fresh(self, count: int) -> tuple[int, ...]:
        """Return new labels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return tuple(range(first, first + count))

    def root(self, label: int) -> int:
        """Return the label that stands for all labels that were united with `label`: the smallest of them."""
        path = []
        while self._parents[label] != label:
            path.append(label)
            label = self._parents[label]
        for below in path:
            self._parents[below] = label
        return label

    def unite(self, first: Iterable[int], second: Iterable[int]) -> None:
        """Unite labels one by one. The reason of a pinned label holds for both."""
        for one, other in zip(first, second, strict=True):
            low, high = sorted((self.root(one), self.root(other)))
            if low == high:
                continue
            self._parents[high] = low
            reason = self._reasons.pop(high, None)
            if reason is not None:
                self._reasons.setdefault(low, reason)

    def pin(self, labels: Iterable[int], reason: str) -> None:
        """Note that the channels of `labels` cannot be removed, and why. A first reason stays."""
        for label in labels:
            self._reasons.setdefault(self.root(label), reason)

    def reason(self, label: int) -> str | None:
        """Return why the channels of a label cannot be removed; None if they can be."""
        return self._reasons.get(self.root(label))


@dataclass(frozen=True)
class Channels:
    """Where the channels of a tensor are.

    Args:
        dim: the dimension of the channels, from 0.
        labels: one label per entry of this dimension. An entry that holds several values of one channel, as after a
            flattening, has the label of this channel.
    """

    dim: int
    labels: tuple[int, ...]


# What an operation was called with: its arguments with names, its result, and the channels of a tensor or None.
Rule = Callable[[list[Any], Tensor, Callable[[Any], Channels | None], Labels], Channels | None]


def channels_after(
    func: Any, args: Sequence[Any], result: Tensor, of: Callable[[Any], Channels | None], labels: Labels
) -> Channels | None:
    """Return the channels of `result`, one tensor that the operation `func` returned; None if there is no rule.

    Args:
        func: an operation of torch's dispatcher, such as `torch.ops.aten.add.Tensor`.
        args: its arguments by position.
        result: the tensor.
        of: returns the channels of a tensor among `args`, and None for what has no channels.
        labels: gets the labels that are united.
    """
    name = func.overloadpacket.__name__
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    return None if rule is None else rule(list(args), result, of, labels)


def _pointwise(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    marked = [(tensor, own) for tensor in tensors if (own := of(tensor)) is not None]
    # Dimensions of different tensors are aligned at the right.
    places = {own.dim - tensor.dim() + result.dim() for tensor, own in marked}
    if len(places) != 1:
        return None
    (place,) = places
    width = result.shape[place]
    # A tensor of one channel, such as a spatial attention, acts on all channels of the others.
    whole = [own for _, own in marked if len(own.labels) == width]
    for _, own in marked:
        if len(own.labels) != width:
            labels.pin(own.labels, "they are one channel that acts on several others")
        elif own is not whole[0]:
            labels.unite(whole[0].labels, own.labels)
    if not whole:
        return None
    for tensor in tensors:
        there = place - result.dim() + tensor.dim()
        if of(tensor) is None and there >= 0 and tensor.shape[there] != 1:
            labels.pin(whole[0].labels, "they meet a tensor whose width is fixed")
    return Channels(place, whole[0].labels)


def _same_place(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    """Pooling and resizing: the last two dimensions change."""
    own = of(args[0])
    fits = own is not None and own.dim == args[0].dim() - 3 and result.dim() == args[0].dim()
    return own if fits else None


def _shared_shape(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    """A copy of the first argument, or a view of it of another shape."""
    own, old, new = of(args[0]), list(args[0].shape), list(result.shape)
    if own is None:
        return None
    before, width = prod(old[: own.dim]), old[own.dim]
    for place, size in enumerate(new):
        if prod(new[:place]) != before or size < width or size % width:
            continue
        # A channel with `times` consecutive entries, of the dimensions after it that are merged with its own.
        times = size // width
        merged = next((n for n in range(own.dim + 1, len(old) + 1) if prod(old[own.dim + 1 : n]) == times), None)
        if merged is not None:
            return Channels(place, tuple(label for label in own.labels for _ in range(times)))
    return None


def _reduced(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    own, rank = of(args[0]), args[0].dim()
    given = args[1] if len(args) > 1 else None
    dims = {d % rank for d in ([given] if isinstance(given, int) else given or range(rank))}
    if own is None or own.dim in dims:
        return None
    kept = result.dim() == rank
    return Channels(own.dim if kept else own.dim - sum(d < own.dim for d in dims), own.labels)


def _permuted(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    own, rank = of(args[0]), args[0].dim()
    return None if own is None else Channels([d % rank for d in args[1]].index(own.dim), own.labels)


def _transposed(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    own, rank = of(args[0]), args[0].dim()
    first, second = (d % rank for d in (args[1:] or (0, 1)))
    if own is None:
        return None
    return Channels({first: second, second: first}.get(own.dim, own.dim), own.labels)


def _sliced(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    """A part of another dimension than that of the channels."""
    own, rank = of(args[0]), args[0].dim()
    dim = (args[1] if len(args) > 1 else 0) % rank
    if own is None or (dim == own.dim and result.shape != args[0].shape):
        return None
    return Channels(own.dim - (result.dim() < rank and dim < own.dim), own.labels)


def _padded(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    own = of(args[0])
    same_width = own is not None and result.shape[own.dim] == args[0].shape[own.dim]
    if own is not None and not same_width:
        labels.pin(own.labels, "they are padded with further channels, as in a shortcut of type A")
    first = 2 * (args[0].dim() - 1 - own.dim) if own is not None else 0
    return own if same_width and not any(args[1][first : first + 2]) else None


def _expanded(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    own = of(args[0])
    place = None if own is None else own.dim + result.dim() - args[0].dim()
    return Channels(place, own.labels) if place is not None and result.shape[place] == len(own.labels) else None


def _joined(args: list[Any], result: Tensor, of: Any, labels: Labels) -> Channels | None:
    tensors, rank = args[0], result.dim()
    dim = (args[1] if len(args) > 1 else 0) % rank
    owns = [of(tensor) for tensor in tensors]
    place = next(own.dim for own in owns if own is not None)
    if any(own is not None and own.dim != place for own in owns):
        return None
    if dim == place:
        return Channels(dim, tuple(label for t, own in zip(tensors, owns, strict=True)
                                   for label in (own.labels if own else _fixed(labels, t.shape[dim]))))  # fmt: skip
    if None in owns:
        return None
    for own in owns[1:]:
        labels.unite(owns[0].labels, own.labels)
    return Channels(place, owns[0].labels)


def _fixed(labels: Labels, count: int) -> tuple[int, ...]:
    made = labels.fresh(count)
    labels.pin(made, "they are not made by a layer")
    return made


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("copy", "detach", "alias", "lift_fresh", "_to_copy", "hardswish", "dropout", "_prelu_kernel"), _pointwise
    ),
    **dict.fromkeys(
        ("view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "reshape", "flatten"), _shared_shape
    ),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "std", "var"), _reduced),
    **dict.fromkeys(("transpose", "t"), _transposed),
    **dict.fromkeys(("slice", "select"), _sliced),
    **dict.fromkeys(
        ("avg_pool2d", "max_pool2d_with_indices", "max_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d",
         "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
         "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "reflection_pad2d", "replication_pad2d"), _same_place
    ),
    "permute": _permuted,
    "constant_pad_nd": _padded,
    "expand": _expanded,
    "cat": _joined,
}  # fmt: skip
