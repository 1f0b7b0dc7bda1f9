"""Keeps finished regions on disk, so that a run that was killed can be resumed."""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


_FINGERPRINT = "fingerprint.json"


def is_progress(folder: Path) -> bool:
    """Return whether a run has begun to keep its regions in `folder`."""
    return (folder / _FINGERPRINT).is_file()


def foreign_files(folder: Path) -> list[str]:
    """Return the names of what lies in `folder` and was not written by a `Progress`."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own = re.compile(rf"{re.escape(_FINGERPRINT)}.*|\d{{5}}\.(json|safetensors).*")
    return [name for name in names if not own.fullmatch(name)]


class Progress:
    """A folder with one file for each finished region, and the fingerprint of the run that wrote them.

    A file is renamed to its final name once it is complete. A run that is killed at any moment therefore leaves a
    folder that can be resumed from.

    Args:
        folder: the folder; None keeps nothing.
        fingerprint: hashes and texts, by name. All must be equal for the results of an earlier run to be reused.
        by_region: whether the dense weights of each finished region are compared too. This is needed if `fingerprint`
            does not include the weights.

    Raises:
        ValueError: the folder was written by a run with another fingerprint.
    """

    def __init__(self, folder: str | Path | None, fingerprint: Mapping[str, str], by_region: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.by_region = by_region and folder is not None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self.folder / _FINGERPRINT
        if written.exists():
            found = json.loads(written.read_text())
            differing = [name for name in fingerprint if found.get(name) != fingerprint[name]]
            if differing:
                raise ValueError(self._of_another(differing))
        else:
            _write_whole(written, json.dumps(dict(fingerprint), indent=2).encode())

    def of_region(self, parameters: Mapping[str, Tensor]) -> str | None:
        """Return the fingerprint of a region before it is pruned, for `load` and `save`; None without `by_region`."""
        return fingerprint_of_tensors(parameters.items()) if self.by_region else None

    def load(self, number: int, as_read: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and notes of region `number`, or None if it is not finished.

        Raises:
            ValueError: the region was finished from weights with another fingerprint than `as_read`.
        """
        path = self._path(number)
        if path is None or not path.exists():
            return None
        notes = json.loads(path.with_suffix(".json").read_text())
        if notes.pop("as_read") != as_read:
            raise ValueError(self._of_another(["model"]))
        return load_file(path), notes

    def save(
        self, number: int, tensors: Mapping[str, Tensor], notes: dict[str, Any], as_read: str | None = None
    ) -> None:
        """Keep the tensors and notes of region `number`; `as_read` is its fingerprint before it was pruned."""
        path = self._path(number)
        if path is None:
            return
        _write_whole(path.with_suffix(".json"), json.dumps(notes | {"as_read": as_read}).encode())
        unfinished = _unfinished(path)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
        # Renamed last, so that a region that is found has its notes.
        os.replace(unfinished, path)

    def _of_another(self, differing: list[str]) -> str:
        return (
            f"{str(self.folder)!r} holds the state of a run with another {', '.join(differing)}. Resume with the same "
            "model, data and arguments, or delete the folder to start again."
        )

    def _path(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{number:05d}.safetensors"


def fingerprint_of_model(model: nn.Module) -> str:
    """Return a hash of the names, shapes, dtypes and sums of all parameters. It is the same on every device."""
    return fingerprint_of_tensors(model.named_parameters())


def fingerprint_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of the names, shapes, dtypes and sums of `tensors`. A tensor on the meta device has no sum."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in tensors:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta and parameter.numel():
            # Sums of integers, because a sum of floats depends on the number of threads.
            bits = parameter.detach().contiguous().flatten().view(_INTEGERS[parameter.element_size()])
            sums = torch.stack([part.sum(dtype=torch.int64) for part in bits.split(1 << 20)])
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _unfinished(path: Path) -> Path:
    # Processes that share the folder may write the same file at the same time.
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = _unfinished(path)
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
