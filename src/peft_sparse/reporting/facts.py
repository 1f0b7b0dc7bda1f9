"""What a report tells about a model and about the files that were saved."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ..model.blocks import base_model, prunable_weights
from ..model.sharding import has_shards, whole_shape
from ..model.tree import base_layer, has_adapters, loaded_from, walk
from ..reconstruction.progress import fingerprint_of_model
from .names import public_name
from .schema import ModelFacts, SavedModel


def describe_model(model: nn.Module) -> ModelFacts:
    """Return what a report tells about a model.

    Args:
        model: the model, with or without adapters.
    """
    base = base_model(model)
    # Without what adapters add, and a tied parameter once.
    layers = [base_layer(module) for _, module in walk("", base)]
    plain = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}.values()
    dtypes: Counter[str] = Counter()
    for parameter in plain:
        dtypes[str(parameter.dtype).removeprefix("torch.")] += _count(parameter)
    try:
        pruned = {id(weight.storage): weight.storage for weight in prunable_weights(model).values()}
    except ValueError:
        # A model without blocks, or without a weight of a kind that is pruned.
        pruned = {}
    configs = getattr(model, "peft_config", None) or getattr(base, "peft_config", None)
    adapter = next(iter(configs.values())).peft_type if has_adapters(model) and configs else None
    return ModelFacts(
        name=public_name(loaded_from(model)),
        kind=type(base).__name__,
        dtype=dtypes.most_common(1)[0][0] if dtypes else "none",
        parameters=sum(map(_count, plain)),
        prunable=sum(map(_count, pruned.values())),
        trained=sum(_count(p) for p in model.parameters() if p.requires_grad),
        adapter=None if adapter is None else str(getattr(adapter, "value", adapter)),
        fingerprint=None if has_shards(base) else fingerprint_of_model(model),
    )


def describe_saved(
    output_dir: str | Path, folder: str, model: nn.Module, *, kind: str = "model", base: str | None = None
) -> SavedModel:
    """Return what a report tells about a folder that was saved, with the digests of its weights.

    Args:
        output_dir: the folder of the report.
        folder: the saved folder, relative to `output_dir`.
        model: the model that was saved, which says by which class it is loaded.
        kind: "model" or "adapter".
        base: for an adapter, the folder of its base model relative to `output_dir`, or its name on the Hub.
    """
    files = sorted((Path(output_dir) / folder).glob("*.safetensors"))
    return SavedModel(
        folder,
        kind,
        auto_class_of(model),
        base,
        sum(file.stat().st_size for file in files),
        {file.name: _digest(file) for file in files},
    )


def auto_class_of(model: nn.Module) -> str:
    """Return the name of the class of Transformers that loads a model like `model`."""
    base: Any = base_model(model)
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        if type(base) in auto._model_mapping.values():
            return str(auto.__name__)
    return type(base).__name__


def _count(parameter: Any) -> int:
    # bitsandbytes packs two entries of 4 bits into one byte.
    packed = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int((whole_shape(parameter) if packed is None else packed).numel())


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
