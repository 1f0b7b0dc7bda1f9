"""The forward pass that MaskLoRA and ScaledLoRA layers share.

The class is derived from those in `base_weight`, `saved_masks`, `used_by_others`, `adapters` and `keeping`, in this
order, and the formulas are in `functional`. `conv` and `parameter` derive classes for other kinds of weights.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from ..model.offload import is_offloaded, loaded_layer
from .base_weight import runs_alone
from .functional import LINEAR, Operation, sparse_lora
from .keeping import KeepsWeight
from .used_by_others import replaced


@contextlib.contextmanager
def swapped(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Let the parameter `name` of `module` be `value` within the context. Nothing is trained meanwhile through it."""
    with replaced(module, name, nn.Parameter(value, requires_grad=False)):
        yield


class SparseLoraLayer(KeepsWeight):
    """A base layer with adapters, which computes with its effective weight. Its arguments are as in `Adapters`."""

    # `peft.helpers.disable_input_dtype_casting` switches it off.
    cast_input_dtype_enabled = True

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the output of the layer with its effective weight.

        Args:
            x: (..., in).
            args: passed on to the base layer where the base layer itself is run.
            adapter_names: one name for each entry of the batch, "__base__" for no adapter. None uses the active
                adapters for the whole batch.
            kwargs: passed on to the base layer where the base layer itself is run.

        Returns:
            (..., out).

        Raises:
            ValueError: `adapter_names` has another length than the batch, adapters are merged while it is given, a
                saved mask contradicts the zeros of the base weight, active adapters have different masks, a
                weight has no values, or a gradient is needed of weights that accelerate has offloaded.
            TypeError: the base weight cannot be dequantised, and the adapter is not MaskLoRA with a saved mask.
        """
        kept = self._kept
        if kept is not None and adapter_names is None and kept.serves(self, x) and runs_alone(kept.places[0][2]):
            return self._with_weight(x, kept.weight)
        if self._unsettled or self._unproved:
            self.settle_masks()
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._present(self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        offloaded = self._offloaded(names, x)
        if offloaded:
            with contextlib.ExitStack() as loading:
                for module in offloaded:
                    loading.enter_context(loaded_layer(module))
                return self._forward_active(x, names, *args, **kwargs)
        if (kept := self._keep_weight(x, names)) is not None:
            return self._with_weight(x, kept.weight)
        return self._forward_active(x, names, *args, **kwargs)

    def _with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the output of the layer with this effective weight, where nothing else wraps the base layer."""
        return F.linear(x, weight, self._own_bias())

    def _own_bias(self) -> Tensor | None:
        """Return the bias of the base layer, which nothing wraps. PEFT's property `bias` takes longer."""
        base: Any = self._modules["base_layer"]
        try:
            bias: Tensor | None = base._parameters["bias"]
        except KeyError:
            # A parametrisation computes it.
            bias = base.bias
        return bias

    def _offloaded(self, names: list[str], x: Tensor) -> list[nn.Module]:
        """Return the modules that hold W, A and B, if accelerate loads their weights only when they are called."""
        modules = [self.get_base_layer(), *(factor[name] for name in names for factor in (self.A, self.B))]
        weights = [module._parameters.get("weight") for module in modules]
        if x.is_meta or not any(weight is not None and weight.is_meta for weight in weights):
            return []
        if not all(map(is_offloaded, modules)):
            raise ValueError(
                "The weights of an adapted layer, or A and B of its adapter, are on the meta device, which holds no "
                "values. If accelerate has offloaded the model, attach and load the adapter before that, and then "
                "offload the model with its adapter."
            )
        needs_gradient = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights)
        if needs_gradient or (torch.is_grad_enabled() and x.requires_grad):
            raise ValueError(
                "The weights of an adapted layer are on the meta device: accelerate has offloaded them, and drops "
                "them before backward. Run the model within `torch.no_grad()`, or merge the adapters before "
                "offloading, by `merge_and_unload()`, or load the model without offloading."
            )
        return modules

    def _forward_active(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self._computes_itself():
            return self._forward_unusual(x, names, *args, **kwargs)
        fused = [name for name in names if self._fuses(name)]
        separate = [name for name in names if name not in fused]
        if not fused:
            y = self._forward_base(x, names, *args, **kwargs)
        elif (rank_one := self._forward_rank_one(x, fused)) is not None:
            y = rank_one
        else:
            effective = self._weight_in_training(x, fused)
            y = self._product(x, fused, self._factors(fused), self.bias, effective)
        for name in separate:
            y = y + self._delta(x, name).to(y.dtype)
        return y

    def _forward_base(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base layer, with the base weight that the adapters `names` are to compute with."""
        layer = self.get_base_layer()
        if not self._is_narrower(names):
            return self.base_layer(x, *args, **kwargs)
        weight = self._as_stored(self.pruned_weight(names))
        if self.quantization_backend is not None:
            return self._operation().apply(self._prepared(x), self._matrix(weight).to(x.dtype), self.bias)
        # The layer itself runs, because it may do more than its product.
        with swapped(layer, "weight", weight):
            return self.base_layer(x, *args, **kwargs)

    def _forward_unusual(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of a base layer that has a forward pass of its own."""
        dropping = [name for name in names if self._drops(name)]
        together = [name for name in names if name not in dropping]
        y = self._forward_of_base(x, together, None, *args, **kwargs)
        for name in dropping:
            dropout = getattr(self, f"{self.prefix}dropout")[name]
            y = y + self._forward_of_base(x, [name], dropout, *args, **kwargs)
        return y

    def _prepared(self, x: Tensor) -> Tensor:
        """Return the input as `_operation` takes it."""
        return x

    def _forward_rank_one(self, x: Tensor, names: list[str]) -> Tensor | None:
        return None

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """Return what the adapter `name` adds to the output of the base layer."""
        x = getattr(self, f"{self.prefix}dropout")[name](x)
        A, B, c, s = self._factors([name])
        if self.masking[name] == "merge":
            return self._low_rank(x, A, B) * s
        return self._product(x, [name], (A, B, c - 1, s), None)

    def _low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, A.dtype)
        return F.linear(F.linear(x, A), B)

    def _product(
        self,
        x: Tensor,
        names: list[str],
        factors: tuple[Tensor, Tensor, float, float],
        bias: Tensor | None,
        effective: Tensor | None = None,
    ) -> Tensor:
        A, B, c, s = factors
        chosen = {self.gradient_dtype[name] for name in names}
        return sparse_lora(
            x, self._weight_source(names), A, B, bias, factor=self.factor, c=c, s=s, operation=self._operation(),
            gradient_dtype=chosen.pop() if len(chosen) == 1 else None, effective=effective,
        )  # fmt: skip

    def _operation(self) -> Operation:
        return LINEAR

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Return the output for a batch in which each sample has its own adapter.

        `adapter_names` has the name of one adapter for each sample. The name "__base__" stands for no adapter. The
        method has the name by which PEFT's table of capabilities recognises that a tuner can do this.
        """
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively. Give one name for each entry of the batch."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        order, parts = [], []
        for name in dict.fromkeys(adapter_names):
            rows = [index for index, wanted in enumerate(adapter_names) if wanted == name]
            part = x[rows]
            present = self._present([name])
            y = (
                self._forward_active(part, present, *args, **kwargs)
                if present
                else self.base_layer(part, *args, **kwargs)
            )
            order += rows
            parts.append(y)
        return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]

    def __repr__(self) -> str:
        return self.prefix.rstrip("_") + "." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
