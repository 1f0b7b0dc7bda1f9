"""What MaskLoRA and ScaledLoRA layers share: adapters, merging, forward.

The class is derived from those in `base_weight`, `saved_masks` and `used_by_others`, and the formulas are in
`functional`. `conv` and `parameter` derive classes for other kinds of weights.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from ..model.offload import is_offloaded, loaded_layer
from ..model.sharding import is_partitioned
from ..model.weights import stored_weight
from .base_weight import runs_alone
from .config import SparseLoraConfig
from .eight_bit import GradientDtype
from .functional import LINEAR, Operation, effective_weight, sparse_lora
from .kept_weight import KeepsWeight, KeptWeight, autocast_dtype, can_keep, needs_gradient
from .used_by_others import UsedByOthers, replaced


# The attributes that map names of adapters to plain values. PEFT deletes the entries of an adapter with the adapter.
STATE_NAMES = (
    "r", "lora_alpha", "scaling", "trained_scaling", "masking", "residual", "init_weights", "gradient_dtype",
)  # fmt: skip


@contextlib.contextmanager
def swapped(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Let the parameter `name` of `module` be `value` within the context. Nothing is trained meanwhile through it."""
    with replaced(module, name, nn.Parameter(value, requires_grad=False)):
        yield


class SparseLoraLayer(KeepsWeight, UsedByOthers):
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

    # `peft.helpers.disable_input_dtype_casting` switches it off.
    cast_input_dtype_enabled = True

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
        self.drop_kept_weight()
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
            ValueError: `safe_merge` is True and the merged weight holds NaN or infinity, or the adapters have
                different masks.
            TypeError: the base weight cannot be dequantised.
        """
        self._merge(safe_merge, adapter_names, keep=True)

    @torch.no_grad()
    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, keep: bool) -> None:
        """Merge adapters, as `merge` does. `keep` tells whether they can be unmerged."""
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        merged = self.merged_weight(self.merged_adapters + names)
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
        self._restore_unmerged()
        self.merged_adapters.clear()

    def restart(self) -> None:
        """Merge the active adapters permanently, and initialise A and B in place, as `init_weights` says.

        `init_weights=False` counts as True here, so that the layer computes the same after the restart.
        """
        self._merge(False, None, keep=False)
        self._unmerged_weight = self._unmerged_layer = None
        for name in self.merged_adapters:
            self.reset_parameters(name, self.init_weights[name])
        self.merged_adapters.clear()

    # -- forward -----------------------------------------------------------------------------------------------------

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

    def train(self, mode: bool = True) -> "SparseLoraLayer":
        """Set training mode, as `nn.Module.train` does. Each mode drops the effective weight kept in the other."""
        if mode:
            self._kept = None
        else:
            self._kept_in_training = None
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SparseLoraLayer":
        # Moves and casts call this.
        self.drop_kept_weight()
        super()._apply(fn, recurse)
        return self

    def write_weight(self, weight: Tensor) -> None:
        """Replace the base weight in place by `weight`, laid out as `read_weight` returns it.

        A quantised layer quantises `weight`.
        """
        self.drop_kept_weight()
        super().write_weight(weight)

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

    def _fuses(self, name: str) -> bool:
        """Return whether one matrix product gives the output of base weight and adapter together.

        Dropout and LoRA-Prune need two products, and so does a base layer that must itself be run.
        """
        return (
            not self._drops(name)
            and self.masking[name] == "always"
            and self.base_layer is self.get_base_layer()
            and self._readable()
            and self._is_plain()
        )

    def _drops(self, name: str) -> bool:
        """Return whether entries of the input of the adapter `name` are dropped now."""
        return self.training and isinstance(getattr(self, f"{self.prefix}dropout")[name], nn.Dropout)

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
