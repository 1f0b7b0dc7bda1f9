"""Loads the adapters of a `PeftModel` from a checkpoint, each from its own folder.

Transformers' `Trainer` loads them only if there is one, and it is called "default". Else it continues with the first
active adapter alone, or loads the file of one adapter into another at the end of training.
"""

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME


def load_adapters(model: nn.Module, checkpoint: Path) -> bool:
    """Load every adapter of `model` that the checkpoint holds. In place. Active adapters stay active.

    Returns:
        Whether they were loaded. False leaves the checkpoint to `Trainer`.
    """
    if not isinstance(model, PeftModel) or list(model.peft_config) == ["default"]:
        return False
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return False
    # PEFT saves the adapter "default" in the folder itself, and others in folders with their names.
    places = {name: checkpoint if name == "default" else checkpoint / name for name in model.peft_config}
    found = {name: place for name, place in places.items() if _holds_adapter(place)}
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


def _holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME))
