"""The site of the documentation, built by Sphinx. `python3 make.py docs` builds it into `.site`.

The pages are plain Markdown, so that they can also be read on a code host. A link to a file outside `docs/`, such as a
benchmark, becomes a download.
"""

import re
import shutil
from importlib.metadata import version as version_of
from typing import Any


project = "peft_sparse"
author = "the developers of peft_sparse"
copyright = author
release = version_of("peft_sparse")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["conf.py"]

# Headings are targets of links, as on code hosts.
myst_heading_anchors = 4
# The notebook is stored with its outputs. tests/test_tour.py runs it.
nb_execution_mode = "off"

# Quotation marks stay those that Python reads.
smartquotes = False

# Docstrings write code in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "peft_sparse"
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


def escape_bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escape the bars of |W| in a docstring, outside of its code. reStructuredText reads |W| as a substitution."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[number] = "`".join(parts)


def link_to_the_tour(app: Any, page: str, source: list[str]) -> None:
    """Let links to the notebook lead to its page of the site."""
    source[0] = re.sub(r"\]\((\.\./)+examples/tour\.ipynb\)", "](/start/tour.ipynb)", source[0])


def setup(app: Any) -> None:
    # The notebook is an example too, and stands with the other examples.
    shutil.copyfile(app.srcdir.parent / "examples" / "tour.ipynb", app.srcdir / "start" / "tour.ipynb")
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("source-read", link_to_the_tour)
