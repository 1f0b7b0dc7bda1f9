"""The embedded default: its text, and what is said where its model cannot be had."""

from peft_sparse.commands import demonstration


def test_the_text_is_split_without_overlap(monkeypatch):
    # Reading every file takes ten seconds.
    files = demonstration._standard_library()
    assert len(files) > 300
    monkeypatch.setattr(demonstration, "_standard_library", lambda: files[::8])
    train, evaluation = demonstration.python_documents()
    paragraphs = {paragraph for text in train for paragraph in text.split("\n\n")}
    assert not [p for text in evaluation for p in text.split("\n\n") if p in paragraphs]
    assert sum(map(len, train)) > 400_000
    assert sum(map(len, evaluation)) > 20_000
    assert demonstration.digest(train) == demonstration.digest(demonstration.python_documents()[0])
