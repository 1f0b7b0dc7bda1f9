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
OUTCOMES = ("works", "part", "refused", "wrong", "error", "skipped")
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
refusal is a message of this package before any change: the weights are compared. If a refusal says what to leave out,
the atlas does so and tries again: such cells are called "part".

Of {known} model types, {tried} were built and ran. {skipped} were not built ([why](#not-built)). A number in a cell is
that of the reason [below](#reasons).
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
    """Return "works", "part", "refused", "wrong", "error" or "skipped"."""
    return "part" if cell.startswith("works (without") else re.split(r"[ :]", cell)[0]


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
    reasons: dict[str, list[str]] = {}
    for kind in dict.fromkeys(row["kind"] for row in tried):
        parts.append(_kind(kind, [row for row in tried if row["kind"] == kind], stages, reasons))
    parts.append("## Reasons\n\n" + "\n".join(_numbered(reasons)) + "\n")
    parts.append("## Not built\n\n" + "\n".join(_not_built(missing)) + "\n")
    return "\n".join(parts)


def _summary(found: dict[str, dict[str, int]], stages: list[str]) -> str:
    lines = [f"| | {' | '.join(OUTCOMES)} |", f"| --- | {' | '.join(['---:'] * len(OUTCOMES))} |"]
    lines += [f"| {TITLES[s]} | {' | '.join(str(found[s][o]) for o in OUTCOMES)} |" for s in stages]
    return "\n".join(lines) + "\n"


def _faults(rows: list[dict[str, Any]]) -> list[str]:
    return [f"- `{row['type']}`, {TITLES.get(s, s)}: {_plain(cell)}" for row in rows for s, cell in bad(row).items()]


def _kind(kind: str, rows: list[dict[str, Any]], stages: list[str], reasons: dict[str, list[str]]) -> str:
    """Return what one family does: the models in which everything works, and a table of the others.

    A reason stands once in `reasons`, with the models that have it.
    """
    whole = [row["type"] for row in rows if all(row.get(stage) == "works" for stage in stages)]
    lines = [f"## {kind.capitalize()}", ""]
    if whole:
        lines += [f"Everything works in {len(whole)} of {len(rows)}: {', '.join(whole)}.", ""]
    others = [row for row in rows if row["type"] not in whole]
    if others:
        lines += [f"| model | {' | '.join(TITLES[s] for s in stages)} |", f"| --- |{' --- |' * len(stages)}"]
    for row in others:
        cells = [_cell(row["type"], row.get(stage, ""), reasons) for stage in stages]
        lines.append(f"| {row['type']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(model: str, cell: str, reasons: dict[str, list[str]]) -> str:
    outcome = kind_of(cell)
    detail = cell.removeprefix("works" if outcome == "part" else outcome).strip(" :")
    if not detail:
        return cell
    reason = _general(detail.removeprefix("(").removesuffix(")") if outcome in ("works", "part") else detail)
    models = reasons.setdefault(reason, [])
    models += [model] if model not in models else []
    return f"{outcome} {list(reasons).index(reason) + 1}"


def _general(reason: str) -> str:
    """Return a reason without the names and numbers of one model."""
    reason = re.sub(r"'[^']*'", "'...'", re.sub(r"\b\d+\b", "n", _plain(reason)))
    # Of a name, what stands before the list of blocks or the last two parts is left out.
    shorter = re.sub(r"`([\w.]*?)((?:\w+\.)?(?:\w+\.\*|\w+)(?:\.[\w*.]+)?)`", _short_name, reason)
    shape = r"\((?:n, )*n,?\)"
    return re.sub(shape, "(...)", re.sub(r"got (?!n |none|None)[\w, .*]+(?= \(fused)", "got other layers", shorter))


def _short_name(found: re.Match[str]) -> str:
    parts = found[0].strip("`").split(".")
    return f"`{'.'.join(parts[parts.index('*') - 1 :] if '*' in parts else parts[-2:])}`"


def _numbered(reasons: dict[str, list[str]]) -> list[str]:
    return [
        f"{number}. {reason} ({len(models)}: {', '.join(models[:4])}{' and others' if len(models) > 4 else ''})"
        for number, (reason, models) in enumerate(reasons.items(), start=1)
    ]


def _not_built(rows: list[dict[str, Any]]) -> list[str]:
    """Return why models were not built, those with one cause together."""
    causes: dict[str, list[str]] = {}
    for row in rows:
        reason, name = row["skipped"], f"`{row['type']}`"
        library = re.search(r"requires the (\w+) library|No module named '(\w+)'", reason)
        if library:
            cause = f"The library {library[1] or library[2]} is not installed"
        elif "million parameters" in reason:
            cause = "Too large after shrinking"
        elif reason.startswith(("NoInputs", "its own pass", "no inputs")):
            cause = "No inputs were found with which the tiny model runs twice alike"
        else:
            cause = "No tiny configuration was found that can be built"
        causes.setdefault(cause, []).append(name)
    return [f"- {cause} ({len(names)}): {', '.join(names)}." for cause, names in sorted(causes.items())]


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
