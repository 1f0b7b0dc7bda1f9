"""Which documents a command reads from a text file."""

import gzip

import pytest

from peft_sparse.commands.sources import SourceArguments, load_documents
from peft_sparse.commands.text_files import paragraphs, read_documents


ROWS = "".join(f'{{"text": "row {i}", "own": "other {i}"}}\n' for i in range(3))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz"])
def test_rows_of_json_lines_are_documents(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(ROWS.encode()) if path.suffix == ".gz" else ROWS.encode())
    assert read_documents(str(path)) == ["row 0", "row 1", "row 2"]
    assert read_documents(str(path), "own")[-1] == "other 2"


def test_any_other_text_is_one_document(tmp_path):
    for name, content in (("a.txt", ROWS.encode("utf-8-sig")), ("a.txt.gz", gzip.compress(ROWS.encode()))):
        (tmp_path / name).write_bytes(content)
        assert read_documents(str(tmp_path / name)) == [ROWS]


def test_a_text_is_divided_at_empty_lines_or_else_at_every_line():
    verses = [f"verse {i}\nand more of it" for i in range(10)]
    assert paragraphs("\n\n".join(verses)) == verses
    # WikiText has spaces in its empty lines.
    assert paragraphs("\n \n \n".join(verses)) == verses
    assert paragraphs("one\ntwo\n\nthree\n") == ["one", "two", "three"]


def test_every_tenth_document_is_held_out(tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(map(str, range(25))))
    found = load_documents(SourceArguments(text_file=str(tmp_path / "lines.txt")))
    assert found.evaluation == ["0", "10", "20"]
    assert found.train == [str(i) for i in range(25) if i % 10]
    assert found.name == "lines.txt"
