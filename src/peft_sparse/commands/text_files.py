"""Text files of a command: plain text or JSON lines, also compressed by gzip."""

import gzip
import json
import re
from pathlib import Path

from .outcome import BadArguments


# With fewer parts than this between empty lines, a text has one document on each line.
PARTS = 10


def read_documents(name: str, column: str = "text") -> list[str]:
    """Return the documents of a file: the rows of JSON lines (.jsonl, .json), or else one text. Also of a .gz file.

    Args:
        name: the path of the file.
        column: the field of a row that holds the text.

    Raises:
        BadArguments: a row is no JSON, or has no such text.
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is not UTF-8, or holds no text.
    """
    path = Path(name)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise FileNotFoundError(f"Expected a text file at {name!r}, found {what}. Give the path of a file.")
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig") as file
        ):
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected {name!r} to be text in UTF-8, and byte {error.start} is not. Convert the file, for example by "
            "`iconv -f latin1 -t utf-8`. A compressed file needs the ending .gz."
        ) from error
    documents = [text]
    if {".jsonl", ".json"} & set(path.suffixes):
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        documents = [_text_of(line, column, f"line {number} of {name!r}") for number, line in lines]
    if not any(document.strip() for document in documents):
        raise ValueError(f"Expected {name!r} to hold text, and it is empty. Give another file.")
    return documents


def paragraphs(text: str) -> list[str]:
    """Return the parts of a text between empty lines, or its lines if there are few such parts."""
    parts = [part for part in re.split(r"\n[ \t]*(?:\n[ \t]*)+", text) if part.strip()]
    lines = [line for line in text.splitlines() if line.strip()]
    return parts if len(parts) >= PARTS else lines


def _text_of(line: str, column: str, place: str) -> str:
    """Return the text of a row."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadArguments(f"Expected JSON with a text in {place}, got something else: {error}.") from error
    found = row.get(column) if isinstance(row, dict) else row
    if not isinstance(found, str):
        names = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise BadArguments(f"Expected a text under the name {column!r} in {place}, found {names}.")
    return found
