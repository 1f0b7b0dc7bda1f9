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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..model.environment import check_device


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
        ValueError: there is no such device or dtype.
    """
    check_device(device)
    found = "auto" if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found != "auto" and not isinstance(found, torch.dtype):
        raise ValueError(f'Expected `dtype` as "auto", a dtype of torch or the name of one, got {dtype!r}.')
    adapter_base = check_source(source, base)
    options: dict[str, Any] = {"dtype": found}
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cpu":
        options["device_map"] = {"": device}
    if adapter_base is None:
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    elif base is None:
        model = AutoPeftModelForCausalLM.from_pretrained(source, **options)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), source)
    return LoadedModel(
        name or short_names([source])[0],
        model.eval(),
        load_tokenizer(source, base),
        None if adapter_base is None else short_names([adapter_base])[0],
        weights_size(source),
    )


def check_source(source: str | Path, base: str | None = None) -> str | None:
    """Return the base if `source` is an adapter, or None if it is a model.

    Raises:
        FileNotFoundError: there is no model at `source`, or the base of an adapter is not where it says.
        ValueError: it is a model of another kind.
    """
    if find_adapter_config_file(source, token=None) is None:
        if _file(source, "config.json") is None:
            raise FileNotFoundError(
                f"Expected a model or an adapter at {str(source)!r}, found neither config.json nor "
                "adapter_config.json. Give a folder that `save_pretrained` wrote, or a Hub id."
            )
        check_causal(source, AutoConfig.from_pretrained(source))
        return None
    named = base or PeftConfig.from_pretrained(source).base_model_name_or_path
    if not named or _file(named, "config.json") is None:
        whose = "that was given" if base else "as its configuration says"
        raise FileNotFoundError(
            f"Expected the base of the adapter {str(source)!r} at {named!r}, {whose}, and found no model there. "
            "Give `base` (on the command line: --base)."
        )
    return str(named)


def check_causal(source: str | Path, config: PretrainedConfig) -> None:
    """Check that a checkpoint is a causal language model.

    Args:
        source: its folder or Hub id, for the error.
        config: its configuration.

    Raises:
        ValueError: it is another kind of model.
    """
    names = config.architectures or []
    masked = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    if not known or masked & set(names):
        what = names[0] if names else type(config).__name__
        raise ValueError(
            f"Expected a causal language model, and {str(source)!r} is a {what}. In Python, `prune`, `reconstruct`, "
            "`prune_structured` and `SparseTrainer` take models of other kinds, such as image classifiers "
            "(docs/guides/vision.md)."
        )


def load_tokenizer(source: str | Path, base: str | None = None) -> Any:
    """Return the tokenizer of a model, or of an adapter: the one saved with it, else that of its base.

    Raises:
        FileNotFoundError: there is no model at `source`, or the base of an adapter is not where it says.
    """
    adapter_base = check_source(source, base)
    own = adapter_base is None or _file(source, "tokenizer_config.json") is not None
    return AutoTokenizer.from_pretrained(source if own else adapter_base)


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


def _file(source: str | Path, name: str) -> str | None:
    """Return the path of a file of a folder or a Hub id, or None if it is not there."""
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
