"""What a model card tells, gathered from the model, its folder and the reports of its run. Nothing is assumed."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from safetensors import safe_open
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME

from ..model.blocks import Targets, base_model, prunable_weights
from ..model.environment import remembered
from ..model.kinds import count_zeros, obstacle
from ..model.masks import mask_of
from ..model.tree import is_hub_name, loaded_from
from ..model.weights import zero_counts
from ..tuners.layer import SparseLoraLayer
from .packed_file import MARK


Kind = Literal["adapter", "residual", "plain", "packed"]

WEIGHT_FILES = ("*.safetensors", "*.bin")

# The classes that load a model, with Transformers' tables of the models that each of them loads.
_TABLES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
_CLASS_OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class WeightZeros:
    """The zeros of one weight.

    Args:
        name: the name of its layer.
        shape: (out, in).
        zeros: how many of its entries are zero.
    """

    name: str
    shape: tuple[int, int]
    zeros: int


@dataclass(frozen=True)
class Facts:
    """What is known of a saved model.

    Args:
        kind: "adapter" of this package, "residual" for a LoRA adapter of `residual_lora`, "plain", or "packed".
        weights: the zeros of each pruned or adapted weight. Empty if they are not known.
        counted: what `weights` are.
        sparsity: the fraction of zeros, where it is known without those of each weight.
        done: reports as plain values, by what was done: `pruning`, `reconstruction`, `retraining`, `stages`, `texts`.
        base: the name or folder of the base model.
        base_is_given: whether a user has named the base. It is then the one that the adapter belongs to.
        auto_class: the class of Transformers that loads the model, or the base model of an adapter.
        adapter: the configuration of the adapter as plain values.
        sizes: sizes in bytes, by what was measured.
        repo_id: the name on the Hub.
    """

    kind: Kind
    weights: tuple[WeightZeros, ...] = ()
    counted: str = "prunable weights of this model"
    sparsity: float | None = None
    done: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    base_is_given: bool = False
    auto_class: str = "AutoModel"
    adapter: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    repo_id: str | None = None

    @property
    def share(self) -> float | None:
        """The fraction of zeros in all weights. None if it is not known."""
        entries = sum(weight.shape[0] * weight.shape[1] for weight in self.weights)
        return sum(weight.zeros for weight in self.weights) / entries if entries else self.sparsity

    @property
    def brings_all_masks(self) -> bool:
        """Whether an adapter brings the masks of all pruned weights, so that it can be loaded onto the dense model."""
        return bool(self.adapter.get("save_mask")) and not self.adapter.get("other_sparsities")


def origin_of(base: str | None) -> str | None:
    """Return the Hub name of the model from which the model in the folder `base` was made, as its card tells it."""
    card = Path(base) / "README.md" if base and os.path.isdir(base) else None
    if card is None or not card.exists():
        return None
    named = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model")
    return named if isinstance(named, str) and is_hub_name(named) else None


def _zeros_of_model(model: nn.Module, targets: tuple[Targets, Targets]) -> dict[str, Any]:
    """Return the zeros of each prunable weight, or of all together where a weight is computed or quantised."""
    try:
        weights = prunable_weights(model, *targets)
        if any(obstacle(weight) for weight in weights.values()):
            zeros, entries = count_zeros(weights)
            return {"sparsity": zeros / entries} if entries else {}
    except ValueError:
        # It has no blocks that this package knows, or weights that cannot be read.
        return {}
    counts = zero_counts(weights)
    return {"weights": tuple(WeightZeros(name, weights[name].shape, zeros) for name, (zeros, _) in counts.items())}


def zeros_under_adapter(model: nn.Module, adapter_name: str) -> tuple[WeightZeros, ...]:
    """Return the zeros of the base weights that have the adapter, of those that can be read."""
    found = []
    for name, module in base_model(model).named_modules():
        if isinstance(module, SparseLoraLayer) and adapter_name in module.A and module._readable():
            weight = module.pruned_weight()
            if weight.numel() and not weight.is_meta:
                matrix = weight.reshape(-1, weight.shape[-1])
                zeros = matrix.numel() - int(mask_of(matrix).count_nonzero())
                found.append(WeightZeros(name, (matrix.shape[0], matrix.shape[1]), zeros))
    return tuple(found)


def zeros_in_fingerprints(fingerprints: Mapping[str, str]) -> tuple[WeightZeros, ...]:
    """Return the zeros that the fingerprints of an adapter state."""
    found = []
    for name, proof in fingerprints.items():
        shape, zeros, _ = proof.partition(";")[0].split(":")
        rows, columns = map(int, shape.split("x"))
        found.append(WeightZeros(name, (rows, columns), int(zeros)))
    return tuple(found)


def zeros_in_report(pruning: Mapping[str, Any] | None) -> tuple[WeightZeros, ...]:
    """Return the zeros that the report of a pruning states."""
    return tuple(
        WeightZeros(weight["name"], (rows, columns), round(weight["sparsity"] * rows * columns))
        for weight in (pruning or {}).get("weights", ())
        for rows, columns in [weight["shape"]]
    )


def zeros_in_files(folder: str | Path) -> tuple[WeightZeros, ...]:
    """Return the zeros of the matrices inside the blocks of a saved model, one matrix in memory at a time.

    Names inside blocks have a number. Embeddings and output heads have none.
    """
    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, the file is no dict
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and re.search(r"\.\d+\.", name):
                    matrix = file.get_tensor(name)
                    zeros = matrix.numel() - int(matrix.count_nonzero())
                    found.append(WeightZeros(name.removesuffix(".weight"), (shape[0], shape[1]), zeros))
    return tuple(found)


def class_of_task(task_type: Any) -> str:
    """Return the class that loads a model for the `TaskType` of an adapter. None is shown as a causal model."""
    value = getattr(task_type, "value", task_type)
    return _CLASS_OF_TASK.get(str(value or "CAUSAL_LM"), "AutoModel")


def class_of_architecture(architecture: str | None) -> str:
    """Return the class of Transformers that loads a model of this class, such as "LlamaForCausalLM"."""
    for auto_class, table in _TABLES.items():
        names = getattr(modeling_auto, table, {}).values()
        if architecture in {name for value in names for name in ([value] if isinstance(value, str) else value)}:
            return auto_class
    return "AutoModel"


def size_of_weights(folder: str | Path) -> int | None:
    """Return the bytes of the weights in a folder. None if there are none."""
    files = [path for pattern in WEIGHT_FILES for path in Path(folder).glob(pattern) if path.stem != "training_args"]
    return sum(path.stat().st_size for path in files) if files else None


def facts_of_model(
    model: nn.Module, folder: str | Path, *, targets: tuple[Targets, Targets] = (None, None), **others: Any
) -> Facts:
    """Return what is known of a plain model in memory, which was saved to `folder`.

    Args:
        model: the model, without adapters.
        folder: the folder of its files.
        targets: which layers are counted, and which are not, as in `sparsity`.
        others: fields of `Facts` that replace what is found.
    """
    found: dict[str, Any] = {"kind": "plain", "base": loaded_from(model), "done": remembered(model)}
    if "weights" not in others and "sparsity" not in others:
        found |= _zeros_of_model(model, targets)
    found["auto_class"] = class_of_architecture(type(base_model(model)).__name__)
    size = size_of_weights(folder)
    found["sizes"] = {} if size is None else {"on disk": size}
    return Facts(**found | others)


def facts_of_folder(folder: str | Path, **others: Any) -> Facts:
    """Return what the files in a folder tell of a saved adapter, a plain model or a packed one.

    Args:
        folder: the folder.
        others: fields of `Facts` that replace what is found.

    Raises:
        ValueError: the folder holds neither an adapter nor a model.
    """
    folder = Path(folder)
    size = size_of_weights(folder)
    found: dict[str, Any] = {"sizes": {} if size is None else {"on disk": size}}
    if (folder / ADAPTER_CONFIG).exists():
        adapter = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        found["kind"] = "adapter"
        found["adapter"] = adapter
        found["base"] = adapter.get("base_model_name_or_path")
        found["auto_class"] = class_of_task(adapter.get("task_type"))
        found["weights"] = zeros_in_fingerprints(adapter.get("mask_fingerprints") or {})
    elif (folder / CONFIG_NAME).exists():
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        packed = (config.get("quantization_config") or {}).get("quant_method") == MARK
        found["kind"] = "packed" if packed else "plain"
        found["auto_class"] = class_of_architecture(next(iter(config.get("architectures") or [None])))
    else:
        raise ValueError(
            f"The folder {str(folder)!r} holds neither {CONFIG_NAME} nor {ADAPTER_CONFIG}. Give the folder of a saved "
            "model or adapter, such as `output_dir/sparse` of a compression."
        )
    return Facts(**found | others)
