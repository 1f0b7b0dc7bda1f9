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


def plain_to_rst(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn what docstrings write as plain text into reStructuredText: indented formulas, and the bars of |W|.

    reStructuredText reads an indented paragraph as a quotation, and |W| as a substitution.
    """
    out: list[str] = []
    formula = section = False
    for line in lines:
        if line and not line.startswith(" "):
            # The arguments below the name of a section are indented too.
            formula, section = False, line in ("Args:", "Raises:", "Returns:")
        elif line.startswith("    ") and not section and not formula:
            formula = True
            out += ["::", ""]
        if not formula:
            parts = line.split("`")
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            line = "`".join(parts)
        out.append(line)
    lines[:] = out


def link_to_the_tour(app: Any, page: str, source: list[str]) -> None:
    """Let links to the notebook lead to its page of the site."""
    source[0] = re.sub(r"\]\((\.\./)+examples/tour\.ipynb\)", "](/start/tour.ipynb)", source[0])


def setup(app: Any) -> None:
    # The notebook is an example too, and stands with the other examples.
    shutil.copyfile(app.srcdir.parent / "examples" / "tour.ipynb", app.srcdir / "start" / "tour.ipynb")
    # Before napoleon, which takes the sections apart.
    app.connect("autodoc-process-docstring", plain_to_rst, priority=400)
    app.connect("source-read", link_to_the_tour)
