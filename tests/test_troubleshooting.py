"""Every message on the page docs/troubleshooting.md is one that the package has."""

import ast
import re
from pathlib import Path

import pytest

import peft_sparse


PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
# What stands for a value in a text that is put together, and for "..." on the page.
VALUE, DOTS = "\0", "..."


def written(node):
    """The text that an expression makes, with `VALUE` for each value in it; None if it makes no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) if isinstance(part, ast.Constant) else VALUE for part in node.values)
    return None


def texts(package):
    """Every text that the files of the package write. A docstring tells of messages, and is none."""
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = None if id(node) in docstrings else written(node)
            if text:
                # A logger fills in %d, %s and %r.
                yield re.sub(r"%[dsr]", VALUE, text)


def found(message, known):
    """Whether the parts of `message` between dots stand in one of the texts, in this order."""
    pattern = re.compile(".*".join(map(re.escape, message.split(DOTS))), re.DOTALL)
    return any(pattern.search(text) for text in known)


MESSAGES = re.findall(r"```text\n(.+)\n```", PAGE.read_text())
KNOWN = list(texts(Path(peft_sparse.__file__).parent))


@pytest.mark.parametrize("message", MESSAGES)
def test_the_package_has_the_message(message):
    assert found(message, KNOWN)


def test_the_page_has_many_messages_and_each_once():
    assert len(MESSAGES) >= 40
    assert len(set(MESSAGES)) == len(MESSAGES)


def test_a_message_that_the_package_does_not_have_is_seen():
    assert not found("Expected `args` as TrainingArguments", KNOWN)
    assert not found("lost ... zeros during training", KNOWN)
