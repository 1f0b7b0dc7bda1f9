"""Keeps hidden states and targets between blocks: on the device, in CPU memory or on disk."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Literal, get_args

from safetensors.torch import load_file, save_file
from torch import Tensor


Activations = Literal["device", "cpu", "disk"]


class ActivationStore:
    """Keeps tensors on the device they come from, in CPU memory, or in files.

    Files lie in a temporary folder, which is removed together with the store.

    Args:
        activations: "device", "cpu" or "disk".
    """

    def __init__(self, activations: Activations) -> None:
        self.offload = activations != "device"
        self._folder = Path(tempfile.mkdtemp(prefix="peft_sparse-")) if activations == "disk" else None
        if self._folder is not None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def put(self, key: str, value: Tensor) -> Tensor | Path:
        """Keep `value` and return what `get` takes. On disk, it replaces the value kept under the same `key`."""
        if self._folder is None:
            return value.cpu() if self.offload else value
        path = self._folder / f"{key}.safetensors"
        save_file({"value": value.cpu().contiguous()}, path)
        return path

    def get(self, kept: Tensor | Path) -> Tensor:
        """Return the tensor that was kept. It is on the device or, if it was offloaded, in CPU memory."""
        return kept if isinstance(kept, Tensor) else load_file(kept)["value"]


def check_activations(activations: str) -> None:
    """Check the argument `activations`.

    Raises:
        ValueError: `activations` is not one of "device", "cpu" and "disk".
    """
    if activations not in get_args(Activations):
        choices = ", ".join(map(repr, get_args(Activations)))
        raise ValueError(f"`activations` must be one of {choices}, got {activations!r}.")
