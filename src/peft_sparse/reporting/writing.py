"""Writes the report of a run: `report.json`, and the page `report.html` beside it."""

import json
import os
from pathlib import Path

from .page import report_page
from .reading import AnyReport, as_run_report


# The two files of a report.
JSON, PAGE = "report.json", "report.html"


def write_report(report: AnyReport, folder: str | Path) -> list[Path]:
    """Write the report of a run as `report.json` and as `report.html`.

    The page needs no network and no other file. It can be opened, sent and printed.

    Args:
        report: what `prune`, `prune_checkpoint`, `reconstruct`, `prune_structured`, `residual_lora` or `compress`
            returned, or the `RunReport` that `SparseTrainer` or `read_report` made.
        folder: the folder to write to. It is made if it does not exist, and older reports in it are replaced.

    Returns:
        The paths of the two files.

    Raises:
        TypeError: `report` is something else.
    """
    run = as_run_report(report)
    content = {
        JSON: json.dumps(run.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n",
        PAGE: report_page(run),
    }
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
