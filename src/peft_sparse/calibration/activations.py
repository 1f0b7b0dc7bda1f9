"""Keeps hidden states and targets between blocks: on the device, in CPU memory or on disk."""

import shutil
import tempfile
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .copies import Copies
from .memory import empty_apart


Activations = Literal["device", "cpu", "disk"]


# The bytes of memory that are taken together at most.
_SLAB = 1 << 26


class ActivationStore:
    """Keeps tensors on the device they come from, in CPU memory, or in files.

    Within `overlapping()`, a GPU copies them from and into CPU memory while it computes. On a CPU nothing is copied.
    Files lie in a temporary folder, which is removed together with the store.

    Args:
        activations: "device", "cpu" or "disk".
    """

    def __init__(self, activations: Activations) -> None:
        self.offload = activations != "device"
        self._copies = Copies()
        self._free: dict[tuple[torch.Size, torch.dtype, torch.device, bool], list[Tensor]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="peft_sparse-")) if activations == "disk" else None
        if self._folder is not None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def overlapping(self) -> AbstractContextManager[None]:
        """Return a context within which a GPU copies what waits in CPU memory while it computes."""
        return self._copies.overlapping()

    def put(self, key: str, value: Tensor, room: Tensor | Path | None = None) -> Tensor | Path:
        """Keep `value` and return what `get` takes. On disk, it replaces the value kept under the same `key`.

        Args:
            key: the name of the file on disk.
            value: the tensor.
            room: what was kept before and nobody needs any more. What a GPU computed is written over it if it fits.
        """
        if self._folder is None:
            if self.offload and value.is_cuda:
                return self.copy(key, value, room if isinstance(room, Tensor) else None)
            return value.cpu() if self.offload else value
        path = self._folder / f"{key}.safetensors"
        save_file({"value": value.cpu().contiguous()}, path)
        return path

    def copy(self, key: str, value: Tensor, room: Tensor | None = None, alike: int = 1) -> Tensor | Path:
        """Keep a copy of `value` and return what `get` takes. On disk, this is what `put` does.

        Copies of one shape lie side by side, apart from what is computed. A copy that replaces another one takes no
        new memory.

        Args:
            key: the name of the file on disk.
            value: the tensor.
            room: a copy that nobody needs any more. It is overwritten if `value` fits.
            alike: how many copies of this shape will follow, this one included. Memory is taken for all of them.
        """
        if self._folder is not None:
            return self.put(key, value)
        device = torch.device("cpu") if self.offload else value.device
        # From and into memory that is pinned, a GPU copies without making the host wait.
        pinned = self.offload and value.is_cuda
        layout = value.shape, value.dtype, device, pinned
        if room is None or (room.shape, room.dtype, room.device, pinned and room.is_pinned()) != layout:
            free = self._free.pop(layout, [])
            if not free:
                count = max(1, min(alike, _SLAB // max(1, value.nbytes)))
                free = list(empty_apart((count, *value.shape), value, device, pinned).unbind())
            room = free.pop(0)
            if free:
                self._free[layout] = free
        if not pinned:
            return room.copy_(value)
        self._copies.write(value, room)
        return room

    def expect(self, kept: Tensor | Path, device: torch.device) -> None:
        """Within `overlapping()`, begin to copy to a GPU what `get` will be asked for next."""
        if isinstance(kept, Tensor) and device.type == "cuda" and kept.device.type == "cpu":
            self._copies.expect(kept, device)

    def get(self, kept: Tensor | Path, device: torch.device | None = None) -> Tensor:
        """Return the tensor that was kept. It is on the device or, if it was offloaded, in CPU memory.

        Args:
            kept: what `put` or `copy` returned, or another tensor that waits.
            device: the device on which the caller wants it. Without one, it stays where it was kept.
        """
        there = kept if isinstance(kept, Tensor) else load_file(kept)["value"]
        if device is not None and device.type == "cuda" and there.device.type == "cpu":
            return self._copies.fetch(there, device)
        # The host reads, or may read, what a GPU is still writing.
        self._copies.wait()
        return there if device is None else there.to(device)


def check_activations(activations: str) -> None:
    """Check the argument `activations`.

    Raises:
        ValueError: `activations` is not one of "device", "cpu" and "disk".
    """
    if activations not in get_args(Activations):
        choices = ", ".join(map(repr, get_args(Activations)))
        raise ValueError(f"`activations` must be one of {choices}, got {activations!r}.")
