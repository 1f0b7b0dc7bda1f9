"""Every `raise` of the package has a row in the tests of its folder, `tests/<folder>/test_<folder>_refusals.py`."""

import ast
import importlib.util
import traceback
from pathlib import Path

import pytest

import peft_sparse


def refusals():
    """The rows of all folders."""
    for path in sorted(Path(__file__).parent.glob("*/test_*_refusals.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield from module.REFUSALS


def raise_statements(package):
    """(path, first line, last line) of every `raise` that makes an error; a bare re-raise makes none."""
    return {
        (path.relative_to(package), node.lineno, node.end_lineno)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }


def test_no_refusal_goes_untested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = Path(peft_sparse.__file__).parent
    reached = set()
    for refused, error, _ in refusals():
        with pytest.raises(error) as caught:
            refused()
        frames = traceback.extract_tb(caught.value.__traceback__)
        last = [frame for frame in frames if Path(frame.filename).is_relative_to(package)][-1]
        reached.add((Path(last.filename).relative_to(package), last.lineno))
    missed = [
        f"{name}:{first}"
        for name, first, end in raise_statements(package)
        if not any(name == file and first <= line <= end for file, line in reached)
    ]
    assert missed == []
