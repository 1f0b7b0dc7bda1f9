"""The layer that MaskLoRA puts around a pruned one."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from ..functional import mask_lora_linear, masked_weight
from ..masks import mask_of
from ..weights import as_matrix, as_stored, stored_weight
from .config import MaskLoRAConfig


class MaskLoraLayer(BaseTunerLayer):
    """State of MaskLoRA around one base layer: A and B by adapter name, and, while merged, the weight before."""

    adapter_layer_names = ("mask_lora_A", "mask_lora_B")
    other_param_names = ("r", "lora_alpha", "scaling")

    # Types of what PEFT defines, which a type checker otherwise takes for any attribute of a module.
    base_layer: nn.Module
    active_adapters: list[str]
    bias: Tensor | None
    get_base_layer: Callable[[], nn.Module]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.mask_lora_A = nn.ModuleDict()
        self.mask_lora_B = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: MaskLoRAConfig) -> None:
        """Add the adapter `adapter_name`, or replace it."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        # Modules rather than bare parameters: PEFT's hotswap and FSDP's wrapping look for them.
        self.mask_lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.mask_lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=False)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, start_at_base_weight: bool = True) -> None:
        """Draw A as `nn.Linear` does; B is zero, or drawn too if `start_at_base_weight` is False."""
        nn.init.kaiming_uniform_(stored_weight(self.mask_lora_A[adapter_name]), a=math.sqrt(5))
        if start_at_base_weight:
            nn.init.zeros_(stored_weight(self.mask_lora_B[adapter_name]))
        else:
            nn.init.kaiming_uniform_(stored_weight(self.mask_lora_B[adapter_name]), a=math.sqrt(5))

    def pruned_weight(self) -> Tensor:
        """Return the base weight as a matrix (out, in), as it was before any merge: its zeros are the mask."""
        stored = self.get_base_weight() if self._unmerged_weight is None else self._unmerged_weight
        return as_matrix(self.get_base_layer(), stored)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s · M ⊙ (BA) of `adapter`, laid out as the base weight, in the adapter's dtype."""
        A, B, scaling = self._factors([adapter])
        delta = (B @ A).mul_(scaling)
        return as_stored(self.get_base_layer(), delta.masked_fill_(~mask_of(self.pruned_weight().to(delta.device)), 0))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """M ⊙ (BA) has no low rank."""
        return False

    def _factors(self, names: list[str]) -> tuple[Tensor, Tensor, float]:
        """Return A, B, s of the sum of the named adapters: several adapters are one of the rank of all together."""
        A = [stored_weight(self.mask_lora_A[name]) for name in names]
        B = [stored_weight(self.mask_lora_B[name]) for name in names]
        if len(names) == 1:
            return A[0], B[0], self.scaling[names[0]]
        return torch.cat(A), torch.cat([b * self.scaling[name] for b, name in zip(B, names, strict=True)], dim=1), 1.0


class MaskLoraLinear(nn.Module, MaskLoraLayer):
    """y = x (W + s · M ⊙ (BA))^T + b around an `nn.Linear` or a transformers `Conv1D`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: MaskLoRAConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        MaskLoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.mask_lora_A]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        A, B, scaling = self._factors(names)
        return mask_lora_linear(x, self.pruned_weight(), A, B, self.bias, scaling)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W + s · M ⊙ (BA) into the base layer: every zero of W stays zero. Computed in the adapter's dtype.

        W is kept aside, on the CPU, until `unmerge`.

        Args:
            safe_merge: raise a ValueError instead of writing a weight that is not finite.
            adapter_names: what to merge, by default the active adapters.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mask_lora_A]
        if not names:
            return
        base = self.get_base_layer()
        weight = self.pruned_weight().to(stored_weight(self.mask_lora_A[names[0]]).device)
        merged = masked_weight(weight, *self._factors(self.merged_adapters + names))
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        if self._unmerged_weight is None:
            self._unmerged_weight = self.get_base_weight().cpu().clone()
        self.set_base_weight(as_stored(base, merged).contiguous())
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back bit for bit."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_base_weight(self._unmerged_weight.to(stored_weight(self.get_base_layer()).device))
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "mask_lora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
