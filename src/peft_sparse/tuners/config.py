"""The configurations MaskLoRAConfig and ScaledLoRAConfig.

Fields that `peft.LoraConfig` has too carry the same names, except `init_weights`, which is `init_lora_weights` there.
The models of `mask_lora` and `scaled_lora` read the configurations. PEFT saves them as `adapter_config.json`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..model.masks import sparsity_of_fingerprint
from .registration import add_peft_type


MASK_LORA = add_peft_type("MASK_LORA")
SCALED_LORA = add_peft_type("SCALED_LORA")

# Increased when the meaning of a saved adapter changes, so that an older package refuses the adapter.
FORMAT_VERSION = 2

# Called with the folder and the configuration of an adapter that was saved. `sharing`, which writes cards, adds to it.
CARD_WRITERS: list[Callable[[str, "SparseLoraConfig"], None]] = []


@dataclass
class SparseLoraConfig(PeftConfig):
    """Fields and checks that `MaskLoRAConfig` and `ScaledLoRAConfig` share. Use one of these two."""

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
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    init_weights: bool | Literal["paper"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    gradient_dtype: Literal["int8", "fp8"] | None = None
    save_mask: bool = False
    mask_fingerprints: dict[str, str] = field(default_factory=dict, repr=False)
    other_sparsities: dict[str, float] = field(default_factory=dict, repr=False)
    on_mask_mismatch: Literal["error", "warn", "ignore"] = "error"
    format_version: int = FORMAT_VERSION
    requires: str = "peft_sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        # The names of the output heads that get an adapter.
        self._heads: tuple[str, ...] = ()
        # The fingerprints to save, and those that were compared when the adapter was attached.
        self._proof: dict[str, str] = {}
        self._compared: dict[str, str] = {}
        # The sparsities to save of pruned weights that are not adapted.
        self._others: dict[str, float] = {}
        # The running statistics of norms when the adapter was attached, by name.
        self._statistics: dict[str, Tensor] = {}
        # What was done to the model, for the model card.
        self._done: dict[str, Any] = {}
        # PEFT looks names up in sets, and JSON gives lists.
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check()

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Return the accepted values of every field that has a fixed choice, by name of the field."""
        return {
            "bias": ("none", "all", f"{self.name}_only"),
            "train_head": ("none", "adapter", "full"),
            "on_mask_mismatch": ("error", "warn", "ignore"),
            "init_weights": (True, False),
            "gradient_dtype": (None, "int8", "fp8"),
        }

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """Return the rank and the `lora_alpha` of a layer.

        Args:
            name: name of the layer or parameter in the base model.
        """
        r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        lora_alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.lora_alpha)
        assert lora_alpha is not None, "configurations resolve it"
        return r, lora_alpha

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, with the fingerprints of the masks, and write into the model card how to load.

        Args:
            save_directory: folder of the adapter. PEFT writes `adapter_config.json` into it. Its model card tells how
                the adapter is loaded and how it was made. If it is a checkpoint of a Trainer, the card in the folder
                of the run tells it too, because that is the card which the Trainer pushes to the Hub.
            kwargs: passed on to `PeftConfig.save_pretrained`.
        """
        own = self.mask_fingerprints, self.other_sparsities
        if self._proof:
            self.mask_fingerprints, self.other_sparsities = self._proof, self._others
        try:
            super().save_pretrained(save_directory, **kwargs)
            for write_card in CARD_WRITERS:
                write_card(save_directory, self)
        finally:
            # The fingerprints belong to the file. The object may be used for another model next.
            self.mask_fingerprints, self.other_sparsities = own

    @property
    def sparsity(self) -> float | None:
        """Mean sparsity of the adapted weights, a fraction, from the fingerprints. None if there are no fingerprints.

        Large and small weights count equally in the mean.
        """
        shares = [sparsity_of_fingerprint(proof) for proof in self.mask_fingerprints.values()]
        return sum(shares) / len(shares) if shares else None

    def _check(self) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"The adapter has format version {self.format_version}. The installed peft_sparse reads versions up "
                f"to {FORMAT_VERSION}. Upgrade the package: pip install -U peft_sparse"
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
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a str. Got {self.target_modules!r}. Pass a "
                    "list of names, or choose the layers by a regular expression alone."
                )


@dataclass
class MaskLoRAConfig(SparseLoraConfig):
    """Configuration of MaskLoRA: LoRA whose update is masked, so that the zeros of the base weight stay zeros.

    The effective weight of an adapted layer is

        W + s · M ⊙ (BA),    s = lora_alpha / r

    W (out, in) is the frozen base weight. M (out, in) is its mask: 1 where W is not zero, 0 where W is zero. The mask
    is read off W and not stored. A (r, in) and B (out, r) are trained. A layer whose weight has no zeros gets plain
    LoRA.

    Merging computes this weight in the dtype of A and B and rounds it once to the dtype of W. Every zero stays zero.

    Zimmer et al. 2023 (PERP), arXiv:2312.15230v3 (https://arxiv.org/abs/2312.15230).

    Args:
        r: rank of A and B.
        target_modules: which layers are adapted: `nn.Linear`, transformers `Conv1D`, `nn.Conv2d` and quantised linear
            layers. A list of names matches each layer whose name, or whose last parts of the name, are one of them:
            "q_proj" matches "model.layers.0.self_attn.q_proj". A string is a regular expression for the whole name.
            "all-linear" means every linear layer except the output head. None means the layers that LoRA adapts by
            default in this architecture, or no layer if `target_parameters` is given.
        exclude_modules: which of these layers are left out. A list of names or a regular expression, as in
            `target_modules`.
        target_parameters: names of bare parameters to adapt, or the last parts of their names, such as
            "experts.gate_up_proj". A parameter has the shape (out, in), or three dimensions with one matrix for each
            expert. Every expert gets an A and a B of its own.
        lora_alpha: numerator of the scaling s = lora_alpha / r.
        lora_dropout: probability in [0, 1) of dropping an entry of the adapter's input during training. The base
            weight receives the whole input. A layer with dropout computes a second matrix product during training.
            It must be 0 with `target_parameters`.
        use_rslora: use s = lora_alpha / sqrt(r). Kalajdzievski 2023, arXiv:2312.03732.
        bias: which biases are trained and saved: "none", "all" for every bias of the model, or "mask_lora_only" for
            the biases of adapted layers.
        train_norms: train and save every normalisation layer of the model, by adding them to `modules_to_save`.
        train_head: how the output head is trained, or the classifier of a model with labels. "none" leaves it frozen.
            "adapter" adapts it as any other layer. "full" trains and saves its own weight. A head that shares its
            weight with the embedding is refused.
        modules_to_save: names of further modules to train and save as a whole, such as a new classifier.
        trainable_token_indices: indices of tokens whose embeddings are trained and saved, such as tokens added for a
            chat template. A list is for the input embedding. A dictionary gives the list for each embedding by name.
            An output head that shares its weight with the embedding gets the same rows.
        ensure_weight_tying: keep modules of `modules_to_save`, and tokens of `trainable_token_indices`, that share
            their weight with the embedding the same for both. Adapters on such a head are refused with it.
        init_weights: True draws A as LoRA does and sets B to zero, so that training starts at W. False draws B too,
            for tests.
        layers_to_transform: index, or list of indices, of the blocks to adapt. None adapts all. It needs a list of
            names in `target_modules`.
        layers_pattern: name of the module list that holds the blocks, such as "layers", for models in which PEFT does
            not find it. Used with `layers_to_transform`.
        rank_pattern: ranks that differ from `r`, by the last parts of a layer's name or by a regular expression for
            them, such as {"q_proj": 16}.
        alpha_pattern: values that differ from `lora_alpha`, by keys of the same kind as those of `rank_pattern`.
        fan_in_fan_out: accepted because `LoraConfig` has it, and not used. The layer itself tells how it stores its
            weight.
        gradient_dtype: "int8" or "fp8" computes dL/dW, from which the gradients of A and B follow, of numbers of eight
            bits, and keeps the inputs of adapted layers for backward in eight bits. None computes it in the dtype of
            the activations. Forward, the gradients of the inputs and the merged weight stay as they are. It has no
            effect on convolutions, `target_parameters`, unfrozen base weights and layers that need no dL/dW. Where the
            hardware cannot multiply such numbers, only the memory of the inputs is saved.
        save_mask: save the mask of every adapted weight with the adapter, at 1 bit for each entry. Such an adapter can
            be loaded onto the dense base model, if it adapts every pruned weight. It then writes the zeros into it.
        mask_fingerprints: a fingerprint of the mask of every adapted weight, by layer name. Written when the adapter
            is saved and compared when it is loaded. Not set by the user.
        other_sparsities: the sparsity of every pruned weight that is not adapted, by layer name. Written when the
            adapter is saved and compared when it is loaded: such a weight needs at least as many zeros, up to 1 % of
            its entries. Not set by the user.
        on_mask_mismatch: what happens when an adapter is loaded onto a base model that has other zeros: "error" raises
            ValueError, "warn" warns, "ignore" does nothing. An adapter with `save_mask` is compared when it is first
            used. It differs if its mask keeps entries that are zero in the base model, and these are more than 1 % of
            the entries of a weight. "error" then raises ValueError, and "warn" and "ignore" both accept it.
        format_version: version of the saved format. Not set by the user.
        requires: name of the package that loads the adapter, for people who read `adapter_config.json`. Not used.
        masking: when the mask is applied. "always" is the formula above. "merge" is LoRA-Prune of the same paper: the
            dense weight W + s · BA is trained, at about the cost of LoRA, and the mask is applied when the adapter is
            merged. Merging then changes the effective weight by -s · (1 - M) ⊙ (BA).

    `task_type`, `inference_mode` and the other fields of `peft.PeftConfig` are accepted as well.

    Raises:
        ValueError: `r` or a rank in `rank_pattern` is not a positive integer, `lora_alpha` is None, `lora_dropout` is
            outside [0, 1), a field has none of its accepted values, `layers_to_transform` or `layers_pattern` is given
            beside a string in `target_modules`, or `format_version` is newer than the package.
    """

    name: ClassVar[str] = "mask_lora"

    masking: Literal["always", "merge"] = "always"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MASK_LORA
        if self.lora_alpha is None:
            raise ValueError("`lora_alpha` must be a number, got None. Use `lora_alpha=r` for a scaling of 1.")

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Return the accepted values of every field that has a fixed choice, by name of the field."""
        return super().choices() | {"masking": ("always", "merge")}


@dataclass
class ScaledLoRAConfig(SparseLoraConfig):
    """Configuration of ScaledLoRA: a low-rank factor multiplies the base weight, so that its zeros stay zeros.

    The effective weight of an adapted layer is

        W ⊙ (1 + s · BA)                with `residual=True`, the default for r > 1
        W ⊙ (1 + s · (BA - 1))          with `residual=False`, the default for r = 1

    W (out, in) is the frozen base weight. A (r, in) and B (out, r) are trained. s is 1 unless `lora_alpha` is given.
    The second formula is then W ⊙ (BA), as published. The first is W ⊙ (B'A') too, where B' and A' have one more
    component, which stays at ones. Training starts at W: at BA = 0 in the first formula, and at a matrix of ones BA
    in the second. Every zero stays zero, because 0 times a finite number is 0.

    With `r=1` and the defaults the effective weight is W_ij · b_i · a_j. A linear layer then multiplies its inputs by
    a and the product by b, without a matrix of W's size in forward or backward. Quantised layers, convolutions,
    `target_parameters`, training with dropout and several active adapters use the general formula.

    Merging computes the effective weight in the dtype of A and B and rounds it once to the dtype of W. A linear layer
    of rank 1 rounds at other places when it runs unmerged, so merging changes its outputs by the rounding error of the
    dtype: in bfloat16 visibly, see docs/numbers/tuners.md.

    Zimmer et al. 2023 (PERP), arXiv:2312.15230v3 (https://arxiv.org/abs/2312.15230).

    Args:
        r: rank of A and B.
        target_modules: which layers are adapted: `nn.Linear`, transformers `Conv1D`, `nn.Conv2d` and quantised linear
            layers. A list of names matches each layer whose name, or whose last parts of the name, are one of them:
            "q_proj" matches "model.layers.0.self_attn.q_proj". A string is a regular expression for the whole name.
            "all-linear" means every linear layer except the output head. None means the layers that LoRA adapts by
            default in this architecture, or no layer if `target_parameters` is given.
        exclude_modules: which of these layers are left out. A list of names or a regular expression, as in
            `target_modules`.
        target_parameters: names of bare parameters to adapt, or the last parts of their names, such as
            "experts.gate_up_proj". A parameter has the shape (out, in), or three dimensions with one matrix for each
            expert. Every expert gets an A and a B of its own.
        lora_alpha: None, the default, gives s = 1 at every rank. A number is the numerator of s = lora_alpha / r.
        lora_dropout: probability in [0, 1) of dropping an entry of the adapter's input during training. The base
            weight receives the whole input. A layer with dropout computes a second matrix product during training.
            It must be 0 with `target_parameters`.
        use_rslora: use s = lora_alpha / sqrt(r). Kalajdzievski 2023, arXiv:2312.03732.
        bias: which biases are trained and saved: "none", "all" for every bias of the model, or "scaled_lora_only" for
            the biases of adapted layers.
        train_norms: train and save every normalisation layer of the model, by adding them to `modules_to_save`.
        train_head: how the output head is trained, or the classifier of a model with labels. "none" leaves it frozen.
            "adapter" adapts it as any other layer. "full" trains and saves its own weight. A head that shares its
            weight with the embedding is refused.
        modules_to_save: names of further modules to train and save as a whole, such as a new classifier.
        trainable_token_indices: indices of tokens whose embeddings are trained and saved, such as tokens added for a
            chat template. A list is for the input embedding. A dictionary gives the list for each embedding by name.
            An output head that shares its weight with the embedding gets the same rows.
        ensure_weight_tying: keep modules of `modules_to_save`, and tokens of `trainable_token_indices`, that share
            their weight with the embedding the same for both. Adapters on such a head are refused with it.
        init_weights: True draws A as LoRA does and sets B to zero. If r > 1, one row of A and one column of B are then
            set to 0.1. They learn to scale whole rows and whole columns of W. With `residual=False` one row of A and
            one column of B are set to ones instead. "paper" sets every entry of A and B to 1 / sqrt(r), as published,
            which needs `residual=False`, its default then. All components then receive equal gradients and stay
            equal, so BA keeps rank 1 for any `r`. False draws A and B so that they have an effect, for tests.
        layers_to_transform: index, or list of indices, of the blocks to adapt. None adapts all. It needs a list of
            names in `target_modules`.
        layers_pattern: name of the module list that holds the blocks, such as "layers", for models in which PEFT does
            not find it. Used with `layers_to_transform`.
        rank_pattern: ranks that differ from `r`, by the last parts of a layer's name or by a regular expression for
            them, such as {"q_proj": 16}.
        alpha_pattern: values that differ from `lora_alpha`, by keys of the same kind as those of `rank_pattern`.
        fan_in_fan_out: accepted because `LoraConfig` has it, and not used. The layer itself tells how it stores its
            weight.
        gradient_dtype: "int8" or "fp8" computes dL/dW, from which the gradients of A and B follow, of numbers of eight
            bits, and keeps the inputs of adapted layers for backward in eight bits. None computes it in the dtype of
            the activations. Forward, the gradients of the inputs and the merged weight stay as they are. It has no
            effect on convolutions, `target_parameters`, unfrozen base weights and layers that need no dL/dW. Where the
            hardware cannot multiply such numbers, only the memory of the inputs is saved.
        save_mask: save the mask of every adapted weight with the adapter, at 1 bit for each entry. Such an adapter can
            be loaded onto the dense base model, if it adapts every pruned weight. It then writes the zeros into it.
        mask_fingerprints: a fingerprint of the mask of every adapted weight, by layer name. Written when the adapter
            is saved and compared when it is loaded. Not set by the user.
        other_sparsities: the sparsity of every pruned weight that is not adapted, by layer name. Written when the
            adapter is saved and compared when it is loaded: such a weight needs at least as many zeros, up to 1 % of
            its entries. Not set by the user.
        on_mask_mismatch: what happens when an adapter is loaded onto a base model that has other zeros: "error" raises
            ValueError, "warn" warns, "ignore" does nothing. An adapter with `save_mask` is compared when it is first
            used. It differs if its mask keeps entries that are zero in the base model, and these are more than 1 % of
            the entries of a weight. "error" then raises ValueError, and "warn" and "ignore" both accept it.
        format_version: version of the saved format. Not set by the user.
        requires: name of the package that loads the adapter, for people who read `adapter_config.json`. Not used.
        residual: which of the two formulas above is trained. True trains what is added to a matrix of ones, and False
            trains the whole factor. None, the default, gives False with `r=1` or `init_weights="paper"`, else True. A
            configuration that is saved holds the value. False is the formula of adapters of format version 1.

    `task_type`, `inference_mode` and the other fields of `peft.PeftConfig` are accepted as well.

    Raises:
        ValueError: `r` or a rank in `rank_pattern` is not a positive integer, `lora_dropout` is outside [0, 1), a
            field has none of its accepted values, `layers_to_transform` or `layers_pattern` is given beside a string
            in `target_modules`, `residual` is True with `init_weights="paper"`, or `format_version` is newer than the
            package.
    """

    name: ClassVar[str] = "scaled_lora"

    lora_alpha: float | None = None
    residual: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SCALED_LORA
        if self.residual is None:
            # Adapters of format version 1 were saved without this field.
            self.residual = self.format_version > 1 and self.r > 1 and self.init_weights != "paper"
        elif self.residual and self.init_weights == "paper":
            raise ValueError(
                '`init_weights="paper"` starts at a matrix of ones BA, which needs `residual=False`, got '
                "`residual=True`. Leave `residual` out, or choose `init_weights=True`."
            )
        if self.lora_alpha is None:
            # Written out as the numbers that give s = 1, because PEFT's hotswap divides these fields itself.
            self.lora_alpha = self._neutral_alpha(self.r)
            neutral = {key: self._neutral_alpha(rank) for key, rank in self.rank_pattern.items()}
            self.alpha_pattern = neutral | self.alpha_pattern

    def _neutral_alpha(self, r: int) -> float:
        return math.sqrt(r) if self.use_rslora else r

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Return the accepted values of every field that has a fixed choice, by name of the field."""
        return super().choices() | {"init_weights": (True, False, "paper"), "residual": (None, True, False)}
