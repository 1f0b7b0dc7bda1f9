"""Reads `report.json`, and makes the report of a run out of the report of one function."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from ..pruning.report import PruningReport
from ..reconstruction.report import ReconstructionReport
from ..reconstruction.residual_report import ResidualReport
from ..structured.report import StructuredReport
from .schema import SCHEMA, RunReport, Stage


# What reports of one function hold for the reader of their JSON, and compute themselves.
_COMPUTED = {
    PruningReport: {"error", "error_selected"},
    ResidualReport: {"error", "error_pruned"},
    StructuredReport: {"parameters_prunable", "parameters_removed", "removed"},
}
AnyReport = RunReport | PruningReport | ReconstructionReport | StructuredReport | ResidualReport


def read_report(path: str | Path) -> RunReport:
    """Read a report that `write_report` wrote.


    Args:
        path: the file `report.json`, or the folder that holds it.

    Returns:
        The report.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no report, or one of a schema that this version of the package does not know.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"Expected a report at {str(path)!r}, found none. Give the `report.json` of a run.")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected {str(path)!r} to hold the JSON of a report. It is no JSON: {error}.") from error
    if not isinstance(plain, dict) or not {"schema", "stages"} <= plain.keys():
        raise ValueError(
            f"Expected {str(path)!r} to hold a report of this package, which has `schema` and `stages`. Give the "
            "`report.json` of a run."
        )
    version = plain.pop("schema")
    if version != SCHEMA:
        raise ValueError(
            f"{str(path)!r} has the schema {version!r}, and this version of peft_sparse reads the schema {SCHEMA}. "
            "Read it with the version that wrote it, which the file names under `environment`, or with a later one."
        )
    return _with_pruning(_made(RunReport, plain, "report"))


def as_run_report(report: AnyReport) -> RunReport:
    """Return the report of one function as the report of a run. A `RunReport` is returned as it is.

    Args:
        report: what `prune`, `prune_checkpoint`, `reconstruct`, `prune_structured`, `residual_lora` or `compress`
            returned.

    Raises:
        TypeError: `report` is something else.
    """
    if isinstance(report, RunReport):
        return report
    if isinstance(report, PruningReport):
        stage = Stage("pruned", {}, report.sparsity, report.seconds, peak_memory_bytes=report.peak_memory)
        return RunReport("prune", stages=(stage,), peak_memory_bytes=report.peak_memory, pruning=report)
    if isinstance(report, ReconstructionReport):
        share = None if report.pruning is None else report.pruning.sparsity
        stage = Stage("reconstructed", {}, share, report.seconds, peak_memory_bytes=report.peak_memory)
        return RunReport(
            "reconstruct",
            stages=(stage,),
            peak_memory_bytes=report.peak_memory,
            pruning=report.pruning,
            reconstruction=report,
        )
    if isinstance(report, StructuredReport):
        stage = Stage("pruned", {}, None, report.seconds, peak_memory_bytes=report.peak_memory)
        return RunReport("prune_structured", stages=(stage,), peak_memory_bytes=report.peak_memory, structured=report)
    if isinstance(report, ResidualReport):
        stage = Stage("corrected", {}, None, report.seconds, peak_memory_bytes=report.peak_memory)
        return RunReport("residual_lora", stages=(stage,), peak_memory_bytes=report.peak_memory, residual=report)
    raise TypeError(
        f"Expected a report of `prune`, `reconstruct`, `prune_structured`, `residual_lora` or `compress`, got "
        f"{type(report).__name__}."
    )


def _with_pruning(report: RunReport) -> RunReport:
    """Put the pruning, which the JSON holds once, into the report of the reconstruction as well."""
    if report.reconstruction is None or report.pruning is None:
        return report
    whole = dataclasses.replace(report.reconstruction, pruning=report.pruning)
    return dataclasses.replace(report, reconstruction=whole)


def _made(kind: Any, value: Any, where: str) -> Any:
    """Return the plain `value` as an object of the type `kind`; `where` names it in errors."""
    if dataclasses.is_dataclass(kind):
        return _made_dataclass(kind, value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _made(next(each for each in inner if each is not type(None)), value, where)
    if kind is Any:
        return value
    expected: Any = {tuple: list, float: (int, float, str)}.get(origin or kind, origin or kind)
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(
            f"Expected `{where}` as {getattr(kind, '__name__', kind)}, got {value!r:.50}. Give a report as it was "
            "written."
        )
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(
            _made(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        return {key: _made(inner[1], each, f"{where}.{key}") for key, each in value.items()}
    return float(value) if kind is float else value


def _made_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = {each.name: each for each in dataclasses.fields(kind)}
    optional = {name for name, each in known.items() if _has_default(each)} | {"pruning"}
    found = {name: each for name, each in dict(value).items() if name not in _COMPUTED.get(kind, ())}
    unknown, missing = found.keys() - known.keys(), known.keys() - found.keys() - optional
    if unknown or missing:
        names = ", ".join(sorted(f"{where}.{name}" for name in unknown or missing))
        raise ValueError(
            f"The report has {'an unknown entry' if unknown else 'no entry'} {names}. Give a report as it was written."
        )
    made = {name: _made(hints[name], each, f"{where}.{name}") for name, each in found.items()}
    return kind(**({"pruning": None} if kind is ReconstructionReport else {}) | made)


def _has_default(each: Any) -> bool:
    return each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING
