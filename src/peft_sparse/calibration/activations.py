"""Where hidden states and targets wait between blocks: on the device, in CPU memory or on disk."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Literal, get_args

from safetensors.torch import load_file, save_file
from torch import Tensor


Activations = Literal["device", "cpu", "disk"]


class ActivationStore:
    """Where activations wait: as they are, in CPU memory, or in files of a folder that is removed with the store."""

    def __init__(self, activations: Activations) -> None:
        self.offload = activations != "device"
        self._folder = Path(tempfile.mkdtemp(prefix="peft_sparse-")) if activations == "disk" else None
        if self._folder is not None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def put(self, key: str, value: Tensor) -> Tensor | Path:
        """Return what `get` takes; on disk a value of the same key is replaced."""
        if self._folder is None:
            return value.cpu() if self.offload else value
        path = self._folder / f"{key}.safetensors"
        save_file({"value": value.cpu().contiguous()}, path)
        return path

    def get(self, kept: Tensor | Path) -> Tensor:
        """Return what was put, wherever it is."""
        return kept if isinstance(kept, Tensor) else load_file(kept)["value"]


def check_activations(activations: str) -> None:
    """Raise ValueError unless `activations` is one of its choices."""
    if activations not in get_args(Activations):
        choices = ", ".join(map(repr, get_args(Activations)))
        raise ValueError(f"`activations` must be one of {choices}, got {activations!r}.")
