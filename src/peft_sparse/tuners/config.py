"""MaskLoRAConfig: LoRA's field names, a type of its own."""

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from ..masks import sparsity_of_fingerprint
from .registration import add_peft_type


MASK_LORA = add_peft_type("MASK_LORA")


@dataclass
class MaskLoRAConfig(PeftConfig):
    """Configuration of MaskLoRA: W + s · M ⊙ (BA), where M is the mask that the zeros of W spell.

    Merging keeps every zero, and the merged model computes what was trained. A layer without zeros gets plain LoRA.
    PERP, Zimmer et al. 2023, arXiv:2312.15230v3.

    Args:
        r: rank of B (out, r) and A (r, in).
        target_modules: as in `LoraConfig`: a list of names or name endings, a regular expression, or "all-linear".
        exclude_modules: as in `LoraConfig`.
        lora_alpha: s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: must be 0; MaskLoRA fuses its update into the weight, where dropout on the input has no place.
        use_rslora: scale by 1 / sqrt(r), Kalajdzievski 2023, arXiv:2312.03732.
        bias: "none", "all" or "mask_lora_only": which biases are trained and saved, as in `LoraConfig`.
        train_norms: train and save every normalisation layer, inside and outside the blocks. They are added to
            `modules_to_save`.
        modules_to_save: as in `LoraConfig`.
        init_weights: True starts at W exactly (A Kaiming-uniform, B zero); False draws both, for tests.
        layers_to_transform: as in `LoraConfig`.
        layers_pattern: as in `LoraConfig`.
        rank_pattern: as in `LoraConfig`.
        alpha_pattern: as in `LoraConfig`.
        fan_in_fan_out: accepted for compatibility; how a layer stores its weight is read off the layer.
        mask_fingerprints: proof of each adapted weight's mask by layer name; written when the adapter is saved.
        on_mask_mismatch: what to do when this configuration comes with fingerprints and the base model has other
            zeros: "error", "warn", or "ignore".

    Raises:
        ValueError: `r` not positive, dropout, an unknown choice, or layer selection beside a regular expression.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: Literal["none", "all", "mask_lora_only"] = "none"
    train_norms: bool = False
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    mask_fingerprints: dict[str, str] = field(default_factory=dict, repr=False)
    on_mask_mismatch: Literal["error", "warn", "ignore"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MASK_LORA
        # PEFT matches names in sets; lists are what JSON brings back.
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check()

    def _check(self) -> None:
        for name, value in (
            ("r", self.r),
            *((f"rank_pattern[{key!r}]", rank) for key, rank in self.rank_pattern.items()),
        ):
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.lora_dropout:
            raise ValueError(
                f"`lora_dropout` must be 0 for MaskLoRA, got {self.lora_dropout}: its update is fused into the "
                "weight. Use weight decay to regularise."
            )
        for name, choices in (
            ("bias", ("none", "all", "mask_lora_only")),
            ("on_mask_mismatch", ("error", "warn", "ignore")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")

    @property
    def sparsity(self) -> float | None:
        """Sparsity of the adapted weights when the adapter was saved, None before."""
        shares = [sparsity_of_fingerprint(proof) for proof in self.mask_fingerprints.values()]
        return sum(shares) / len(shares) if shares else None
