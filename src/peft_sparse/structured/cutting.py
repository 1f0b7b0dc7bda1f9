"""Cuts rows, columns and experts out of weights, in such a way that they can be put back without a second copy."""

import contextlib
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


class Cuts:
    """A context in which rows and columns of layers are cut out. If it ends with an error, all of them are put back.

    The layers then have their old parameters: the same objects with their values, gradients and hooks. An optimizer
    that holds them goes on.

    Within the context an old parameter is empty, and only what was cut out is remembered, so that no weight is held
    twice. If the context ends without an error, the old parameters that anything else holds get their values back.
    """

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self._replaced: list[_Replaced] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.put_back()
            return
        # From here on the cut is final: an interrupt must not put back a part of the layers.
        self._undo.pop_all()
        while self._replaced:
            self._replaced.pop().release()

    def cut(self, layer: nn.Linear, dim: int, kept: Tensor) -> None:
        """Keep those rows (`dim` 0, with their biases) or columns (1) of a layer that are True in `kept`."""
        for name in ("weight", "bias") if dim == 0 and layer.bias is not None else ("weight",):
            self.cut_tensor(layer, name, dim, kept)
        self.set_existing(layer, {("out_features", "in_features")[dim]: int(kept.sum())})

    def cut_tensor(self, module: nn.Module, name: str, dim: int, kept: Tensor) -> None:
        """Keep those entries along `dim` of a parameter or buffer of `module` that are True in `kept`."""
        replaced = _Replaced(module, name, dim, kept)
        self._replaced.append(replaced)
        self._undo.callback(replaced.put_back)
        replaced.apply()

    def put_back(self) -> None:
        """Put back all that was changed so far."""
        self._undo.close()
        self._replaced.clear()

    def on_undo(self, undo: Callable[..., Any], *args: Any) -> None:
        """Call `undo` with `args` if the changes are put back."""
        self._undo.callback(undo, *args)

    def set_existing(self, module: nn.Module, values: dict[str, int]) -> None:
        """Set those attributes that `module` has as numbers."""
        for name, value in values.items():
            if isinstance(before := module.__dict__.get(name), int):
                self._undo.callback(setattr, module, name, before)
                setattr(module, name, value)


class _Replaced:
    """A parameter or buffer of a module, and the smaller one that takes its place.

    Args:
        layer: the module.
        name: its name in the module, such as "weight".
        dim: the dimension along which it is cut.
        kept: mask of the entries along `dim` that stay.
    """

    def __init__(self, layer: nn.Module, name: str, dim: int, kept: Tensor) -> None:
        old: Tensor = getattr(layer, name)
        self.layer, self.name, self.dim, self.old = layer, name, dim, old
        self.layout = torch.empty_like(old.detach(), device="meta")
        self.stays, self.goes = (mask.nonzero().squeeze(1).to(old.device) for mask in (kept, ~kept))
        new = old.detach().index_select(dim, self.stays)
        self.new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        self.removed = old.detach().index_select(dim, self.goes)

    def apply(self) -> None:
        setattr(self.layer, self.name, self.new)
        self.old.data = self.new.detach().new_empty(0)

    def put_back(self) -> None:
        self._fill(self.old)
        setattr(self.layer, self.name, self.old)

    def release(self) -> None:
        """Forget the old parameter, and give it its values if anything else holds it."""
        reference = weakref.ref(self.old)
        del self.old
        if (held := reference()) is not None:
            self._fill(held)

    def _fill(self, parameter: Tensor) -> None:
        whole = torch.empty_like(self.layout, device=self.removed.device)
        whole.index_copy_(self.dim, self.stays, self.new.detach())
        whole.index_copy_(self.dim, self.goes, self.removed)
        parameter.data = whole
