"""Tells what a checkpoint holds: its zeros, n:m, fingerprints and dtypes, and what an adapter is for."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..pruning.checkpoint_files import files_of_index
from .folders import check_hub_id, read_json
from .inspection_report import AdapterInspection, CheckpointInspection, MatrixInspection, in_order
from .mask_summary import summary_of
from .packing import is_packed, unmarked
from .stored_tensors import StoredTensor, stored_tensors


ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Models whose blocks store every matrix as (in, out), in transformers' `Conv1D`.
_TRANSPOSED = {"gpt2", "imagegpt", "openai-gpt", "decision_transformer"}
# Names of tensors that hold packed integers, and who writes them.
_PACKED_INTEGERS = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
}

# Returns where a file of the checkpoint lies, or None if it has no such file.
Find = Callable[[str], Path | None]


def inspect_checkpoint(source: str | Path) -> CheckpointInspection:
    """Return what a checkpoint holds, without building its model.

    The files are read tensor by tensor, a large tensor in pieces. Of a packed checkpoint only the masks are read. Any
    program may have written the checkpoint: safetensors in one file or in shards, packed ones of this package,
    `pytorch_model.bin` (tensors only, nothing in it is run), or an adapter of PEFT.

    A matrix is a tensor of floating-point numbers with two axes or more. Its inputs are on the last axis, except in
    models that store matrices as (in, out), such as GPT-2. The file does not tell what the axes of three-dimensional
    tensors are. n:m is the one with the smallest m, of 2, 4, 8, 16 and 32, that every group of m entries keeps.

    Args:
        source: a folder, a file with tensors, or the id of a repository on the Hub, whose files are downloaded one
            after another.

    Returns:
        Its matrices and their totals. `str` gives a text, `to_dict` what JSON can hold.

    Raises:
        ValueError: `source` is no folder and no file, or has no weights; a file is damaged.
    """
    if Path(source).is_file():
        return _of_model(str(source), {}, [Path(source).name], lambda name: Path(source))
    find = _finder(source)
    if (path := find(ADAPTER_CONFIG)) is not None:
        return _of_adapter(str(source), read_json(path), find)
    path = find(CONFIG_NAME)
    config = {} if path is None else read_json(path)
    return _of_model(str(source), config, _weights(str(source), config, find), find)


def _finder(source: str | Path) -> Find:
    if Path(source).is_dir():
        return lambda name: path if (path := Path(source) / name).is_file() else None
    check_hub_id(source)

    def download(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(str(source), name))
        except EntryNotFoundError:
            return None

    return download


def _weights(source: str, config: dict[str, Any], find: Find) -> list[str]:
    """Return the names of the files with the weights."""
    names: tuple[str, ...] = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    named = (unmarked(config) if is_packed(config) else config).get("transformers_weights")
    for name in (named,) if named else names:
        if (path := find(name)) is not None:
            if not name.endswith(".json"):
                return [name]
            return files_of_index(path, there=False)
    raise ValueError(
        f"Expected weights in {source!r}: {named or ', '.join(names)}. Found none. Give the folder of a saved model "
        "or adapter, or check the name and the connection to the Hub."
    )


def _of_model(source: str, config: dict[str, Any], names: list[str], find: Find) -> CheckpointInspection:
    transposed = config.get("model_type") in _TRANSPOSED
    matrices: list[MatrixInspection] = []
    entries: Counter[str] = Counter()
    notes: list[str] = []
    size = count = 0
    for name in names:
        path = find(name)
        if path is None:
            raise ValueError(f"{source!r} lacks {name!r}, which its index names. Copy or download it again.")
        size += path.stat().st_size
        for tensor in stored_tensors(path):
            count += 1
            entries[tensor.dtype] += math.prod(tensor.shape)
            notes += _note(tensor)
            if tensor.masks is not None and len(tensor.shape) > 1 and 0 not in tensor.shape:
                matrices.append(_matrix(tensor, transposed))
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and not is_packed(config):
        notes.insert(0, f"Quantised by {method}: integers are not read as weights.")
    if any(len(matrix.shape) == 3 for matrix in matrices):
        notes.append("Tensors with three axes are stacked matrices. Which axis the inputs are on is not known.")
    kind = "packed model" if is_packed(config) else "model"
    return CheckpointInspection(
        source, kind, size, count, dict(entries), in_order(matrices), tuple(dict.fromkeys(notes)), None
    )


def _matrix(tensor: StoredTensor, transposed: bool) -> MatrixInspection:
    assert tensor.masks is not None
    is_inside = any(part.isdigit() for part in tensor.name.split("."))
    turned = transposed and is_inside and len(tensor.shape) == 2
    found = summary_of(tensor.masks(), tensor.shape, turned)
    across = f"{found.pattern_across} across the inputs" if found.pattern_across else None
    if len(tensor.shape) == 3:
        pattern = f"{found.pattern} on the last axis" if found.pattern else None
        across = f"{found.pattern_across} on the second axis" if found.pattern_across else None
    else:
        pattern = found.pattern
    return MatrixInspection(
        tensor.name,
        tensor.shape,
        tensor.dtype,
        found.zeros,
        found.zeros / math.prod(tensor.shape),
        pattern or across,
        found.fingerprint,
        is_inside,
    )


def _note(tensor: StoredTensor) -> list[str]:
    writer = next((writer for ending, writer in _PACKED_INTEGERS.items() if tensor.name.endswith(ending)), None)
    return [f"Holds packed integers of {writer}: their zeros are not read."] if writer else []


def _of_adapter(source: str, config: dict[str, Any], find: Find) -> CheckpointInspection:
    path = next((path for name in _ADAPTER_WEIGHTS if (path := find(name)) is not None), None)
    if path is None:
        raise ValueError(f"{source!r} has {ADAPTER_CONFIG} and lacks {_ADAPTER_WEIGHTS[0]}. Save the adapter again.")
    entries: Counter[str] = Counter()
    names = []
    for tensor in stored_tensors(path):
        names.append(tensor.name)
        entries[tensor.dtype] += math.prod(tensor.shape)
    fingerprints = config.get("mask_fingerprints") or {}
    saved = sum(name.endswith("_mask") for name in names) if config.get("save_mask") else 0
    adapter = AdapterInspection(
        peft_type=config.get("peft_type"),
        base_model=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        task_type=config.get("task_type"),
        r=config.get("r"),
        alpha=config.get("lora_alpha"),
        target_modules=config.get("target_modules"),
        saved_masks=saved,
        fingerprints=len(fingerprints),
        other_pruned=len(config.get("other_sparsities") or {}),
    )
    matrices = in_order([_of_fingerprint(name, proof) for name, proof in fingerprints.items()])
    size = path.stat().st_size
    return CheckpointInspection(source, "adapter", size, len(names), dict(entries), matrices, (), adapter)


def _of_fingerprint(name: str, proof: str) -> MatrixInspection:
    """Return what an adapter tells of the weight that it belongs to."""
    first = proof.partition(";")[0]
    shape, zeros, _ = first.split(":")
    rows, columns = map(int, shape.split("x"))
    share = int(zeros) / (rows * columns)
    return MatrixInspection(name, (rows, columns), "-", int(zeros), share, None, first, True)
