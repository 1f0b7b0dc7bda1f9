"""The tables and the picture of benchmarks/recipes.py."""

from typing import Any


OURS = ("fast", "balanced", "best")


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one result with the rows of all. They must have the same settings."""
    first = results[0]
    apart = {key for result in results for key in first if key not in ("rows", "environment")
             and result.get(key) != first[key]}  # fmt: skip
    if apart:
        raise ValueError(f"Expected results with the same settings, got other values of {', '.join(sorted(apart))}.")
    rows = [row for result in results for row in result["rows"]]
    # The dense model is measured by every run.
    unique = {str([(k, v) for k, v in row.items() if k in KEYS]): row for row in reversed(rows)}
    commands = [result["environment"]["command"] for result in results]
    return {**first, "rows": list(reversed(unique.values())), "commands": commands}


KEYS = ("way", "pattern", "seed", "steps", "factor", "rate", "stage")


def label(row: dict[str, Any]) -> str:
    """Return the name of a row in tables."""
    extra = {"steps": "{} steps", "factor": "x{} tokens", "stage": "{}"}
    words = [text.format(row[key]) for key, text in extra.items() if key in row and row[key] != "saved"]
    return ", ".join([row["way"], *words])


def of_pattern(result: dict[str, Any], pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a pattern and those of the dense model, by name, the rivals at their best rates.

    The last stage of a recipe is measured twice, before and after it is saved. The second one has all texts.
    """
    text = next(iter(result["windows"]))
    named: dict[str, dict[Any, list[dict[str, Any]]]] = {}
    for row in result["rows"]:
        if row.get("pattern", pattern) == pattern and not is_before_saving(row):
            named.setdefault(label(row), {}).setdefault(row.get("rate"), []).append(row)

    def order(found: list[dict[str, Any]]) -> tuple[int, float]:
        # A rate that was tried with one seed does not compete with one that has all seeds.
        return -len(found), sum(row["perplexity"][text] for row in found) / len(found)

    return {name: min(rates.values(), key=order) for name, rates in named.items()}


def is_before_saving(row: dict[str, Any]) -> bool:
    """Return whether a row is the last stage of a recipe before the model is saved."""
    return row["way"] in OURS and row["stage"] in ("retrained", "pruned")


def is_on_gpu(result: dict[str, Any]) -> bool:
    """Return whether a result was measured on a GPU."""
    return not result["environment"]["hardware"].endswith("CPU")


def time_of(result: dict[str, Any], pattern: str, name: str) -> float | None:
    """Return the mean time of the rows with a name that had the device for themselves, at any rate.

    It is in CPU minutes, or in seconds on a GPU. None if there is no such row.
    """
    named = [row for row in result["rows"] if label(row) == name and not is_before_saving(row)]
    alone = [row for row in named if row.get("pattern", pattern) == pattern and row.get("at_once", 1) == 1]
    key, scale = ("seconds", 1) if is_on_gpu(result) else ("cpu_seconds", 60)
    return sum(row[key] for row in alone) / len(alone) / scale if alone else None


def table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown: one table for each pattern, with means over the seeds."""
    lines: list[str] = []
    texts = list(result["windows"])
    unit = "seconds" if is_on_gpu(result) else "CPU minutes"
    for pattern in dict.fromkeys(row["pattern"] for row in result["rows"] if "pattern" in row):
        lines += [f"\n{pattern}\n", f"| | {' | '.join(texts)} | tokens | {unit} | peak GiB | rate |"]
        lines += ["| --- |" + " ---: |" * (len(texts) + 4)]
        for name, found in of_pattern(result, pattern).items():
            values = [spread([row["perplexity"].get(text) for row in found]) for text in texts]
            time = time_of(result, pattern, name)
            peak = max(row["peak_bytes"] for row in found) / 2**30
            cells = [name, *values, f"{found[0]['tokens']:,}", "" if time is None else f"{time:.2f}", f"{peak:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {found[0].get('rate', '')} |")
    return "\n".join(lines)


def spread(values: list[float | None]) -> str:
    """Return the mean of the seeds, and the largest distance from it."""
    found = [value for value in values if value is not None]
    if not found:
        return ""
    mean = sum(found) / len(found)
    apart = max(abs(value - mean) for value in found)
    return f"{mean:.2f}" + (f" ± {apart:.2f}" if len(found) > 1 else "")


def plot(result: dict[str, Any], path: str) -> None:
    """Draw perplexity against time, with the line of those that nothing beats in both."""
    from matplotlib.figure import Figure

    text = next(iter(result["windows"]))
    timed: dict[str, list[tuple[float, float, str, bool]]] = {}
    for pattern in dict.fromkeys(row["pattern"] for row in result["rows"] if "pattern" in row):
        for name, rows in of_pattern(result, pattern).items():
            time = time_of(result, pattern, name)
            if time is not None and "pattern" in rows[0]:
                value = sum(row["perplexity"][text] for row in rows) / len(rows)
                timed.setdefault(pattern, []).append((time, value, name, rows[0]["way"] in OURS))
    rows_of_axes, columns = -(-len(timed) // 2), min(len(timed), 2)
    figure = Figure(figsize=(6 * columns, 4.5 * rows_of_axes), layout="constrained")
    axes = figure.subplots(rows_of_axes, columns, squeeze=False).flat
    for axis, (pattern, points) in zip(axes, timed.items(), strict=False):
        best = float("inf")
        front = [(x, best := y) for x, y, *_ in sorted(points) if y < best]
        axis.step(*zip(*front, strict=True), where="post", color="grey", linewidth=1)
        for x, y, name, ours in points:
            axis.plot(x, y, "o" if ours else "x", color="C0" if ours else "C1")
            axis.annotate(name, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        unit = "seconds" if is_on_gpu(result) else "CPU minutes"
        axis.set(xlabel=unit, ylabel=f"perplexity, {text}", title=pattern, yscale="log")
    figure.savefig(path, dpi=110)
