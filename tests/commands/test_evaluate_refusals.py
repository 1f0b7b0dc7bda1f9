"""The refusal of `peft-sparse evaluate`, with its words. Others are those of `evaluation/`."""

import argparse

import pytest

from peft_sparse.commands import evaluate


def run(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return evaluate.run(parser.parse_args(list(arguments)))


REFUSALS = [
    (
        lambda: run("model", "--json", "nowhere/results.json"),
        FileNotFoundError,
        "Expected a folder for --json, and there is none for 'nowhere/results.json'. Make it first",
    ),
    (lambda: run("model", "--json", "."), IsADirectoryError, "Expected a file for --json, got the folder '.'"),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
