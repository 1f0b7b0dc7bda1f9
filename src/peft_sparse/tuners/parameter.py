"""Adapters on a bare parameter: fused experts (experts, out, in), or a 2-D parameter (out, in).

The field `target_parameters` of a configuration chooses the parameters. The class is derived from the one in `layer`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..model.sharding import whole_shape
from ..model.weights import stored_weight
from .config import SparseLoraConfig
from .layer import SparseLoraLayer, swapped


class ParameterMixin(SparseLoraLayer):
    """Adapters on one parameter of the module that they wrap.

    While the module runs, its parameter is the effective weight. The module may compute anything with it, so autograd
    keeps the effective weight until backward. Every expert has an A and a B of its own. They are stored as PEFT's LoRA
    stores them: A (experts · r, in) and B (out, r · experts).

    Args:
        base_layer: the module that holds the parameter, or another wrapper around it.
        adapter_name: name of the first adapter.
        r: its rank.
        lora_alpha: its numerator of the scaling s.
        config: its configuration.
        parameter_name: name of the parameter in the module.
        kwargs: what `peft.utils.get_quantization_kwargs` returns for the model.

    Raises:
        ValueError: the parameter has neither 2 nor 3 dimensions, or `lora_dropout` is not 0.
    """

    parameter_name: str
    stored_shape: tuple[int, ...]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: SparseLoraConfig,
        parameter_name: str,
        **kwargs: Any,
    ) -> None:
        # Set in `__dict__`, because the constructors of the base classes read both before nn.Module is initialised.
        # The shape is kept, because reading the parameter inside its parametrisation would start it again.
        owner = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        parameter = getattr(owner, parameter_name)
        self.__dict__["parameter_name"] = parameter_name
        self.__dict__["stored_shape"] = tuple(whole_shape(parameter))
        if config.lora_dropout:
            raise ValueError(
                f"`lora_dropout` must be 0 for `target_parameters`, got {config.lora_dropout}. The inputs of a bare "
                "parameter cannot be dropped. Set `lora_dropout=0`."
            )
        super().__init__(base_layer, adapter_name, r, lora_alpha, config, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the wrapped module without its adapters. PEFT calls this for `unload` and `merge_and_unload`.

        Args:
            merge: merge the adapters of all wrapped parameters first.
            safe_merge: check each merged weight before it is written.
            adapter_names: names of the adapters to merge. None merges the active adapters.

        Raises:
            ValueError: `safe_merge` is True and a merged weight holds NaN or infinity.
        """
        layer: nn.Module = self
        while isinstance(layer, ParameterMixin):
            if merge:
                layer._merge(safe_merge, adapter_names, keep=False)
            layer = layer.base_layer
        return layer

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Run the wrapped module with the effective weight in the place of its parameter.

        Args:
            args, kwargs: passed on to the module.
            adapter_names: must be None.

        Returns:
            What the module returns.

        Raises:
            ValueError: `adapter_names` is given, a saved mask contradicts the zeros of the base weight, or active
                adapters have different masks.
        """
        if adapter_names is not None:
            raise ValueError(
                "Mixed batches (`adapter_names`) are not supported with `target_parameters`. Choose one adapter for "
                "the batch by `set_adapter`."
            )
        if self._unsettled or self._unproved:
            self.settle_masks()
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._present(self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(*args, **kwargs)
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with self._effective(names, inputs):
            return self.base_layer(*args, **kwargs)

    @contextlib.contextmanager
    def _effective(self, names: list[str], inputs: list[Tensor]) -> Iterator[None]:
        owner, parameter = self.get_base_layer(), self._parameter()
        first = next((x for x in inputs if x.requires_grad), inputs[0] if inputs else parameter)
        kept = self._kept
        if kept is None or not kept.serves(self, first):
            kept = self._keep_weight(first, names)
        if kept is not None:
            with swapped(owner, self.parameter_name, kept.weight):
                yield
            return
        requires_grad = parameter.requires_grad
        parametrize.register_parametrization(owner, self.parameter_name, _EffectiveParameter(self, names))
        parameter.requires_grad_(requires_grad)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(owner, self.parameter_name, leave_parametrized=False)

    def _is_one_product(self, names: Iterable[str]) -> bool:
        return True

    def _dtype_of_autocast(self, x: Tensor) -> torch.dtype | None:
        # The module that owns the parameter decides what autocast does with it.
        return None

    @torch.no_grad()
    def _effective_weight(self, names: list[str]) -> Tensor:
        return _EffectiveParameter(self, names)(self.read_weight()).contiguous()

    def bytes_in_training(self) -> int:
        """Return 0: the module that owns the parameter may compute anything with the effective weight."""
        return 0

    def stored_parameter(self) -> Tensor | None:
        """Return the parameter, or None if another wrapper computes it."""
        return self.get_base_layer()._parameters.get(self.parameter_name)

    # -- how the weight is stored ------------------------------------------------------------------------------------

    def _parameter(self) -> Tensor:
        return getattr(self.get_base_layer(), self.parameter_name)

    def _shape(self) -> tuple[int, int, int]:
        """Return (experts, out, in), with one expert for a 2-D parameter."""
        shape = self.stored_shape
        if len(shape) == 2:
            return 1, shape[0], shape[1]
        if len(shape) != 3:
            raise ValueError(
                f"`target_parameters` needs parameters of 2 or 3 dimensions, got {self.parameter_name!r} of shape "
                f"{shape}. Leave it out."
            )
        experts, rows, columns = shape
        return (experts, columns, rows) if self._transposed() else (experts, rows, columns)

    def _transposed(self) -> bool:
        # The attribute of transformers' experts that are stored as (experts, in, out).
        return bool(getattr(self.get_base_layer(), "is_transposed", False))

    def _features(self) -> tuple[int, int]:
        _, rows, columns = self._shape()
        return columns, rows

    def _factor_features(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        experts, rows, columns = self._shape()
        return (columns, experts * r), (experts * r, rows)

    def _factors(self, names: list[str]) -> tuple[Tensor, Tensor, float, float]:
        A, B, c, s = super()._factors(names)
        experts, rows, columns = self._shape()
        if len(self.stored_shape) == 2:
            return A, B, c, s
        # As in PEFT's LoRA, A (experts · r, in) has the expert as the slower index, and B (out, r · experts) has it as
        # the faster one. The adapters are concatenated.
        ranks = [self.r[name] for name in names]
        sizes = [experts * r for r in ranks]
        per_expert_A = [a.view(experts, r, columns) for a, r in zip(A.split(sizes), ranks, strict=True)]
        per_expert_B = [
            b.reshape(rows, r, experts).permute(2, 0, 1) for b, r in zip(B.split(sizes, 1), ranks, strict=True)
        ]
        return torch.cat(per_expert_A, 1), torch.cat(per_expert_B, 2), c, s

    def read_weight(self) -> Tensor:
        """Return the parameter, detached: (out, in), or all experts as they are stored. It shares memory."""
        return self._parameter().data

    def write_weight(self, weight: Tensor) -> None:
        """Replace the parameter in place by `weight`, laid out as `read_weight` returns it."""
        self.drop_kept_weight()
        self._parameter().data.copy_(weight)

    def _matrix(self, stored: Tensor) -> Tensor:
        return stored.mT if stored.dim() == 3 and self._transposed() else stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return self._matrix(matrix)

    def _readable(self) -> bool:
        return True

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        parameter = self._parameter()
        for factors in (self.A, self.B):
            if not stored_weight(factors[adapter_name]).is_meta:
                factors[adapter_name].to(device or parameter.device, dtype=parameter.dtype)


class _EffectiveParameter(nn.Module):
    """The parametrisation that computes the effective weight in the place of the parameter."""

    def __init__(self, layer: ParameterMixin, names: list[str]) -> None:
        super().__init__()
        # The wrapper is in a tuple, because a plain attribute would make it a submodule of the module that it wraps.
        self.layer = (layer, names)

    def forward(self, stored: Tensor) -> Tensor:
        layer, names = self.layer
        return layer.adapted_weight(names, stored)
