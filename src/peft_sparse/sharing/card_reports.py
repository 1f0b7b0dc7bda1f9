"""Reads the reports of runs for cards: objects with `to_dict`, plain values, and files of JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


# What a report of a whole run says, beside the reports of its stages.
_OF_RUN = ("recipe", "arguments", "stages", "texts", "environment", "peak_memory_bytes", "resumed")
_OF_STAGES = ("pruning", "reconstruction", "retraining", "residual")


def done_in(report: Any) -> dict[str, Any]:
    """Return what a report says was done, for `Facts.done`.

    Args:
        report: a `PruningReport`, `ReconstructionReport`, `ResidualReport`, `PerplexityReport` or
            `CompressionReport`; or its `to_dict()`; or the path of a file of JSON that holds it.

    Raises:
        TypeError: `report` is none of these.
        ValueError: the values are those of no known report.
    """
    if isinstance(report, (str, Path)):
        report = json.loads(Path(report).read_text(encoding="utf-8"))
    values = report.to_dict() if hasattr(report, "to_dict") else report
    if not isinstance(values, Mapping):
        raise TypeError(
            f"Expected `report` as a report of this package, its `to_dict()` or the path of its JSON, got "
            f"{type(report).__name__}. Give what `prune`, `reconstruct` or `compress` returned."
        )
    # The whole object and its JSON give the same card.
    values = json.loads(json.dumps(values), object_hook=_numbers)
    if "regions" in values:
        return _without_none({"reconstruction": values, "pruning": values.get("pruning")})
    if "criterion" in values:
        return {"pruning": values}
    if "damping" in values and "parameters" in values:
        return {"residual": values}
    if isinstance(values.get("perplexity"), Mapping):
        return _stages_of(values)
    found = _without_none({name: values.get(name) for name in (*_OF_RUN, *_OF_STAGES)})
    if not found:
        raise ValueError(
            "Expected a report of `prune`, `reconstruct` or `compress`, got the fields "
            f"{', '.join(values) or 'none'}. Give the report, its `to_dict()`, or the `report.json` of a run."
        )
    if "reconstruction" in found and "pruning" not in found:
        found |= _without_none({"pruning": found["reconstruction"].get("pruning")})
    return found


def _stages_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report of perplexities by domain as stages."""
    dense = [{"name": "dense", "perplexity": values["dense"]}] if values.get("dense") else []
    texts = {f"evaluation, {name}": {"tokens": count} for name, count in (values.get("tokens") or {}).items()}
    return {"stages": [*dense, {"name": "this model", "perplexity": values["perplexity"]}], "texts": texts}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with the numbers that JSON spells as texts, because it does not know them."""
    return {name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in values.items()}


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
