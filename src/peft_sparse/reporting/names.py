"""Names without the folders of a machine, which mean nothing to a reader and may be private."""

import re
from pathlib import PureWindowsPath

from ..model.tree import is_hub_name


# An absolute folder, on Linux, macOS or Windows. What follows it is the name of a file. It is no address of the web.
_FOLDERS = re.compile(r"""(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\"'=,:]+[/\\]+)*(?=[^\s/\\])""")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+?)[/\\]snapshots[/\\]")


def public_name(name: str | None) -> str | None:
    """Return the name of a model without the folders of this machine.

    Args:
        name: a name on the Hub, or a folder. A folder of the Hub's cache has the name of its model.
    """
    if not name or is_hub_name(name):
        return name or None
    cached = _CACHED.search(f"{name}/")
    return f"{cached[1]}/{cached[2]}" if cached else PureWindowsPath(name).name or None


def without_folders(text: str) -> str:
    """Return `text` without the absolute folders of a machine. The names of files stay."""
    return _FOLDERS.sub("", text)
