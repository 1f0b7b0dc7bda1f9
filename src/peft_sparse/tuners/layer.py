"""What MaskLoRA and ScaledLoRA layers share: state, forward, merging. The formulas are in `functional`."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from ..functional import LINEAR, Convolution, Factor, Operation, Weight, effective_weight, sparse_lora
from ..masks import mask_of, pack, unpack
from ..weights import as_matrix, as_stored, stored_weight
from .config import SparseLoraConfig


# A dense checkpoint has a few zeros: below this share a weight is not called pruned, and zeros that an adapter's saved
# mask keeps are no contradiction.
STRAY_ZEROS = 0.01

# What a layer remembers of each adapter beside its tensors; PEFT deletes it with the adapter.
STATE_NAMES = ("r", "lora_alpha", "scaling", "trained_scaling", "masking", "gradient_tokens")


class SparseLoraLayer(nn.Module, BaseTunerLayer):
    """Adapters around one base layer: A and B by adapter name, and, while merged, the weight before.

    The mask is what the zeros of the base weight spell; nothing is stored, unless `save_mask` asked for it.
    """

    prefix: str
    factor: Factor

    # Types of what PEFT defines, which a type checker otherwise takes for any attribute of a module.
    base_layer: nn.Module
    active_adapters: list[str]
    bias: Tensor | None
    get_base_layer: Callable[[], nn.Module]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: SparseLoraConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.trained_scaling: dict[str, float] = {}
        self.masking: dict[str, Literal["always", "merge"]] = {}
        self.gradient_tokens: dict[str, float] = {}
        for name in ("A", "B", "dropout"):
            setattr(self, self.prefix + name, nn.ModuleDict())
        setattr(self, f"{self.prefix}mask", BufferDict(persistent=True))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None
        self._unsettled: dict[str, str] = {}
        self._active_adapter = adapter_name
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = self._features()
        self.update_layer(adapter_name, r, lora_alpha, config)

    @property
    def A(self) -> nn.ModuleDict:
        """A of every adapter, each a linear layer (in -> r)."""
        return getattr(self, f"{self.prefix}A")

    @property
    def B(self) -> nn.ModuleDict:
        """B of every adapter, each a linear layer (r -> out)."""
        return getattr(self, f"{self.prefix}B")

    @property
    def saved_masks(self) -> dict[str, Tensor]:
        """Packed masks of the adapters that carry one."""
        return getattr(self, f"{self.prefix}mask")

    # -- adapters ----------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: SparseLoraConfig) -> None:
        """Add the adapter `adapter_name`, or replace it."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.trained_scaling[adapter_name] = self.scaling[adapter_name]
        self.masking[adapter_name] = getattr(config, "masking", "always")
        self.gradient_tokens[adapter_name] = config.gradient_tokens
        columns, rows = self._factor_features(r)
        # Modules rather than bare parameters: PEFT's hotswap and FSDP's wrapping look for them.
        self.A[adapter_name] = nn.Linear(*columns, bias=False)
        self.B[adapter_name] = nn.Linear(*rows, bias=False)
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        getattr(self, f"{self.prefix}dropout")[adapter_name] = dropout
        self.reset_parameters(adapter_name, config.init_weights)
        if config.save_mask:
            # The mask at hand. A configuration with fingerprints comes from a file, whose mask replaces it.
            readable = self._readable()
            self.saved_masks[adapter_name] = pack(mask_of(self._stored())) if readable else self._empty_mask()
            if config.mask_fingerprints:
                self._unsettled[adapter_name] = config.on_mask_mismatch
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool | Literal["paper"]) -> None:
        """Draw A as `nn.Linear` does; B is zero, or drawn too if `init_weights` is False."""
        nn.init.kaiming_uniform_(stored_weight(self.A[adapter_name]), a=math.sqrt(5))
        B = stored_weight(self.B[adapter_name])
        if init_weights:
            nn.init.zeros_(B)
        else:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling of `adapter` to `scale` times the one it was trained with."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.trained_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`, or put back the one they were trained with."""
        for name in self._present(self.active_adapters):
            self.scaling[name] = self.trained_scaling[name] if scale is None else self.scaling[name] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """H ⊙ (BA) has no low rank."""
        return False

    # -- the weight --------------------------------------------------------------------------------------------------

    def pruned_weight(self) -> Tensor:
        """Return the base weight as a matrix (out, in), as it was before any merge: its zeros are the mask."""
        self._settle_masks()
        return self._matrix(self._stored() if self._unmerged_weight is None else self._unmerged_weight)

    def merged_weight(self, names: list[str]) -> Tensor:
        """Return the base weight (out, in) with the named adapters folded in."""
        A, B, c, s = self._factors(names)
        return effective_weight(self.pruned_weight().to(A.device), A, B, self.factor, c, s)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what merging `adapter` adds, laid out as the base weight, in the adapter's dtype."""
        A, B, c, s = self._factors([adapter])
        weight = self.pruned_weight().to(A.device, A.dtype)
        return self._as_stored(effective_weight(weight, A, B, self.factor, c - 1, s))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base layer: every zero stays zero. Computed in the adapter's dtype, rounded once.

        The weight before is kept aside, on the CPU, until `unmerge`.

        Args:
            safe_merge: raise a ValueError instead of writing a weight that is not finite.
            adapter_names: what to merge, by default the active adapters.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        merged = self.merged_weight(self.merged_adapters + names)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        if self._unmerged_weight is None:
            self._unmerged_weight = self._stored().cpu().clone()
        self._store(self._as_stored(merged))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back bit for bit."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._store(self._unmerged_weight.to(self._stored().device))
        self._unmerged_weight = None
        self.merged_adapters.clear()

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        if self._unsettled:
            self._settle_masks()
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._present(self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        return self._forward_active(x, names, *args, **kwargs)

    def _forward_active(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        fused = [name for name in names if self._fuses(name)]
        separate = [name for name in names if name not in fused]
        if not fused:
            y = self.base_layer(x, *args, **kwargs)
        elif (rank_one := self._forward_rank_one(x, fused)) is not None:
            y = rank_one
        else:
            y = self._product(x, self._weight_source(), self._factors(fused), self.bias, self._tokens(fused))
        for name in separate:
            y = y + self._delta(x, name).to(y.dtype)
        return y

    def _forward_rank_one(self, x: Tensor, names: list[str]) -> Tensor | None:
        return None

    def _fuses(self, name: str) -> bool:
        """Whether base and adapter share one product: not under dropout, LoRA-Prune, or another tuner in between."""
        dropout = getattr(self, f"{self.prefix}dropout")[name]
        drops = self.training and isinstance(dropout, nn.Dropout)
        return (
            not drops
            and self.masking[name] == "always"
            and self.base_layer is self.get_base_layer()
            and self._readable()
        )

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """What the adapter `name` adds to the output of the base layer."""
        x = getattr(self, f"{self.prefix}dropout")[name](x)
        A, B, c, s = self._factors([name])
        if self.masking[name] == "merge":
            return self._low_rank(x, A, B) * s
        return self._product(x, self._weight_source(), (A, B, c - 1, s), None, self._tokens([name]))

    def _low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)
        return F.linear(F.linear(x, A), B)

    def _product(
        self,
        x: Tensor,
        weight: Weight,
        factors: tuple[Tensor, Tensor, float, float],
        bias: Tensor | None,
        tokens: float,
    ) -> Tensor:
        A, B, c, s = factors
        operation = self._operation()
        return sparse_lora(x, weight, A, B, bias, factor=self.factor, c=c, s=s, operation=operation, tokens=tokens)

    def _tokens(self, names: list[str]) -> float:
        """Fraction of the tokens to estimate gradients from: of the adapter that asks for the most."""
        return max(self.gradient_tokens[name] for name in names) if self.training else 1.0

    def _operation(self) -> Operation:
        return LINEAR

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """One adapter per sample, "__base__" for none."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
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
            y = self._forward_active(part, present, *args, **kwargs) if present else self.base_layer(part)
            order += rows
            parts.append(y)
        return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]

    # -- storage; a layer of another kind overrides these ---------------------------------------------------------

    def _features(self) -> tuple[int, int]:
        return _get_in_out_features(self.get_base_layer())

    def _factor_features(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(in, r) and (r, out) of A and B."""
        return (self.in_features, r), (r, self.out_features)

    def _stored(self) -> Tensor:
        return self.get_base_weight()

    def _store(self, weight: Tensor) -> None:
        if self.quantization_backend is not None:
            self.set_base_weight(weight)
        else:
            # Into the memory there is: its format stays, and so does every tie to it.
            stored_weight(self.get_base_layer()).data.copy_(weight)

    def _matrix(self, stored: Tensor) -> Tensor:
        return as_matrix(self.get_base_layer(), stored)

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return as_stored(self.get_base_layer(), matrix)

    def _readable(self) -> bool:
        """Whether the base weight can be read: some quantised kernels do not give it back."""
        return self.quantization_backend is None or self.quantization_backend.supports_merge

    def _weight_source(self) -> Weight:
        if not self._readable():
            return self._given_mask()
        # A dequantised weight is not worth keeping until backward.
        return self.pruned_weight if self.quantization_backend is not None else self.pruned_weight()

    def _given_mask(self) -> Tensor:
        """The saved mask as numbers: all MaskLoRA needs of a base that cannot be dequantised."""
        if self.factor == "weight" or not self.saved_masks:
            raise TypeError(
                f"The weights of {self.quantization_backend.backend_name} layers cannot be read, so there are no "
                "zeros to see. Use a MaskLoRA adapter saved with `save_mask=True`, or a base that can be dequantised."
            )
        packed = next(iter(self.saved_masks.values()))
        A = stored_weight(next(iter(self.A.values())))
        return unpack(packed, torch.Size((self.out_features, self.in_features))).to(A.dtype)

    def _empty_mask(self) -> Tensor:
        return torch.zeros(-(-self.out_features * self.in_features // 8), dtype=torch.uint8)

    def _factors(self, names: list[str]) -> tuple[Tensor, Tensor, float, float]:
        """Return A, B, c, s of the sum of the named adapters: several adapters are one of all their ranks."""
        A = [stored_weight(self.A[name]) for name in names]
        B = [stored_weight(self.B[name]) for name in names]
        scalings = [self.scaling[name] for name in names]
        c = 1.0 if self.factor == "mask" else 1.0 - sum(scalings)
        if len(names) == 1:
            return A[0], B[0], c, scalings[0]
        return torch.cat(A), torch.cat([b * s for b, s in zip(B, scalings, strict=True)], dim=1), c, 1.0

    def _present(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.A]

    def refresh_saved_mask(self, name: str) -> None:
        """Bring the saved mask of adapter `name` up to date: the base may have been pruned since it was attached."""
        if name in self.saved_masks and self._readable():
            self._settle_masks()
            stored = self._stored() if self._unmerged_weight is None else self._unmerged_weight
            self.saved_masks[name].copy_(pack(mask_of(stored)))

    @torch.no_grad()
    def _settle_masks(self) -> None:
        """Prune the base by the masks that adapters brought along. Once per adapter, when it is first used."""
        while self._unsettled and self._readable():
            name, on_mismatch = self._unsettled.popitem()
            weight = self._stored()
            if weight.is_meta or weight.numel() == 0 or self.saved_masks[name].is_meta:
                self._unsettled[name] = on_mismatch
                return
            mask = unpack(self.saved_masks[name].to(weight.device), weight.shape)
            stray = float(((weight == 0) & mask).sum()) / weight.numel()
            if stray > STRAY_ZEROS and on_mismatch == "error":
                self._unsettled[name] = on_mismatch
                raise ValueError(
                    f"Adapter {name!r} carries a mask that keeps {stray:.1%} of the entries that are zero in this "
                    "base "
                    "weight. Load it onto the dense model or the one it was trained on, or set "
                    '`on_mask_mismatch="warn"`.'
                )
            if bool(((weight != 0) & ~mask).any()):
                self._store(weight.masked_fill(~mask, 0))

    def __repr__(self) -> str:
        return self.prefix.rstrip("_") + "." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class Conv2dMixin(SparseLoraLayer):
    """The same around an `nn.Conv2d`, whose kernel is the matrix (out, in / groups · k · k). PERP, appendix A.2."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, in, height, width) or (in, height, width) -> the same with out channels."""
        return super().forward(x[None], *args, **kwargs)[0] if x.dim() == 3 else super().forward(x, *args, **kwargs)

    def _factor_features(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (stored_weight(self.get_base_layer())[0].numel(), r), (r, self.out_features)

    def _product(
        self,
        x: Tensor,
        weight: Weight,
        factors: tuple[Tensor, Tensor, float, float],
        bias: Tensor | None,
        tokens: float,
    ) -> Tensor:
        return super()._product(self._pad(x), weight, factors, bias, 1.0)

    def _low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self._operation().apply(self._pad(x).to(A.dtype), B @ A, None)

    def _pad(self, x: Tensor) -> Tensor:
        conv: Any = self.get_base_layer()
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        return x

    def _operation(self) -> Operation:
        conv: Any = self.get_base_layer()
        padded = isinstance(conv.padding, str) or conv.padding_mode != "zeros"
        padding = (0, 0) if padded else conv.padding
        return Convolution(tuple(conv.weight.shape), conv.stride, padding, conv.dilation, conv.groups)
