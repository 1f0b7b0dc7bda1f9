"""The reference of the site has every public name once. Sphinx checks the links when it builds the site."""

import re
from pathlib import Path

import peft_sparse


def test_the_reference_has_every_public_name_once():
    pages = (Path(__file__).parents[1] / "docs" / "reference").glob("*.md")
    names = [
        name for page in pages for name in re.findall(r"^\.\. auto\w+:: peft_sparse\.(\w+)", page.read_text(), re.M)
    ]
    assert sorted(names) == sorted(peft_sparse.__all__)
