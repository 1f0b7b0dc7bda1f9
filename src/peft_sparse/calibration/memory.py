"""Memory for what stays while blocks run, apart from the memory of what comes and goes with each batch."""

import ctypes
import functools
import math
import mmap
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def empty_apart(shape: tuple[int, ...], like: Tensor, device: torch.device, pinned: bool = False) -> Tensor:
    """Return a tensor without values.

    In the CPU's memory, the system gives it pages of its own. Between the tensors of a block that runs, where the C
    library would put it, it would split the memory that they leave, and the next ones would take more.

    Args:
        shape: its shape.
        like: a tensor of its dtype.
        device: its device.
        pinned: whether a GPU copies from and into it without making the host wait.
    """
    size = math.prod(shape) * like.element_size()
    if device.type != "cpu" or pinned or not size or isinstance(like, FakeTensor):
        return torch.empty(shape, dtype=like.dtype, device=device, pin_memory=pinned)
    # By default the pages would be shared with processes that are forked. Windows has no such flag, and no fork.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=like.dtype).view(shape)


def give_back_freed() -> None:
    """Give the memory that is freed back to the system, where the C library would keep it (glibc, on Linux)."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    # Not on other systems, whose C libraries have no such function.
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
