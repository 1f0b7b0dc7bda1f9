"""The tables and the picture of docs/numbers/vision.md, from the rows of benchmarks/vision.py."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from vision_model import TRAINED


Row = dict[str, Any]
# Each sparsity is drawn at this place, so that those above 90 % are seen.
PLACES = {0.0: 0, 0.5: 1, 0.7: 2, 0.8: 3, 0.9: 4, 0.95: 5}


def tables(result: Path) -> str:
    """Return the tables of all parts that are measured, as Markdown."""
    rows: list[Row] = json.loads(result.read_text())["rows"]
    parts = {"ways": ways, "allocations": allocations, "cycles": cycles, "freezing": freezing, "criteria": criteria}
    parts["rates"] = rates
    found = {name: [row for row in rows if row["part"] == name] for name in parts}
    return "\n\n".join(f"{name}\n\n{parts[name](own)}" for name, own in found.items() if own)


def cell(rows: list[Row], of: Callable[[Row], float] = lambda row: row["accuracy"]) -> str:
    """Return mean ± standard deviation in percent, and how many seeds there are if not three."""
    values = [100 * of(row) for row in rows]
    if not values:
        return ""
    text = f"{mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.1f}"
    return text if len(values) >= 3 or not any("seed" in row for row in rows) else f"{text} ({len(values)})"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def of(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def ways(rows: list[Row]) -> str:
    shares = sorted({row["sparsity"] for row in rows} - {0.0})
    lines = []
    for way in ("pruned", "new statistics", *TRAINED):
        own = [row for row in of(rows, way=way) if "trained_share" in row]
        trained = f"{own[0]['trained_share']:.3%}".replace("%", " %") if own else ""
        lines.append([way, trained, f"{median(row['cpu_seconds'] for row in own):.1f} s" if own else ""])
        lines[-1] += [cell(of(rows, way=way, sparsity=share)) for share in shares]
    return markdown(["way", "trained", "time", *(f"{share:.0%}".replace("%", " %") for share in shares)], lines)


def allocations(rows: list[Row]) -> str:
    kinds = list(dict.fromkeys(row["way"] for row in rows))
    names = dict.fromkeys(row["allocation"] for row in rows)
    lines = [[name, *(cell(of(rows, allocation=name, way=way)) for way in kinds)] for name in names]
    return markdown(["allocation", *kinds], lines)


def cycles(rows: list[Row]) -> str:
    kinds = dict.fromkeys((row["cycles"], row["schedule"]) for row in rows)
    lines = [[str(count), name, cell(of(rows, cycles=count, schedule=name))] for count, name in kinds]
    return markdown(["cycles", "learning rates", "accuracy"], lines)


def freezing(rows: list[Row]) -> str:
    lines = []
    for mode, reverse in dict.fromkeys((row["mode"], row["reverse"]) for row in rows):
        own = of(rows, mode=mode, reverse=reverse)
        lines.append([f"{mode}, {'last' if reverse else 'first'} block first"])
        lines[-1] += [cell(own[:1], lambda row: row["aggregated_share"]).partition(" (")[0], cell(own)]
    return markdown(["mode", "trained on average, %", "accuracy"], lines)


def criteria(rows: list[Row]) -> str:
    columns = [(share, way) for share in (0.7, 0.9) for way in ("pruned", "new statistics")]
    lines = [
        [name, *(cell(of(rows, pruned_by=name, sparsity=share, way=way)) for share, way in columns)]
        for name in dict.fromkeys(row["pruned_by"] for row in rows)
    ]
    return markdown(["pruned by", *(f"{share:.0%}, {way}".replace("%", " %") for share, way in columns)], lines)


def rates(rows: list[Row]) -> str:
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = sorted(of(rows, way=way), key=lambda row: row["factor"])
        best = max(own, key=lambda row: row["accuracy"])
        tried = [f"{100 * row['accuracy']:.1f}" for row in own]
        lines.append([way, f"{own[1]['learning_rate']:.1e}", *tried, f"{best['learning_rate']:.1e}"])
    return markdown(["way", "found", "at a third", "at the rate found", "at three times", "used"], lines)


def plot(result: Path, output: Path) -> None:
    """Draw accuracy against sparsity, a line for each way, with the standard deviation over the seeds."""
    from matplotlib.figure import Figure

    rows = of(json.loads(result.read_text())["rows"], part="ways")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    dense = 100 * of(rows, way="dense")[0]["accuracy"]
    axes.axhline(dense, color="grey", linestyle=":", label="dense")
    shares = sorted({row["sparsity"] for row in rows} - {0.0})
    for way in ("pruned", "new statistics", *TRAINED):
        values = [[100 * row["accuracy"] for row in of(rows, way=way, sparsity=share)] for share in shares]
        there = [(share, own) for share, own in zip(shares, values, strict=True) if own]
        axes.errorbar(
            [PLACES[share] for share, _ in there],
            [mean(own) for _, own in there],
            [stdev(own) if len(own) > 1 else 0.0 for _, own in there],
            marker="o", capsize=3, label=way, linestyle="--" if way in ("pruned", "new statistics") else "-",
        )  # fmt: skip
    axes.set_xticks([PLACES[share] for share in shares], [f"{share:.0%}" for share in shares])
    axes.set(xlabel="sparsity", ylabel="accuracy on 1,000 test images, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(output, dpi=110)
