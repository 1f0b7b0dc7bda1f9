"""Every refusal of `reporting/`, with its words."""

import json
from pathlib import Path

import pytest

from peft_sparse.reporting import SCHEMA, RunReport, read_report, write_report


def reading(content):
    text = content if isinstance(content, str) else json.dumps(content)
    Path("report.json").write_text(text)
    return read_report("report.json")


def changed(**changes):
    return reading(RunReport("train").to_dict() | changes)


def over_a_file():
    Path("report").touch()
    write_report(RunReport("train"), "report")


REFUSALS = [
    (lambda: read_report("nowhere"), FileNotFoundError, "Expected a report at 'nowhere', found none. Give the"),
    (
        lambda: over_a_file(),
        NotADirectoryError,
        "Expected the folder of a report, got the file 'report'. Give a folder",
    ),
    (lambda: reading("{"), ValueError, "Expected 'report.json' to hold the JSON of a report. It is no JSON"),
    (lambda: reading({"weights": []}), ValueError, "Expected 'report.json' to hold a report of this package"),
    (
        lambda: changed(schema=SCHEMA + 1),
        ValueError,
        rf"has the schema {SCHEMA + 1}, and this version of peft_sparse reads the schema {SCHEMA}",
    ),
    (lambda: changed(stages={}), ValueError, r"Expected `report.stages` as tuple.*, got \{\}. Give a report as it"),
    (lambda: changed(colour="red"), ValueError, "The report has an unknown entry report.colour"),
    (lambda: changed(stages=[{}]), ValueError, r"The report has no entry report.stages\[0\].name"),
    (lambda: write_report("wanda", "out"), TypeError, "Expected a report of `prune`, .* got str"),
    (lambda: write_report(RunReport("train"), "out", saved="sparse"), ValueError, "Give the model that was saved"),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_a_refusal_says_what_to_do(tmp_path, monkeypatch, refused, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
