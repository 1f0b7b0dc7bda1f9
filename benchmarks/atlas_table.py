"""Writes the atlas: docs/atlas.md for reading, and benchmarks/results/atlas.json with everything."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from atlas_stages import STAGES
from peft_sparse import environment


ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    "prune": "Wanda 0.5",
    "2:4": "Wanda 2:4",
    "submodule": "reconstruct, submodule",
    "block": "reconstruct, block",
    "structured": "structured, compact",
    "checkpoint": "checkpoint",
}
OUTCOMES = ("works", "refused", "wrong", "error", "skipped")
INTRODUCTION = """# Atlas

One tiny model for every model type of the installed Transformers, and what this package does with it.
`{command}` wrote this page in {minutes} minutes on {cpu}, with seed 0 ({versions}). Everything is in
[atlas.json](../benchmarks/results/atlas.json).

- **Wanda**: `prune(model, 0.5, batches, criterion="wanda")`, and "2:4". Every zero is compared with an independent
  implementation ([atlas_reference.py](../benchmarks/atlas_reference.py)): full passes of the whole model with hooks,
  one for each block, where each padded sequence runs alone. All kept weights and all other parameters are unchanged.
- **reconstruct**: one step for each region. Zeros stay, no error grows, nothing outside of the blocks changes.
- **structured, compact**: 30 % of the heads and neurons. The compact model computes what the masked one does.
- **checkpoint**: `prune_checkpoint` writes, bit for bit, what `prune` makes in memory, and `from_pretrained` loads it.

In every case modes, `requires_grad`, hooks, attributes, buffers and the configuration are as before afterwards. A
refusal is a message of this package before any change: the weights are compared.

Of {known} model types, {tried} were built and ran. {skipped} were not built ([why](#not-built)).
"""


def write(rows: list[dict[str, Any]], stages: list[str], seconds: float, output: Path | None, command: str) -> None:
    """Write the page and the JSON.

    Args:
        rows: one row per model type.
        stages: the stages that were tried.
        seconds: the time of the run.
        output: a folder; None is the repository.
        command: how the run was started.
    """
    result = {
        "command": command,
        "seed": 0,
        "seconds": round(seconds),
        "stages": stages,
        "counts": counts(rows, stages),
        "rows": rows,
        "environment": environment(),
    }
    data = (output or ROOT / "benchmarks" / "results") / "atlas.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(result, indent=1) + "\n")
    (output or ROOT / "docs").joinpath("atlas.md").write_text(page(result))


def counts(rows: list[dict[str, Any]], stages: list[str]) -> dict[str, dict[str, int]]:
    """Return how often each stage has each outcome."""
    found = {stage: Counter(kind_of(row[stage]) for row in rows if stage in row) for stage in stages}
    return {stage: {outcome: counter[outcome] for outcome in OUTCOMES} for stage, counter in found.items()}


def kind_of(cell: str) -> str:
    """Return "works", "refused", "wrong", "error" or "skipped"."""
    return re.split(r"[ :]", cell)[0]


def bad(row: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a row that are wrong or an error."""
    cells = {stage: row[stage] for stage in STAGES if stage in row and kind_of(row[stage]) in ("wrong", "error")}
    return cells | ({"process": row["crashed"]} if "crashed" in row else {})


def page(result: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    rows, stages = result["rows"], result["stages"]
    tried = [row for row in rows if any(stage in row for stage in stages)]
    missing = [row for row in rows if "skipped" in row]
    where = result["environment"]
    named = where["versions"] | {"python": where["python"]}
    parts = [
        INTRODUCTION.format(
            command=result["command"],
            minutes=max(1, round(result["seconds"] / 60)),
            cpu=where["hardware"],
            versions=", ".join(f"{key} {value}" for key, value in named.items()),
            known=len(rows),
            tried=len(tried),
            skipped=len(missing),
        ),
        _summary(result["counts"], stages),
    ]
    faults = [row for row in rows if bad(row)]
    parts.append("## Wrong, or an error\n\n" + ("\n".join(_faults(faults)) if faults else "None.") + "\n")
    for kind in dict.fromkeys(row["kind"] for row in tried):
        parts.append(_kind(kind, [row for row in tried if row["kind"] == kind], stages))
    parts.append(
        "## Not built\n\n" + "\n".join(f"- `{row['type']}`: {_plain(row['skipped'])}" for row in missing) + "\n"
    )
    return "\n".join(parts)


def _summary(found: dict[str, dict[str, int]], stages: list[str]) -> str:
    lines = [f"| | {' | '.join(OUTCOMES)} |", f"| --- | {' | '.join(['---:'] * len(OUTCOMES))} |"]
    lines += [f"| {TITLES[s]} | {' | '.join(str(found[s][o]) for o in OUTCOMES)} |" for s in stages]
    return "\n".join(lines) + "\n"


def _faults(rows: list[dict[str, Any]]) -> list[str]:
    return [f"- `{row['type']}`, {TITLES.get(s, s)}: {_plain(cell)}" for row in rows for s, cell in bad(row).items()]


def _kind(kind: str, rows: list[dict[str, Any]], stages: list[str]) -> str:
    """Return the table of one kind. A reason stands once, below the table, with a number."""
    reasons: dict[str, int] = {}
    lines = [f"## {kind.capitalize()}", "", f"| model | {' | '.join(TITLES[s] for s in stages)} |"]
    lines.append(f"| --- |{' --- |' * len(stages)}")
    for row in rows:
        cells = [_cell(row.get(stage, ""), reasons) for stage in stages]
        lines.append(f"| {row['type']} | {' | '.join(cells)} |")
    lines += ["", *[f"{number}. {reason}" for reason, number in reasons.items()], ""]
    return "\n".join(lines)


def _cell(cell: str, reasons: dict[str, int]) -> str:
    outcome = kind_of(cell)
    detail = cell.removeprefix(outcome).strip(" :")
    if not detail:
        return cell
    # Names of modules and numbers differ from model to model; the reason is the same.
    reason = re.sub(r"'[^']*'", "'...'", re.sub(r"\b\d+\b", "n", detail.strip("()")))
    number = reasons.setdefault(_plain(reason), len(reasons) + 1)
    return f"{outcome} ({number})"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
