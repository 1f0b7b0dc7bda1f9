"""The seven zero-shot tasks of the pruning papers, and their rows from files."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ZeroShotTask:
    """A task of the papers.

    Args:
        title: its name in a table.
        folder: where lm-eval defines it, below its folder of tasks.
        file: the name of a file with its rows, without ".jsonl".
        split: the split that lm-eval evaluates.
        fields: the fields of a row that lm-eval reads.
        rename: fields that a row may have instead, by the field that lm-eval reads.
    """

    title: str
    folder: str
    file: str
    split: str
    fields: tuple[str, ...]
    rename: tuple[tuple[str, str], ...] = ()


# In the order of PERP's table. Each has the name that lm-eval gives it.
PERP = {
    # The data set google/boolq calls the label "answer", and aps/super_glue, which lm-eval reads, "label".
    "boolq": ZeroShotTask(
        "BoolQ",
        "super_glue/boolq",
        "boolq-validation",
        "validation",
        ("passage", "question", "label"),
        (("label", "answer"),),
    ),
    "rte": ZeroShotTask("RTE", "glue/rte", "rte-validation", "validation", ("sentence1", "sentence2", "label")),
    "hellaswag": ZeroShotTask(
        "HellaSwag",
        "hellaswag",
        "hellaswag-validation",
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": ZeroShotTask(
        "WinoGrande",
        "winogrande",
        "winogrande_xl-validation",
        "validation",
        ("sentence", "option1", "option2", "answer"),
    ),
    "arc_easy": ZeroShotTask("ARC-e", "arc", "arc_easy-test", "test", ("question", "choices", "answerKey")),
    "arc_challenge": ZeroShotTask("ARC-c", "arc", "arc_challenge-test", "test", ("question", "choices", "answerKey")),
    "openbookqa": ZeroShotTask(
        "OpenBookQA", "openbookqa", "openbookqa-test", "test", ("question_stem", "choices", "answerKey")
    ),
}


def rows_of(names: Iterable[str], folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of tasks from the files of a folder, by the name of the task, see `evaluate_tasks`.

    Raises:
        ValueError: a task is not one of the seven; a row lacks a field; a file holds no row.
        FileNotFoundError: a file is not there.
    """
    names, folder = list(names), Path(folder)
    if unknown := [name for name in names if name not in PERP]:
        raise ValueError(
            f"`data_dir` has a known format for {', '.join(PERP)}, got the task {unknown[0]!r}. Leave out `data_dir`, "
            "so that lm-eval loads its data from the Hub or the cache."
        )
    return {name: _rows(PERP[name], folder) for name in names}


def _rows(task: ZeroShotTask, folder: Path) -> list[dict[str, Any]]:
    path = next((folder / f"{task.file}{end}" for end in (".jsonl", ".jsonl.gz") if _is_file(folder, task, end)), None)
    if path is None:
        raise FileNotFoundError(
            f"Expected {task.file}.jsonl or {task.file}.jsonl.gz in {str(folder)!r}, found neither. Put the rows of "
            f"{task.title} there, or leave out `data_dir`."
        )
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        rows = [_row(json.loads(line), task, path.name) for line in lines if line.strip()]
    if not rows:
        raise ValueError(f"Expected rows of {task.title} in {path.name}, found none. Write one JSON object per line.")
    return rows


def _is_file(folder: Path, task: ZeroShotTask, end: str) -> bool:
    return (folder / f"{task.file}{end}").is_file()


def _row(found: dict[str, Any], task: ZeroShotTask, file: str) -> dict[str, Any]:
    row = {name: found[name] for name in task.fields if name in found}
    row |= {name: int(found[other]) for name, other in task.rename if name not in row and other in found}
    if missing := [name for name in task.fields if name not in row]:
        raise ValueError(
            f"Expected the fields {', '.join(task.fields)} in each row of {file}, and one row lacks "
            f"{', '.join(missing)}. Its fields are {', '.join(found)}."
        )
    return row
