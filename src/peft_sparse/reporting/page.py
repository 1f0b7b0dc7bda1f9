"""The page of a report: one HTML file with its style and its pictures inside."""

from typing import Any

import jinja2

from . import facts_shown, pictures
from .schema import RunReport


_TRAININGS = {"reconstruction": "Reconstruction", "training": "Training"}


def report_page(report: RunReport) -> str:
    """Return the page of a report as HTML.

    It holds everything it needs: it loads nothing, runs no script, and follows the light or dark mode of the reader.
    A section of which the run has no data is left out.

    Args:
        report: the report of the run.
    """
    head, rows = facts_shown.stage_table(report)
    left_out = report.pruning.left_out if report.pruning else report.residual.left_out if report.residual else {}
    values: dict[str, Any] = {
        "report": report,
        "title": facts_shown.title_of(report),
        "tiles": facts_shown.tiles_of(report),
        "done": facts_shown.done(report),
        "head": head,
        "rows": rows,
        "stage_charts": pictures.of_stages(report),
        "heat_maps": pictures.of_matrices(report),
        "regions": pictures.of_regions(report),
        "trainings": [
            (_TRAININGS.get(name, name), charts)
            for name, entries in report.logs.items()
            if (charts := pictures.over_time(entries))
        ],
        "loading": [(saved, facts_shown.loading(saved)) for saved in report.saved],
        "arguments": facts_shown.arguments_of(report),
        "made_by": facts_shown.made_by(report),
        "left_out": left_out,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("peft_sparse.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(values)
