"""Adapters that transformers' `add_adapter` attached: they are checked before training, and loaded from a checkpoint.

Transformers' `Trainer` saves such an adapter, but resumes only a `PeftModel`.
"""

from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME

from ..model.tree import base_model


# `save_pretrained` puts this before the names, as a `PeftModel` would.
_PREFIX = "base_model.model."


def has_added_adapters(model: nn.Module) -> bool:
    """Return whether `add_adapter` or `load_adapter` of transformers attached the adapters of `model`."""
    return base_model(model) is model and bool(getattr(model, "_hf_peft_config_loaded", False))


def check_added_adapters(model: nn.Module, saves: bool) -> None:
    """Check that a run with adapters of `add_adapter` can be saved.

    Raises:
        ValueError: several adapters are active, and checkpoints are to be saved.
    """
    if saves and has_added_adapters(model) and len(active := _active(model)) > 1:
        raise ValueError(
            f"The adapters {', '.join(map(repr, active))} are active, and transformers saves one adapter of "
            '`add_adapter`. Call `model.set_adapter` with one name, set `save_strategy="no"`, or attach the adapters '
            "with `peft.get_peft_model`."
        )


def load_added_adapter(model: nn.Module, checkpoint: Path) -> bool:
    """Load the active adapter from a checkpoint. In place.

    Returns:
        Whether it was loaded. False leaves the checkpoint to `Trainer`: the adapters of `model` did not come by
        `add_adapter`, or the checkpoint holds no adapter.

    Raises:
        ValueError: the checkpoint holds tensors that the adapter does not have.
    """
    files = (checkpoint / ADAPTER_SAFE_WEIGHTS_NAME, checkpoint / ADAPTER_WEIGHTS_NAME)
    if not has_added_adapters(model) or not any(file.is_file() for file in files):
        return False
    state = load_peft_weights(str(checkpoint), device="cpu")
    plain = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    unknown = set_peft_model_state_dict(model, plain, _active(model)[0]).unexpected_keys
    if unknown:
        raise ValueError(
            f"The adapter in {str(checkpoint)!r} has {unknown[0]!r} ({len(unknown)} such tensors), and the adapter of "
            "the model does not. Attach the adapter with the configuration of the first run."
        )
    return True


def _active(model: Any) -> list[str]:
    return list(model.active_adapters())
