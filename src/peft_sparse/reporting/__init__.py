"""The report of a run: `report.json`, with a versioned schema, and one page `report.html` beside it."""

from .facts import describe_model, describe_saved
from .page import report_page
from .reading import as_run_report, read_report
from .schema import SCHEMA, ModelFacts, RunReport, SavedModel, Stage
from .writing import write_report


__all__ = [
    "SCHEMA",
    "ModelFacts",
    "RunReport",
    "SavedModel",
    "Stage",
    "as_run_report",
    "describe_model",
    "describe_saved",
    "read_report",
    "report_page",
    "write_report",
]
