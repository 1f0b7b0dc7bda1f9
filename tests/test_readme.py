"""Every python block of the documents runs; those of one document share their names, as a reader's session would."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from peft_sparse.model.blocks import find_blocks

from texts import character_tokenizer, conversation


ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(document, tmp_path, monkeypatch, llama, tokens):
    monkeypatch.chdir(tmp_path)
    llama.save_pretrained("tiny-llama")
    # What the text says the reader brings: token sequences, the same as a training set, and text with its tokenizer.
    session = {"sequences": tokens, "dataset": [{"input_ids": row, "labels": row} for row in tokens]}
    session |= {"tokenizer": character_tokenizer(), "documents": ["SOME TEXT, AND MORE OF IT. " * 20] * 99}
    session["conversations"] = [conversation("WHAT IS IT?", "IT IS A VERY GOOD QUESTION. " * 4)] * 99
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL):
        exec(compile(block.replace(MODEL, "tiny-llama"), document.name, "exec"), session)
    if document.name == "README.md":
        assert len(find_blocks(session["model"])) == 3, "the quickstart was not run"


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_no_line_is_a_comment_for_the_site():
    for document in DOCUMENTS:
        lines = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL).splitlines()
        assert not [line for line in lines if line.startswith("% ")], document.name


def test_the_tree_in_the_guide_for_contributors_is_the_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = set(re.findall(r"^      (\w+)/  ", text, flags=re.MULTILINE))
    package = ROOT / "src" / "peft_sparse"
    assert listed == {path.parent.name for path in package.glob("*/__init__.py")}


def test_the_picture_of_the_chain_is_that_of_the_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    chain = importlib.import_module("chain")
    stages = json.loads(chain.REPORT.read_text())["stages"]
    assert (ROOT / "docs" / "chain.svg").read_text(encoding="utf-8") == chain.picture(stages)


def test_the_commands_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    assert "python3 make.py demo" in text
    assert "python3 make.py test" in text
    assert "python3 make.py test" in (ROOT / ".ci" / "run").read_text()
    assert torch.__version__.split("+")[0] in (ROOT / "constraints.txt").read_text()


def test_the_way_of_a_weight_names_every_file_once():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    way = text[text.index("1. `pruning/prune.py`") : text.index("## To add")]
    named = re.findall(r"`(\w+/\w+\.py)`", way)
    package = ROOT / "src" / "peft_sparse"
    files = [path for folder in ("model", "calibration", "pruning") for path in (package / folder).glob("[a-z]*.py")]
    assert sorted(named) == sorted(str(path.relative_to(package)) for path in files)
