"""MaskLoRAConfig and ScaledLoRAConfig: LoRA's field names, types of their own."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import PeftConfig

from ..model.masks import sparsity_of_fingerprint
from .card import complete_card
from .registration import add_peft_type


MASK_LORA = add_peft_type("MASK_LORA")
SCALED_LORA = add_peft_type("SCALED_LORA")

# Raised when what a saved adapter means changes, so that an older package refuses what it would misread.
FORMAT_VERSION = 1


@dataclass
class SparseLoraConfig(PeftConfig):
    """What MaskLoRA and ScaledLoRA share; use one of the two.

    Args:
        r: rank of B (out, r) and A (r, in).
        target_modules: as in `LoraConfig`: a list of names or name endings, a regular expression, or "all-linear".
            Linear layers, transformers `Conv1D` and `Conv2d`.
        exclude_modules: as in `LoraConfig`.
        target_parameters: as in `LoraConfig`: names of 2-D or 3-D parameters, such as the fused experts of
            mixture-of-experts models.
        lora_alpha: s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: probability of dropping entries of the adapter's input. While it trains with dropout, a layer
            needs a second matrix product.
        use_rslora: scale by 1 / sqrt(r), Kalajdzievski 2023, arXiv:2312.03732.
        bias: "none", "all", or "mask_lora_only" ("scaled_lora_only"): which biases are trained and saved.
        train_norms: train and save every normalisation layer, inside and outside the blocks, by `modules_to_save`.
        train_head: train the output head: "none"; "adapter" adapts it as any other layer (a head is not pruned, so
            with MaskLoRA that is plain LoRA, and merges); "full" trains and saves its weight.
        modules_to_save: as in `LoraConfig`.
        init_weights: True starts at W exactly; False draws a non-trivial adapter, for tests.
        layers_to_transform: as in `LoraConfig`.
        layers_pattern: as in `LoraConfig`.
        rank_pattern: as in `LoraConfig`.
        alpha_pattern: as in `LoraConfig`.
        fan_in_fan_out: accepted for compatibility; how a layer stores its weight is read off the layer.
        save_mask: save each mask with the adapter, at 1 bit per weight; the adapter then also loads onto the dense
            base and prunes it.
        mask_fingerprints: proof of each adapted weight's mask by layer name; written when the adapter is saved.
        on_mask_mismatch: what to do when this configuration comes with fingerprints and the base model has other
            zeros: "error", "warn", or "ignore".
        format_version: of the saved adapter; a newer one than this package knows is refused.
        requires: the package that loads the adapter, for the reader of the file.

    Raises:
        ValueError: `r` not positive, dropout outside [0, 1), an unknown choice, layer selection beside a regular
            expression, or a newer format.
    """

    name: ClassVar[str]

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    lora_alpha: float | None = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    train_norms: bool = False
    train_head: Literal["none", "adapter", "full"] = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool | Literal["paper"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    save_mask: bool = False
    mask_fingerprints: dict[str, str] = field(default_factory=dict, repr=False)
    on_mask_mismatch: Literal["error", "warn", "ignore"] = "error"
    format_version: int = FORMAT_VERSION
    requires: str = "peft_sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._head: str | None = None
        self._proof: dict[str, str] = {}
        # PEFT matches names in sets; lists are what JSON brings back.
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check()

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Return what each field with a fixed choice accepts."""
        return {
            "bias": ("none", "all", f"{self.name}_only"),
            "train_head": ("none", "adapter", "full"),
            "on_mask_mismatch": ("error", "warn", "ignore"),
            "init_weights": (True, False),
        }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration with the proof of the masks; tell on the model card how to load the adapter."""
        own = self.mask_fingerprints
        self.mask_fingerprints = self._proof or own
        try:
            super().save_pretrained(save_directory, **kwargs)
            complete_card(save_directory, self.peft_type.value, self.sparsity)
        finally:
            # Only the file is bound to these masks; the object may serve another model next.
            self.mask_fingerprints = own

    @property
    def sparsity(self) -> float | None:
        """Sparsity of the adapted weights when the adapter was saved, None before."""
        shares = [sparsity_of_fingerprint(proof) for proof in self.mask_fingerprints.values()]
        return sum(shares) / len(shares) if shares else None

    def _check(self) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"The adapter has format version {self.format_version}, this peft_sparse knows {FORMAT_VERSION}. "
                "Upgrade it: pip install -U peft_sparse"
            )
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for name, value in ranks.items():
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        for name, accepted in self.choices().items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"`{name}` must be one of {accepted}, got {getattr(self, name)!r}.")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")


@dataclass
class MaskLoRAConfig(SparseLoraConfig):
    """Configuration of MaskLoRA: W + s · M ⊙ (BA), where M is the mask that the zeros of W spell.

    Merging keeps every zero, and the merged model computes what was trained. A layer without zeros gets plain LoRA.
    PERP, Zimmer et al. 2023, arXiv:2312.15230v3.

    Args:
        masking: "always", or "merge" for LoRA-Prune of the same paper: the dense W + s · BA is trained, as cheaply as
            LoRA, and the mask is applied when merging. Merging then changes the function, by -s · (1 - M) ⊙ (BA).
        everything else: as in `SparseLoraConfig`.
    """

    name: ClassVar[str] = "mask_lora"

    masking: Literal["always", "merge"] = "always"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MASK_LORA

    def choices(self) -> dict[str, tuple[Any, ...]]:
        return super().choices() | {"masking": ("always", "merge")}


@dataclass
class ScaledLoRAConfig(SparseLoraConfig):
    """Configuration of ScaledLoRA: W ⊙ (BA), starting at exactly W. Merging keeps every zero, whatever the mask.

    PERP, Zimmer et al. 2023, arXiv:2312.15230v3. Rank 1 scales rows and columns, W_ij · b_i · a_j, and needs no matrix
    of W's size in forward or backward.

    Args:
        init_weights: True starts with BA = 1 by one row of ones in A and one column of ones in B, the rest of A drawn
            as in LoRA and the rest of B zero. "paper" is the literal A = B = 1 / sqrt(r), whose rows and columns
            receive equal gradients and stay equal: rank 1 for any r. False draws a non-trivial adapter, for tests.
        lora_alpha: None, the default, for the paper's W ⊙ (BA). A number trains W ⊙ (1 + s · (BA - 1)) with s as in
            LoRA.
        everything else: as in `SparseLoraConfig`.
    """

    name: ClassVar[str] = "scaled_lora"

    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SCALED_LORA
        if self.lora_alpha is None:
            # s = 1 at every rank, written out because PEFT's hotswap divides these fields itself.
            self.lora_alpha = self._neutral_alpha(self.r)
            for key, rank in self.rank_pattern.items():
                self.alpha_pattern.setdefault(key, self._neutral_alpha(rank))

    def _neutral_alpha(self, r: int) -> float:
        return math.sqrt(r) if self.use_rslora else r

    def choices(self) -> dict[str, tuple[Any, ...]]:
        return super().choices() | {"init_weights": (True, False, "paper")}
