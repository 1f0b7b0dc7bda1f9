"""Observes the inputs of weights in the products that they take part in, whoever computes these."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..model.blocks import base_model
from ..model.own_forward import PRODUCTS
from ..model.weights import WeightView, patches_of


@dataclass(frozen=True)
class _Place:
    """Where a weight lies in memory, as a matrix (out, in)."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, matrix: Tensor, index: int = 0) -> "_Place":
        """Return the place of `matrix` (out, in), or of number `index` of a batch of matrices."""
        offset = int(matrix.storage_offset()) + (index * matrix.stride(0) if matrix.dim() > 2 else 0)
        return cls(offset, tuple(matrix.shape[-2:]), tuple(matrix.stride()[-2:]))


class ProductObserver(TorchDispatchMode):
    """Observes the inputs of weights in the products that they take part in, whoever computes these.

    A weight W (out, in) is recognised by its place in memory, also transposed, as a slice of a parameter, or as one of
    a batch of matrices. Products with a part of W, or over its outputs, are not observed.

    Args:
        weights: the weights, by name.
        observe: called as `observe(name, layer, inputs)` with inputs (..., in), or with the patches of a convolution.
    """

    def __init__(self, weights: dict[str, WeightView], observe: Callable[[str, nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.observe = observe
        self.weights = weights
        self.located: dict[int, tuple[Tensor, dict[_Place, str]]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Observe within the context."""
        layers = {id(weight.layer): weight.layer for weight in self.weights.values()}
        with contextlib.ExitStack() as undo:
            for layer in layers.values():
                # An adapter replaces the parameters of a module while the module runs.
                undo.callback(layer.register_forward_pre_hook(self._locate).remove)
            undo.enter_context(self)
            yield

    def locate_all(self) -> None:
        """Note where the weights are in memory now."""
        self.located.clear()
        for name, weight in self.weights.items():
            self._note(name, weight)

    def _locate(self, layer: nn.Module, args: Any) -> None:
        for name, weight in self.weights.items():
            if weight.layer is layer:
                self._note(name, weight)

    def _note(self, name: str, weight: WeightView) -> None:
        stored = weight.storage
        _, places = self.located.setdefault(stored.untyped_storage().data_ptr(), (stored, {}))
        places[_Place.of(weight.matrix())] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = PRODUCTS.get(func)
        if func is _CONVOLUTION:
            self._see_convolution(*args)
        elif operands is not None:
            left, right = args[operands], args[operands + 1]
            self._see(right.mT if func is not _LINEAR else right, left)
            if func is not _LINEAR:
                self._see(left, right.mT)
        return func(*args, **(kwargs or {}))

    def _see_convolution(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> None:
        """Report the patches of `inputs` if `weight` is one of the weights."""
        _, places = self.located.get(weight.untyped_storage().data_ptr(), (None, {}))
        name = places.get(_Place.of(weight.flatten(1))) if places and weight.dim() == 4 and not transposed else None
        if name is not None:
            rows = patches_of(inputs, tuple(weight.shape[2:]), dilation, tuple(padding), stride, groups)
            self.observe(name, self.weights[name].layer, rows)

    def _see(self, weight: Tensor, inputs: Tensor) -> None:
        """Report `inputs` (..., in) if `weight` (..., out, in) is one of the weights, or a batch of them."""
        known = self.located.get(weight.untyped_storage().data_ptr())
        if known is None or weight.dim() < 2:
            return
        places = known[1]
        if weight.dim() == 2 or weight.stride(0) == 0 or weight.shape[0] == 1:
            name = places.get(_Place.of(weight))
            if name is not None:
                self.observe(name, self.weights[name].layer, inputs)
            return
        for index in range(weight.shape[0]):
            name = places.get(_Place.of(weight, index))
            if name is not None:
                # Where every expert multiplies all tokens, those that it was not chosen for are zero.
                own = inputs[index]
                self.observe(name, self.weights[name].layer, own[own.any(-1)])


_LINEAR, _CONVOLUTION = torch.ops.aten.linear.default, torch.ops.aten.convolution.default


@contextlib.contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Multiply by one expert after the other; a grouped kernel would not show the inputs of a single expert."""
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel):
        yield
        return
    before = inner.get_experts_implementation()
    inner.set_experts_implementation("eager")
    try:
        yield
    finally:
        inner.set_experts_implementation(before)
