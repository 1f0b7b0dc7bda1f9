"""Layers keep their effective weights between calls: in evaluation, and on request in training on a CPU.

Without it, every token that is generated would compute the effective weight of every layer anew.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..model.sharding import is_partitioned
from ..model.weights import stored_weight
from .adapters import Adapters
from .config import SparseLoraConfig
from .functional import effective_weight
from .kept_weight import KeptWeight, autocast_dtype, can_keep, needs_gradient


class KeepsWeight(Adapters):
    """A base layer with adapters that keeps its effective weight between calls. Its arguments are as in `Adapters`."""

    # Set by `keep_effective_weights`.
    keeps_effective_weight: bool = True
    keeps_in_training: bool = False
    _kept: KeptWeight | None = None
    # A weight of its own, because `Trainer` calls `train()` before each step.
    _kept_in_training: KeptWeight | None = None

    def drop_kept_weight(self) -> None:
        """Free the effective weight that the layer keeps between calls. The next call computes it anew."""
        if self._kept is not None:
            self._kept = None
        if self._kept_in_training is not None:
            self._kept_in_training = None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: SparseLoraConfig) -> None:
        self.drop_kept_weight()
        super().update_layer(adapter_name, r, lora_alpha, config)

    def _keep_weight(self, x: Tensor, names: list[str]) -> KeptWeight | None:
        """Compute the effective weight of the adapters `names`, keep it for later calls, and return it.

        Return None if it must not be kept: in training, if the call with the input `x` needs a gradient, if
        `keep_effective_weights` has switched it off, or if the base weight is quantised or split among processes.
        """
        self._kept = None
        if self.training or not self.keeps_effective_weight or not self._is_one_product(names):
            return None
        self._kept = self._kept_for(x, names, self._dtype_of_autocast(x))
        return self._kept

    def _kept_for(self, x: Tensor, names: list[str], dtype: torch.dtype | None) -> KeptWeight | None:
        """Return the effective weight of the adapters `names`, cast to `dtype` unless that is None.

        Return None if it must not be kept, whatever the mode: the base weight is quantised or split among processes,
        or a gradient of A, B or `x` is needed in evaluation mode.
        """
        base, layer = self.stored_parameter(), self.get_base_layer()
        if base is None or self.quantization_backend is not None or is_partitioned(base):
            return None
        factors = [(pair._modules, name, pair[name]) for name in names for pair in (self.A, self.B)]
        tensors = [(module._parameters, "weight", stored_weight(module)) for _, _, module in factors]
        sources = [base, *(tensor for _, _, tensor in tensors)]
        if not can_keep(x, sources) or (not self.training and torch.is_grad_enabled() and needs_gradient(x, sources)):
            return None
        weight = self._effective_weight(names)
        return KeptWeight(
            weight.to(dtype or weight.dtype),
            [(self._modules, "base_layer", self.base_layer), *factors],
            [(layer._parameters, getattr(self, "parameter_name", "weight"), base), *tensors],
            copy.copy(self._active_adapter),
            {name: self.scaling[name] for name in names},
            autocast_dtype(x),
        )

    def _weight_in_training(self, x: Tensor, names: list[str]) -> Tensor | None:
        """Return the effective weight that the layer keeps in training. None if it keeps none."""
        if not (self.keeps_in_training and self.training and x.device.type == "cpu") or torch.compiler.is_compiling():
            return None
        kept = self._kept_in_training
        if kept is None or not kept.trains(self, names):
            kept = self._kept_in_training = self._kept_for(x, names, None)
        return None if kept is None else kept.weight

    def bytes_in_training(self) -> int:
        """Return the bytes of an effective weight that the layer can keep in training. 0 means that it cannot."""
        base = self.stored_parameter()
        if base is None or self.quantization_backend is not None or is_partitioned(base) or base.device.type != "cpu":
            return 0
        return base.numel() * base.element_size()

    def _dtype_of_autocast(self, x: Tensor) -> torch.dtype | None:
        """Return the dtype to which autocast would cast the effective weight in each call, or None."""
        return autocast_dtype(x)

    def _effective_weight(self, names: list[str]) -> Tensor:
        """Return the effective weight as `_operation` takes it."""
        A, B, c, s = self._factors(names)
        return effective_weight(self.pruned_weight(names), A, B, self.factor, c, s)

    def _is_one_product(self, names: Iterable[str]) -> bool:
        """Return whether one product with an effective weight gives the output of the layer."""
        return all(self._fuses(name) for name in names)

    def train(self, mode: bool = True) -> "KeepsWeight":
        """Set training mode, as `nn.Module.train` does. Each mode drops the effective weight kept in the other."""
        if mode:
            self._kept = None
        else:
            self._kept_in_training = None
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "KeepsWeight":
        # Moves and casts call this.
        self.drop_kept_weight()
        super()._apply(fn, recurse)
        return self

    def write_weight(self, weight: Tensor) -> None:
        """Replace the base weight in place by `weight`, laid out as `read_weight` returns it.

        A quantised layer quantises `weight`.
        """
        self.drop_kept_weight()
        for layer in self._beside:
            cast(KeepsWeight, layer).drop_kept_weight()
        super().write_weight(weight)


def keep_effective_weights(model: nn.Module, keep: bool = True, training_bytes: int = 0) -> None:
    """Choose whether the MaskLoRA and ScaledLoRA layers of `model` keep their effective weights between calls.

    By default they do. A layer in evaluation mode then computes its effective weight once, and again when W, A, B, the
    scaling, the active adapters, the device or the dtype change, as long as no gradient is needed. Generation with
    unmerged adapters takes about as long as with merged ones. The price is the memory of one copy of all adapted
    weights. Training drops the copies. Quantised weights and weights that are split among processes are not kept.

    On a GPU a write into the memory of W, A or B through `.data` is not seen. On a CPU it is seen when the layer is
    next called with more than one row of inputs, unless it changes only few entries. Write to the parameter
    within `torch.no_grad()` instead, or call this function again afterwards: it drops what was kept.

    On a CPU the effective weights may be kept in training too, which `training_bytes` allows. Then backward does not
    compute them again, nor do the further forward passes until the next optimiser step: gradient accumulation,
    checkpointing. Gradients stay the same.

    Args:
        model: a model with adapters.
        keep: False computes the effective weight in every call in evaluation mode.
        training_bytes: the most bytes of effective weights that are kept in training. Layers are taken in their order
            in the model, as long as they fit. Weights on a GPU, quantised ones, weights that are split among
            processes, and `target_parameters` are left out.

    Raises:
        ValueError: `training_bytes` is negative.
    """
    if training_bytes < 0:
        raise ValueError(
            f"`training_bytes` must not be negative, got {training_bytes}. Use 0 to keep nothing in training."
        )
    for module in model.modules():
        if isinstance(module, KeepsWeight):
            module.keeps_effective_weight = keep
            module.drop_kept_weight()
            needed = module.bytes_in_training() if training_bytes else 0
            module.keeps_in_training = 0 < needed <= training_bytes
            training_bytes -= needed if module.keeps_in_training else 0
