"""Writes the report of a run: `report.json`, and the page `report.html` beside it."""

import dataclasses
import json
import os
from pathlib import Path

from torch import nn

from .facts import describe_model, describe_saved
from .page import report_page
from .reading import AnyReport, as_run_report


# The two files of a report.
JSON, PAGE = "report.json", "report.html"


def write_report(
    report: AnyReport, folder: str | Path, *, model: nn.Module | None = None, saved: str | None = None
) -> list[Path]:
    """Write the report of a run as `report.json` and as `report.html`.

    The page needs no network and no other file. It can be opened, sent and printed.

    Args:
        report: what `prune`, `prune_checkpoint`, `reconstruct`, `prune_structured`, `residual_lora` or `compress`
            returned, or the `RunReport` that `SparseTrainer` or `read_report` made.
        folder: the folder to write to. It is made if it does not exist, and older reports in it are replaced.
        model: the model, of which the report then tells name, size and fingerprint. None leaves them as they are.
        saved: the folder to which `model` was saved, relative to `folder`. The report then tells how it is loaded.

    Returns:
        The paths of the two files.

    Raises:
        TypeError: `report` is something else.
        ValueError: `saved` is given without `model`.
        NotADirectoryError: `folder` is a file.
    """
    run = as_run_report(report)
    if model is not None:
        run = dataclasses.replace(run, model=describe_model(model))
    if saved is not None:
        if model is None:
            raise ValueError("`saved` is the folder of `model`, which is not given. Give the model that was saved.")
        run = dataclasses.replace(run, saved=(*run.saved, describe_saved(folder, saved, model)))
    content = {
        JSON: json.dumps(run.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n",
        PAGE: report_page(run),
    }
    if Path(folder).is_file():
        raise NotADirectoryError(f"Expected the folder of a report, got the file {str(folder)!r}. Give a folder.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in content.items():
        path = Path(folder) / name
        # A reader of the folder sees the old report or the new one, and no half.
        unfinished = path.with_name(f".{name}.{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
        written.append(path)
    return written
