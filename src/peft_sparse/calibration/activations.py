"""Keeps hidden states and targets between blocks: on the device, in CPU memory or on disk."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .memory import empty_apart


Activations = Literal["device", "cpu", "disk"]


# The bytes of memory that are taken together at most.
_SLAB = 1 << 26


class ActivationStore:
    """Keeps tensors on the device they come from, in CPU memory, or in files.

    Files lie in a temporary folder, which is removed together with the store.

    Args:
        activations: "device", "cpu" or "disk".
    """

    def __init__(self, activations: Activations) -> None:
        self.offload = activations != "device"
        # The last copy from each GPU to the CPU.
        self._written: dict[torch.device, torch.cuda.Event] = {}
        self._free: dict[tuple[torch.Size, torch.dtype, torch.device, bool], list[Tensor]] = {}
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
        room.copy_(value, non_blocking=True)
        self._written[value.device] = torch.cuda.current_stream(value.device).record_event()
        return room

    def get(self, kept: Tensor | Path, device: torch.device | None = None) -> Tensor:
        """Return the tensor that was kept. It is on the device or, if it was offloaded, in CPU memory.

        Args:
            kept: what `put` or `copy` returned.
            device: the device on which the caller wants it. Without one, it stays where it was kept.
        """
        there = kept if isinstance(kept, Tensor) else load_file(kept)["value"]
        if device is not None and device.type == "cuda" and there.device.type == "cpu":
            # Copies of one GPU are made in their order. Those of another GPU must have arrived first.
            for written in self._written.values():
                torch.cuda.current_stream(device).wait_event(written)
            return there.to(device, non_blocking=there.is_pinned())
        for written in self._written.values():
            # The host reads, or may read, what a GPU is still writing.
            written.synchronize()
        return there if device is None else there.to(device)


def check_activations(activations: str) -> None:
    """Check the argument `activations`.

    Raises:
        ValueError: `activations` is not one of "device", "cpu" and "disk".
    """
    if activations not in get_args(Activations):
        choices = ", ".join(map(repr, get_args(Activations)))
        raise ValueError(f"`activations` must be one of {choices}, got {activations!r}.")
