"""What a long run keeps on disk of the regions it is done with, so that it goes on where it was killed."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Progress:
    """A folder with one file per finished region, and the fingerprint of the run that wrote them.

    Files appear whole or not at all, so that a run killed at any moment leaves a folder that can be resumed from.

    Args:
        folder: where; None keeps nothing.
        fingerprint: what must be the same for the results to be reused, by name.

    Raises:
        ValueError: the folder was written by another run.
    """

    def __init__(self, folder: str | Path | None, fingerprint: Mapping[str, str]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self.folder / "fingerprint.json"
        if written.exists():
            found = json.loads(written.read_text())
            differing = [name for name in fingerprint if found.get(name) != fingerprint[name]]
            if differing:
                raise ValueError(
                    f"{str(self.folder)!r} holds the state of a run with another {', '.join(differing)}. Resume with "
                    "the same model, data and arguments, or delete the folder to start again."
                )
        else:
            _write_whole(written, json.dumps(dict(fingerprint), indent=2).encode())

    def load(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and notes of region `number` if it was finished, else None."""
        path = self._path(number)
        if path is None or not path.exists():
            return None
        return load_file(path), json.loads(path.with_suffix(".json").read_text())

    def save(self, number: int, tensors: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
        """Keep the tensors and notes of region `number`."""
        path = self._path(number)
        if path is None:
            return
        _write_whole(path.with_suffix(".json"), json.dumps(notes).encode())
        unfinished = _unfinished(path)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
        # Renamed last: whoever finds it finds the notes too.
        os.replace(unfinished, path)

    def _path(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{number:05d}.safetensors"


def fingerprint_of_model(model: nn.Module) -> str:
    """Return a hash of names, shapes and sums of all parameters that are loaded, the same on every device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta and parameter.numel():
            # Sums of integers: those of floats depend on the order, and so on the number of threads.
            bits = parameter.detach().contiguous().flatten().view(_INTEGERS[parameter.element_size()])
            sums = torch.stack([part.sum(dtype=torch.int64) for part in bits.split(1 << 20)])
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint_of_inputs(inputs: Iterable[Mapping[str, Any]]) -> str:
    """Return a hash of model inputs."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in inputs:
        for name, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


def _unfinished(path: Path) -> Path:
    # Processes that share the folder may write the same file at once.
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = _unfinished(path)
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
