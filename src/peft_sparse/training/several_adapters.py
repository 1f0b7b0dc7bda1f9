"""Loads the adapters of a `PeftModel` from a checkpoint, each from its own folder, and compares their configurations.

Transformers' `Trainer` loads them only if there is one, and it is called "default". Else it continues with the first
active adapter alone, or loads the file of one adapter into another at the end of training. It does not read the
configuration of the checkpoint, so that A and B could be used with another scaling.
"""

import math
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME

from ..tuners.config import SparseLoraConfig
from ..tuners.factors import layers_with
from .added_adapters import has_added_adapters


def load_adapters(model: nn.Module, checkpoint: Path) -> bool:
    """Load every adapter of `model` that the checkpoint holds. In place. Active adapters stay active.

    Returns:
        Whether they were loaded. False leaves the checkpoint to `Trainer`.
    """
    if not isinstance(model, PeftModel) or list(model.peft_config) == ["default"]:
        return False
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return False
    found = _places(model, checkpoint)
    if not found:
        return False
    active, trained = list(model.active_adapters), [(p, p.requires_grad) for p in model.parameters()]
    for name, place in found.items():
        model.load_adapter(str(place), name, is_trainable=name in active)
    tuner: Any = model.base_model
    tuner.set_adapter(active)
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
    return True


def check_formulas(model: nn.Module, checkpoint: Path) -> None:
    """Check that the MaskLoRA and ScaledLoRA adapters of `model` compute with their A and B as in the checkpoint.

    Raises:
        ValueError: the scaling or another part of the formula differs.
    """
    configs = getattr(model, "peft_config", {})
    for name, place in _places(model, checkpoint).items():
        if not isinstance(configs[name], SparseLoraConfig) or not (place / CONFIG_NAME).is_file():
            continue
        saved = PeftConfig.from_pretrained(str(place))
        for key, layer in layers_with(model, name).items():
            here = (layer.trained_scaling[name], layer.residual[name], layer.masking[name])
            there = _formula_of(cast(SparseLoraConfig, saved), key)
            if type(saved) is not type(configs[name]) or here != there:
                raise ValueError(
                    f"The adapter {name!r} of the checkpoint was trained with another configuration: "
                    f"{type(saved).__name__} with (scaling, residual, masking) {there} in {key!r}, and the model has "
                    f"{type(configs[name]).__name__} with {here}. Attach the adapter with the configuration of the "
                    "first run."
                )


def _formula_of(config: SparseLoraConfig, key: str) -> tuple[float, bool, str]:
    """Return scaling, `residual` and `masking` of a new adapter in the layer `key`."""
    r, alpha = config.rank_and_alpha(key)
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    return scaling, getattr(config, "residual", True), getattr(config, "masking", "always")


def _places(model: Any, checkpoint: Path) -> dict[str, Path]:
    """Return the folders of the checkpoint that hold adapters of `model`, by name of the adapter."""
    if has_added_adapters(model):
        # Transformers saves the active adapter, in the folder itself.
        return {name: checkpoint for name in model.active_adapters()[:1] if _holds_adapter(checkpoint)}
    names = list(model.peft_config) if isinstance(model, PeftModel) else []
    # PEFT saves the adapter "default" in the folder itself, and others in folders with their names.
    places = {name: checkpoint if name == "default" else checkpoint / name for name in names}
    return {name: place for name, place in places.items() if _holds_adapter(place)}


def _holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME))
