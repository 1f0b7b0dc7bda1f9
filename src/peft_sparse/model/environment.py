"""Command, versions, hardware and peak memory of this process, for reports."""

import importlib.metadata
import platform
import resource
import sys
from typing import Any

import torch


PACKAGES = ("peft_sparse", "torch", "transformers", "peft", "accelerate")


def environment() -> dict[str, Any]:
    """Return command, versions, hardware and number of threads of this process, as values that JSON can hold."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
    }


def peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes.

    With CUDA, it is the memory that torch allocated on the current GPU. Otherwise it is the resident memory of the
    process.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as cpuinfo:
            names = {line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")}
        return f"{', '.join(sorted(names)) or platform.machine()}, CPU"
    return f"{platform.processor() or platform.machine()}, CPU"
