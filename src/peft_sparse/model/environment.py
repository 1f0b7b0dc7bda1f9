"""Command, versions, hardware and peak memory of this process, and what it did to a model, for reports and cards."""

import importlib.metadata
import platform
import sys
import weakref
from typing import Any

import psutil
import torch
from torch import nn

from .tree import base_model


PACKAGES = ("peft_sparse", "torch", "transformers", "peft", "accelerate")

# By the base model, which stays the same object when adapters are attached and merged.
_DONE: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def environment() -> dict[str, Any]:
    """Return command, versions, hardware and number of threads of this process, as values that JSON can hold."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
    }


def check_device(device: torch.device | str | int | None, is_there: bool = True) -> None:
    """Check that weights can be moved to `device`. None stands for where they are.

    Args:
        device: the device.
        is_there: whether to check that this machine has it, too.

    Raises:
        ValueError: it is no device, or the meta device, which holds no values, or not there.
    """
    if device is None:
        return
    try:
        reason = "it holds no values" if torch.device(device).type == "meta" else None
        if is_there:
            torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    if reason is not None:
        raise ValueError(
            f'Expected `device` to be a device of this machine, such as "cpu" or "cuda:0", got {device!r}: {reason}.'
        )


def peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes.

    With CUDA, it is the memory that torch allocated on the current GPU. Otherwise it is the resident memory of the
    process.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        # Windows does not have this module.
        import resource
    except ImportError:
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def remember(model: nn.Module, **done: Any) -> None:
    """Note what was done to a model, for its model card. The notes go when the model does.

    Args:
        model: the model, with or without adapters.
        done: the reports as plain values, by what was done: `pruning`, `reconstruction`, `retraining`. A
            later report replaces an earlier one of its kind.
    """
    _DONE.setdefault(base_model(model), {}).update(done)


def remembered(model: nn.Module) -> dict[str, Any]:
    """Return what `remember` noted about a model. Empty for a model that was loaded and not changed."""
    return dict(_DONE.get(base_model(model), {}))


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as cpuinfo:
            names = {line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")}
        return f"{', '.join(sorted(names)) or platform.machine()}, CPU"
    return f"{platform.processor() or platform.machine()}, CPU"
