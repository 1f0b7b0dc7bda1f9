"""Effective weights that other code computes with: an unusual base layer, or the module around the layer.

An adapted layer computes the product with its effective weight itself. That is not enough in two cases. A base layer
with a forward pass of its own may do more with its weight, such as a convolution that standardises it, and one with
hooks may change its inputs and outputs. And some modules read the weight of a layer in them and do not call the layer:
`torch.nn.MultiheadAttention`, and in evaluation mode `torch.nn.TransformerEncoderLayer`. Both get the effective weight
as a tensor, with its gradients.
"""

import contextlib
import dis
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from types import CodeType
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model.offload import is_offloaded
from ..model.sharding import is_partitioned
from ..model.weights import stored_weight
from .base_weight import is_hooked
from .functional import stacked_effective_weight
from .saved_masks import SavedMasks


# What code may ask about a weight without computing with it.
ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta", "is_cuda", "data_ptr"}


@functools.cache
def weights_read_by(kind: Hashable) -> frozenset[str]:
    """Return the names of the modules in a `kind` whose weight its forward pass reads, as in `self.out_proj.weight`.

    `kind` is a class of modules. Code that reads only the dtype, the device, the shape or the class of a weight does
    not count.
    """
    found: set[str] = set()
    known, waiting = set(), ["forward"]
    # The forward pass, in this class and in those it is derived from, and the methods that it may call.
    while waiting:
        name = waiting.pop()
        if name in known or (name != "forward" and hasattr(nn.Module, name)):
            continue
        known.add(name)
        for base in cast(type, kind).__mro__:
            code = getattr(inspect.unwrap(cast(Any, vars(base).get(name))), "__code__", None)
            if code is not None:
                found |= _weights_read_in(code)
                waiting += [called for called in code.co_names if hasattr(kind, called)]
    return frozenset(found)


def _weights_read_in(code: CodeType) -> set[str]:
    read = [None, None, *(instruction.argval for instruction in dis.get_instructions(code)), None]
    found = set()
    for i in range(2, len(read) - 2):
        owner, attribute, then = read[i : i + 3]
        asks = then in ABOUT or read[i - 2] == "isinstance"
        if attribute == "weight" and isinstance(owner, str) and not asks:
            found.add(owner)
    return found


class UsedByOthers(SavedMasks):
    """The effective weight of an adapted layer as a tensor, for code that computes with it in its own way.

    Args:
        base_layer: the layer to adapt, or another tuner's layer around it.
        quantization: what `peft.utils.get_quantization_kwargs` returns for the model.
    """

    # Whether the module around this layer reads `weight`, and may never call the layer.
    is_read_by_parent = False

    # Whether each sample of the batch has its own adapter now.
    _mixes = False

    # `SparseLoraLayer` defines these.
    masking: dict[str, Any]
    disable_adapters: bool
    merged: bool
    active_adapters: list[str]
    unmerge: Callable[[], None]
    _present: Callable[[list[str]], list[str]]
    _factors: Callable[[list[str]], tuple[Tensor, Tensor, float, float]]

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer. If the module around this layer reads it, the effective weight.

        The dropout of an adapter is not applied to what another module computes.

        Raises:
            ValueError: another module reads it for a batch in which each sample has its own adapter, or while
                accelerate has offloaded it.
        """
        stored: Tensor = super().weight
        if not self.is_read_by_parent:
            return stored
        if stored.is_meta and is_offloaded(self.get_base_layer()):
            raise ValueError(
                "Accelerate loads an offloaded weight when its layer is called, and another module reads the weight "
                "of this layer and does not call the layer, as `torch.nn.MultiheadAttention` does. Attach the "
                "adapter, and then offload the model with the class of that module in `preload_module_classes`."
            )
        if self._mixes:
            raise ValueError(
                "Mixed batches (`adapter_names`) are not supported for a layer whose weight another module reads, as "
                "`torch.nn.MultiheadAttention` does. Choose one adapter for the batch by `set_adapter`."
            )
        self.settle_masks()
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._present(self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            return stored
        return self.adapted_weight(names, stored)

    @contextlib.contextmanager
    def in_mixed_batch(self) -> Iterator[None]:
        """Within the context, each sample of the batch has its own adapter, and no one weight is the effective one."""
        self._mixes = True
        try:
            yield
        finally:
            self._mixes = False

    def adapted_weight(self, names: list[str], stored: Tensor) -> Tensor:
        """Return the effective weight of the adapters `names`, with gradients for A, B, and `stored` if it needs one.

        Args:
            names: the adapters.
            stored: the base weight, laid out as the layer stores it. The result has the same layout.
        """
        if self._is_narrower(names):
            stored = stored.masked_fill(~self._common_mask(names, stored), 0)
        weight = self._matrix(stored)
        masked = [name for name in names if self.masking[name] == "always"]
        if masked:
            A, B, c, s = self._factors(masked)
            weight = stacked_effective_weight(weight, A, B, self.factor, c, s)
        for name in names:
            if self.masking[name] == "merge":
                A, B, _, s = self._factors([name])
                weight = weight + (B @ A * s).to(weight.dtype)
        return self._as_stored(weight)

    def _computes_itself(self) -> bool:
        """Return whether the base layer must run with the effective weight.

        It has a forward pass of its own, or hooks that may change its inputs and outputs.
        """
        layer = self.get_base_layer()
        if self.quantization_backend is not None or self.base_layer is not layer or self._is_plain():
            return False
        weight = layer._parameters.get("weight")
        return weight is not None and not is_partitioned(weight)

    def _forward_of_base(
        self, x: Tensor, names: list[str], dropout: Callable[[Tensor], Tensor] | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the output of the base layer with the effective weight of the adapters `names`.

        Args:
            x: the input.
            names: the adapters. Without adapters it is the output with the base weight.
            dropout: what is applied to the input of the adapters. The result is then what they add to the output.
                None if nothing is dropped.
            args, kwargs: passed on to the base layer.
        """
        layer = self.get_base_layer()

        def run(x: Tensor) -> Tensor:
            with replaced(layer, "weight", self.adapted_weight(names, stored_weight(layer))):
                return self.base_layer(x, *args, **kwargs)

        if not names:
            return self.base_layer(x, *args, **kwargs)
        if dropout is not None:
            x = dropout(x)
        # Otherwise the effective weights of all layers would stay in memory until backward. But backward would run the
        # hooks of a user again.
        y: Tensor = run(x) if is_hooked(layer) else checkpoint(run, x, use_reentrant=False)
        return y if dropout is None else y - self.base_layer(x, *args, **kwargs)


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Let the parameter `name` of `module` be `value`, which may have a gradient function, within the context."""
    parameter = module._parameters[name]
    module._parameters[name] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters[name] = parameter
