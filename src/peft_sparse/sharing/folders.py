"""Where a checkpoint is read from, and how a folder appears as a whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..pruning.checkpoint_files import files_of_index


# Weights in formats that are not read here. A Hub repository often has them beside safetensors.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.ot", "*.tflite")


def local_folder(source: str | Path) -> Path:
    """Return the folder of a checkpoint. One on the Hub is downloaded into the cache.

    Args:
        source: a folder, or the id of a repository on the Hub.

    Raises:
        ValueError: `source` is a path and there is no such folder.
    """
    if Path(source).is_dir():
        return Path(source)
    check_hub_id(source)
    return Path(snapshot_download(str(source), ignore_patterns=list(OTHER_WEIGHTS)))


def check_hub_id(source: str | Path) -> None:
    """Check that `source` may be the id of a repository.

    Raises:
        ValueError: it is a path.
    """
    text = str(source)
    if isinstance(source, Path) or text.count("/") > 1 or text.startswith((".", "/", "~")) or "\\" in text:
        raise ValueError(f"Expected a folder or the id of a repository on the Hub, got {text!r}, which is no folder.")


@contextlib.contextmanager
def finished_folder(target: str | Path) -> Iterator[Path]:
    """Give a folder to write to, that is renamed to `target` at the end, or removed if an error occurs.

    Args:
        target: a folder that does not exist or is empty.

    Raises:
        ValueError: `target` holds files.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"Expected {str(target)!r} not to exist or to be empty. Give another `target`.")
    scratch = target.absolute().parent / f".{target.name}.unfinished-{os.getpid()}"
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder, or an empty dict if there is none."""
    path = folder / CONFIG_NAME
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> Any:
    """Return what a JSON file of a checkpoint holds.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}. Copy or download it again.") from error


def weight_names(folder: Path, named: str | None = None) -> list[str]:
    """Return the safetensors files with the weights of a checkpoint, after their index if there is one.

    Args:
        folder: the folder of the checkpoint.
        named: the file or index that the configuration names in `transformers_weights`.
    """
    candidates = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    found = next((name for name in candidates if (folder / name).is_file()), None)
    if found is None:
        return []
    if not found.endswith(".json"):
        return [found]
    return [found, *files_of_index(folder / found)]
