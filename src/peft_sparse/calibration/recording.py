"""Records how a model calls the blocks of a stack, so that the calls can be made again without the model.

The arguments of a call are trees of tuples, lists, dicts and dataclasses. A leaf that an earlier call of the stack
returned is replaced by a `Link` to it. All other leaves are constants, which must not depend on the stack.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Cache

from .inputs import tensors_in


@dataclass(frozen=True)
class Link:
    """Stands for a tensor that an earlier call returned.

    Args:
        call: number of the call, in the order in which the model makes the calls of a stack. -1 stands for a tensor
            that the model itself computed, such as the hidden states before the first block.
        leaf: number of the tensor among those of the call.
    """

    call: int
    leaf: int


@dataclass
class Call:
    """One call of a block. Leaves of the arguments are constants or links.

    Args:
        block: index of the block in its stack.
        args: the positional arguments.
        kwargs: the keyword arguments.
    """

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """All leaves of the arguments."""
        return leaves_of((self.args, self.kwargs))

    @property
    def links(self) -> list[Link]:
        """The links among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Link)]

    def filled(self, value_of: Callable[[Link], Tensor]) -> "Call":
        """Return the call with `value_of(link)` in the place of each link."""
        args, kwargs = map_leaves(lambda x: value_of(x) if isinstance(x, Link) else x, (self.args, self.kwargs))
        return Call(self.block, args, kwargs)


@dataclass(frozen=True)
class Returned:
    """What a block returned: a tree with its leaves, and tensors that it added to containers among its arguments.

    Args:
        tree: the return value.
        tensors: the tensors in it, and then those that the call added to the containers, in order.
    """

    tree: Any
    tensors: list[Tensor]


def map_leaves(function: Callable[[Any], Any], tree: Any, *, keep: bool = False) -> Any:
    """Return a copy of `tree` in which every leaf x is `function(x)`. Containers keep their types.

    Args:
        function: makes the new leaves.
        tree: tuples, lists, dicts and dataclasses, one in another.
        keep: whether a container in which no leaf changes is returned itself, and not a copy of it. What the callee
            writes into it is then seen by the caller.
    """
    inner = partial(map_leaves, function, keep=keep)
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        items = [inner(item) for item in tree]
        if keep and all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, MutableMapping):
        values = {key: inner(value) for key, value in tree.items()}
        if keep and all(values[key] is value for key, value in tree.items()):
            return tree
        mapped = copy.copy(tree)
        for key, value in values.items():
            mapped[key] = value
        return mapped
    if dataclasses.is_dataclass(tree) and not isinstance(tree, (type, Link)):
        fields = {field.name: inner(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
        if keep and all(value is getattr(tree, name) for name, value in fields.items()):
            return tree
        changed: Any = copy.copy(tree)
        for name, value in fields.items():
            object.__setattr__(changed, name, value)
        return changed
    return function(tree)


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves of `tree` in order."""
    leaves: list[Any] = []
    map_leaves(leaves.append, tree)
    return leaves


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of `tree` in order."""
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def tensors_out_of_sight(tree: Any) -> list[Tensor]:
    """Return the numbers that objects among the leaves of `tree` hold, of which this package sees no parts.

    Caches and modules are left out: what they hold is compared by what blocks return.
    """
    return [
        tensor
        for leaf in leaves_of(tree)
        if not isinstance(leaf, (Tensor, Cache, nn.Module, type)) and hasattr(leaf, "__dict__")
        for tensor in tensors_in(leaf)
        if tensor.is_floating_point()
    ]


def returned_by(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Returned:
    """Call `forward` and return what it returned and what it added to containers among its arguments."""
    before = {id(tensor) for tensor in tensors_of((args, kwargs))}
    tree = forward(*args, **kwargs)
    own = tensors_of(tree)
    added = [tensor for tensor in tensors_of((args, kwargs)) if id(tensor) not in before]
    known = {id(tensor) for tensor in own}
    return Returned(tree, own + [tensor for tensor in added if id(tensor) not in known])


class Links:
    """Knows the tensors that the calls of one batch returned.

    A tensor is known by its identity, and not any more after it was written to. An unknown tensor that equals one of
    the last call, which the present call does not take otherwise, counts as a copy of it.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int, Link]] = {}
        self._last: list[tuple[Any, int, Link]] = []
        # Held until the next call, so that copies can be compared with them.
        self._held: list[Tensor] = []

    def add(self, call: int, tensors: Iterable[Tensor]) -> None:
        """Note what call number `call` returned."""
        self._last, self._held = [], list(tensors)
        for leaf, tensor in enumerate(self._held):
            # A tensor that a call only passes on stays linked to the call that computed it.
            if not isinstance(self._link_or_leaf(tensor), Link):
                known = weakref.ref(tensor), version_of(tensor), Link(call, leaf)
                self._known[id(tensor)] = known
                self._last.append(known)

    def linked(self, tree: Any, copies: Collection[Link] | None = None) -> Any:
        """Return `tree` with links in the place of the tensors that calls returned.

        Args:
            tree: the arguments of a call.
            copies: the links of which copies may be among them. None allows all.
        """
        mapped = map_leaves(self._link_or_leaf, tree)
        used = {leaf for leaf in leaves_of(mapped) if isinstance(leaf, Link)}
        unused = [known for known in self._last if known[2] not in used and (copies is None or known[2] in copies)]
        return map_leaves(lambda leaf: _link_of_copy(leaf, unused), mapped) if unused else mapped

    def _link_or_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) in self._known:
            reference, version, link = self._known[id(leaf)]
            if reference() is leaf and version_of(leaf) == version:
                return link
        return leaf


def _link_of_copy(leaf: Any, returned: list[tuple[Any, int, Link]]) -> Any:
    for reference, version, link in returned if isinstance(leaf, Tensor) and leaf.is_floating_point() else ():
        original = reference()
        unchanged = original is not None and original is not leaf and version_of(original) == version
        if unchanged and original.dim() > 1 and same_values(original, leaf):
            return link
    return leaf


def version_of(tensor: Tensor) -> int:
    """Return a number that grows whenever `tensor` is written to; always 0 for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def same_values(old: Tensor, new: Tensor) -> bool:
    """Return whether two tensors have equal shapes, dtypes and values. They may be on different devices."""
    if (old.shape, old.dtype) != (new.shape, new.dtype) or isinstance(old, FakeTensor):
        # Tensors without values cannot be compared.
        return False
    return torch.equal(old, new.to(old.device))


def is_cache(value: Any) -> bool:
    """Return whether `value` is a key-value cache of Transformers."""
    return isinstance(value, Cache)


def last_uses(calls: Iterable[Call]) -> dict[Link, int]:
    """Return for each link the number of the last of `calls` that takes it."""
    return {link: number for number, call in enumerate(calls) for link in call.links}


def needed_for(calls: list[Call], wanted: Iterable[int], finished: set[int]) -> Iterator[int]:
    """Yield in order the numbers of the calls in `wanted`, and of the unfinished calls that these depend on."""
    needed: set[int] = set()
    waiting = list(wanted)
    while waiting:
        number = waiting.pop()
        if number >= 0 and number not in needed and number not in finished:
            needed.add(number)
            waiting += [link.call for link in calls[number].links]
    yield from sorted(needed)


def give_back(received: Any, own: Any, function: Callable[[Any], Any]) -> None:
    """Put into the containers of `own` what a call added to their copies in `received`, leaves as `function` says."""
    if isinstance(received, MutableMapping):
        for key, value in received.items():
            if key in own:
                give_back(value, own[key], function)
            else:
                own[key] = map_leaves(function, value)
    elif isinstance(received, (tuple, list)):
        for value, old in zip(received, own, strict=False):
            give_back(value, old, function)
        if isinstance(received, list) and len(received) > len(own):
            own += map_leaves(function, received[len(own) :])
