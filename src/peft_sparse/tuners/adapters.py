"""The adapters of one layer: the A, B and scaling of each, and how they are merged into the base weight."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..model.weights import stored_weight
from .config import SparseLoraConfig
from .eight_bit import GradientDtype
from .functional import effective_weight
from .used_by_others import UsedByOthers


# The attributes that map names of adapters to plain values. PEFT deletes the entries of an adapter with the adapter.
STATE_NAMES = (
    "r", "lora_alpha", "scaling", "trained_scaling", "masking", "residual", "init_weights", "gradient_dtype",
)  # fmt: skip


class Adapters(UsedByOthers):
    """A base layer with adapters. Each adapter has a name, an A (r, in) and a B (out, r).

    The effective weight is c · W + s · H ⊙ (BA). For MaskLoRA, H is the mask of W. For ScaledLoRA, H is W. c is 1, or
    1 - s for a ScaledLoRA adapter with `residual=False`. The delta weights of several active adapters are added up.

    Args:
        base_layer: the layer to adapt, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        r: its rank.
        lora_alpha: its numerator of the scaling s.
        config: its configuration.
        quantization: what `peft.utils.get_quantization_kwargs` returns for the model.
    """

    # PEFT defines these. Without declared types a type checker takes them for tensors or modules.
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: SparseLoraConfig,
        **quantization: Any,
    ) -> None:
        super().__init__(base_layer, **quantization)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.trained_scaling: dict[str, float] = {}
        self.masking: dict[str, Literal["always", "merge"]] = {}
        self.residual: dict[str, bool] = {}
        self.init_weights: dict[str, bool | Literal["paper"]] = {}
        self.gradient_dtype: dict[str, GradientDtype | None] = {}
        for name in ("A", "B", "dropout"):
            setattr(self, self.prefix + name, nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    @property
    def A(self) -> nn.ModuleDict:
        """The A of every adapter, by adapter name: linear layers whose weight is A (r, in)."""
        return getattr(self, f"{self.prefix}A")

    @property
    def B(self) -> nn.ModuleDict:
        """The B of every adapter, by adapter name: linear layers whose weight is B (out, r)."""
        return getattr(self, f"{self.prefix}B")

    # -- adapters ----------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: SparseLoraConfig) -> None:
        """Add an adapter, or replace the one of this name.

        Args:
            adapter_name: name of the adapter.
            r: its rank in this layer.
            lora_alpha: its numerator of the scaling s in this layer.
            config: its configuration.
        """
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.trained_scaling[adapter_name] = self.scaling[adapter_name]
        self.masking[adapter_name] = getattr(config, "masking", "always")
        self.residual[adapter_name] = getattr(config, "residual", True)
        self.gradient_dtype[adapter_name] = config.gradient_dtype
        # False is for tests. A restart begins at the function that was merged.
        self.init_weights[adapter_name] = config.init_weights or True
        columns, rows = self._factor_features(r)
        # Modules and not bare parameters, because PEFT's hotswap and FSDP's wrapping look for modules.
        self.A[adapter_name] = nn.Linear(*columns, bias=False)
        self.B[adapter_name] = nn.Linear(*rows, bias=False)
        for factor in (self.A[adapter_name], self.B[adapter_name]):
            # Transformers initialises modules without this mark anew, with values that have an effect.
            vars(factor)["_is_hf_initialized"] = True
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        getattr(self, f"{self.prefix}dropout")[adapter_name] = dropout
        # Only the configuration of a saved adapter has fingerprints. Layers that its file lacks have no effect then.
        self.reset_parameters(adapter_name, config.init_weights or bool(config.mask_fingerprints))
        self.add_saved_mask(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool | Literal["paper"]) -> None:
        """Draw A and B anew.

        Args:
            adapter_name: name of the adapter.
            init_weights: True draws A as LoRA does and sets B to zero. False draws both.
        """
        nn.init.kaiming_uniform_(stored_weight(self.A[adapter_name]), a=math.sqrt(5))
        B = stored_weight(self.B[adapter_name])
        if init_weights:
            nn.init.zeros_(B)
        else:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    def _factor_features(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the (input, output) features of the modules A and B."""
        return (self.in_features, r), (r, self.out_features)

    def _factors(self, names: list[str]) -> tuple[Tensor, Tensor, float, float]:
        """Return A, B, c, s of one adapter that equals the sum of the named ones. Its rank is the sum of theirs."""
        A = [stored_weight(self.A[name]) for name in names]
        B = [stored_weight(self.B[name]) for name in names]
        scalings = [self.scaling[name] for name in names]
        c = 1.0 - sum(s for name, s in zip(names, scalings, strict=True) if not self.residual[name])
        if len(names) == 1:
            return A[0], B[0], c, scalings[0]
        return torch.cat(A), torch.cat([b * s for b, s in zip(B, scalings, strict=True)], dim=1), c, 1.0

    def _present(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.A]

    def _fuses(self, name: str) -> bool:
        """Return whether one matrix product gives the output of base weight and adapter together.

        Dropout and LoRA-Prune need two products, and so do a base layer that must itself be run and one into which
        another layer has merged its adapters.
        """
        return (
            not self._drops(name)
            and self.masking[name] == "always"
            and self.base_layer is self.get_base_layer()
            and not (self._beside and self._merged_beside())
            and self._readable()
            and self._is_plain()
        )

    def _drops(self, name: str) -> bool:
        """Return whether entries of the input of the adapter `name` are dropped now."""
        return self.training and isinstance(getattr(self, f"{self.prefix}dropout")[name], nn.Dropout)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling s of an adapter to `scale` times the s of its configuration.

        Args:
            adapter: name of the adapter. A name that this layer does not have is ignored.
            scale: the factor.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.trained_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling s of every active adapter by `scale`."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling s of every active adapter by `scale`. None restores the s of the configuration."""
        for name in self._present(self.active_adapters):
            self.scaling[name] = self.trained_scaling[name] if scale is None else self.scaling[name] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: the update H ⊙ (BA) has no low rank, so no LoRA adapter equals it."""
        return False

    # -- merging -----------------------------------------------------------------------------------------------------

    def merged_weight(self, names: list[str]) -> Tensor:
        """Return the base weight (out, in) with the named adapters merged. The layer stays as it is."""
        A, B, c, s = self._factors(names)
        return effective_weight(self.pruned_weight(names).to(A.device), A, B, self.factor, c, s)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the delta weight: what merging one adapter adds to the base weight.

        Args:
            adapter: name of the adapter.

        Returns:
            A tensor laid out as the layer stores its weight, in the adapter's dtype.
        """
        A, B, c, s = self._factors([adapter])
        weight = self.pruned_weight([adapter]).to(A.device, A.dtype)
        delta = effective_weight(weight, A, B, self.factor, c - 1, s)
        if self._is_narrower([adapter]):
            delta += weight - self.pruned_weight().to(weight)
        return self._as_stored(delta)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight, in place. Every zero stays zero.

        The merged weight is computed in the adapter's dtype and rounded once to the dtype of the base weight. A
        quantised base weight is quantised again. A copy of the base weight before the merge is kept until `unmerge`:
        on the CPU, or for a quantised layer on its device.

        Args:
            safe_merge: check the merged weight before it is written.
            adapter_names: names of the adapters to merge. None merges the active adapters.

        Raises:
            ValueError: `safe_merge` is True and the merged weight holds NaN or infinity, the adapters have different
                masks, or an adapter of another method is merged already.
            TypeError: the base weight cannot be dequantised.
        """
        self._merge(safe_merge, adapter_names, keep=True)

    @torch.no_grad()
    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, keep: bool) -> None:
        """Merge adapters, as `merge` does. `keep` tells whether they can be unmerged."""
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if foreign := self._foreign_merged():
            raise ValueError(
                f"A {type(foreign[0]).__name__} has merged its adapter into the same weight, and its zeros are gone. "
                "Call `unmerge_adapter()` first. Merge all adapters together, by `merge_adapter` of the model."
            )
        merged = self.merged_weight(self.merged_adapters + names)
        if self._merged_beside():
            # What the others have added is in the base weight. This layer adds its own update.
            before = self.merged_weight(self.merged_adapters) if self.merged_adapters else self.pruned_weight()
            merged += self._matrix(self.read_weight()).to(merged) - before.to(merged)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken. Train it again, or "
                "load an earlier checkpoint."
            )
        if keep:
            self._keep_unmerged()
        self._leave_others()
        self.write_weight(self._as_stored(merged))
        self.merged_adapters.extend(names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer without its adapters. PEFT calls this for `unload` and `merge_and_unload`.

        Args:
            merge: merge the adapters first. The base weight before the merge is not kept.
            safe_merge: check the merged weight before it is written.
            adapter_names: names of the adapters to merge. None merges the active adapters.

        Raises:
            ValueError: `safe_merge` is True and the merged weight holds NaN or infinity, or the adapters have
                different masks.
            TypeError: the base weight cannot be dequantised.
        """
        if merge:
            self._merge(safe_merge, adapter_names, keep=False)
        return self.get_base_layer()

    def unmerge(self) -> None:
        """Restore the base weight from before the merge, bit for bit."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        # Each copy was made before the next merge, so that the last merge is undone first.
        for foreign in self._foreign_merged():
            foreign.unmerge()
        last_first = sorted(self._merged_beside(), key=lambda layer: -layer._merge_rank)
        for layer in [*(layer for layer in last_first if layer._merge_rank > self._merge_rank), self]:
            layer._restore_unmerged()
            layer.merged_adapters.clear()

    def restart(self) -> None:
        """Merge the active adapters permanently, and initialise A and B in place, as `init_weights` says.

        `init_weights=False` counts as True here, so that the layer computes the same after the restart.
        """
        self._merge(False, None, keep=False)
        self._unmerged_weight = self._unmerged_layer = None
        for name in self.merged_adapters:
            self.reset_parameters(name, self.init_weights[name])
        self.merged_adapters.clear()
