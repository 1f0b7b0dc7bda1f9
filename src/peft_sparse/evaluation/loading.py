"""Loads what is evaluated: a plain or packed model, or an adapter on its base, from a folder or the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file


# What a folder may hold beside the weights of its model.
NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory that is evaluated, with its tokenizer.

    Args:
        name: what a table calls it.
        model: a causal language model.
        tokenizer: its tokenizer.
        base: the name of the base model, if it is an adapter.
        size: the size of its weights on disk in bytes, without the base. None if it was not loaded from files.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    base: str | None = None
    size: int | None = None


def load_model(
    source: str | Path,
    *,
    name: str | None = None,
    base: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> LoadedModel:
    """Load a causal language model for evaluation, whatever form it is shared in.

    An adapter of this package or of PEFT is loaded onto the base that its configuration names. A packed model is
    loaded as `AutoModelForCausalLM` loads it.

    Args:
        source: a folder or a Hub id, of a model or of an adapter.
        name: what a table calls it. By default the last part of `source`.
        base: the base of an adapter, if it is not where the adapter's configuration says.
        dtype: the dtype of the weights. "auto" takes the one in which they are saved.
        device: the device. By default the GPU if there is one, else the CPU.

    Raises:
        FileNotFoundError: there is no model at `source`, or the base of an adapter is not where it says.
    """
    config_file = _adapter_config(source)
    options = {"dtype": dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, dtype)}
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cpu":
        options["device_map"] = {"": device}
    size = weights_size(source)
    if config_file is None:
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    elif base is None:
        model = _on_its_base(source, options)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), source)
    named = base or (PeftConfig.from_pretrained(source).base_model_name_or_path if config_file else None)
    shown = None if named is None else short_names([named])[0]
    return LoadedModel(name or short_names([source])[0], model.eval(), load_tokenizer(source, base), shown, size)


def load_tokenizer(source: str | Path, base: str | None = None) -> Any:
    """Return the tokenizer of a model, or of an adapter: the one saved with it, else that of its base.

    Raises:
        FileNotFoundError: there is no model at `source`.
    """
    config_file = _adapter_config(source)
    if config_file is not None and _file(source, "tokenizer_config.json") is None:
        source = base or PeftConfig.from_pretrained(source).base_model_name_or_path
    return AutoTokenizer.from_pretrained(source)


def weights_size(source: str | Path) -> int | None:
    """Return the size in bytes of the weights in a folder, or of a Hub id in the cache. None if it is not there.

    Only the folder itself is counted, not those in it. If there are safetensors, other formats are left out.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    files = [
        path
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth") and not path.name.startswith(NO_WEIGHTS)
    ]
    chosen = [path for path in files if path.suffix == ".safetensors"] or files
    return sum(path.stat().st_size for path in chosen)


def short_names(sources: Sequence[str | Path]) -> list[str]:
    """Return what a table calls each source: as many of the last parts of its path as tell them apart.

    A Hub id that is no folder stays as it is.

    Raises:
        ValueError: a source is there twice.
    """
    parts = [
        Path(source).resolve().parts[1:] if Path(source).is_dir() or Path(source).is_absolute() else (str(source),)
        for source in sources
    ]
    if len(set(parts)) < len(parts):
        twice = next(source for source, own in zip(sources, parts, strict=True) if parts.count(own) > 1)
        raise ValueError(f"Expected different models, got {str(twice)!r} twice. Name each model once.")
    depth = 1
    while len({own[-depth:] for own in parts}) < len(parts):
        depth += 1
    return ["/".join(own[-depth:]) for own in parts]


def _adapter_config(source: str | Path) -> str | None:
    """Return the file with the configuration of an adapter, or None for a model.

    Raises:
        FileNotFoundError: there is neither an adapter nor a model.
    """
    found = find_adapter_config_file(source, token=None)
    if found is None and _file(source, "config.json") is None:
        raise FileNotFoundError(
            f"Expected a model or an adapter at {str(source)!r}, found neither config.json nor adapter_config.json. "
            "Give a folder that `save_pretrained` wrote, or a Hub id."
        )
    return found


def _file(source: str | Path, name: str) -> str | None:
    """Return the path of a file of a folder or a Hub id, or None if it is not there."""
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None


def _on_its_base(source: str | Path, options: dict[str, Any]) -> nn.Module:
    """Load an adapter onto the base that its configuration names.

    Raises:
        FileNotFoundError: the base is not there.
    """
    named = PeftConfig.from_pretrained(source).base_model_name_or_path
    if not named or (not Path(named).is_dir() and _file(named, "config.json") is None):
        raise FileNotFoundError(
            f"Expected the base of the adapter {str(source)!r} at {named!r}, as its configuration says, and found no "
            "model there. Give `base` (on the command line: --base)."
        )
    return AutoPeftModelForCausalLM.from_pretrained(source, **options)
