"""Starts `peft-sparse`. It lies beside the package, whose import takes seconds; the list of commands needs none."""

import importlib.util
import sys
from types import ModuleType


def start() -> None:
    """Run the command of this process, and end the process with its exit code."""
    if _only_asks(sys.argv[1:]):
        _pretend_to_be_imported()
    from peft_sparse.commands.main import start as run

    run()


def _only_asks(arguments: list[str]) -> bool:
    """Return whether the arguments ask for the list of commands or the version, and name no command."""
    return not arguments or arguments[0] in ("-h", "--help", "--version")


def _pretend_to_be_imported() -> None:
    """Let the frame of the command line be imported without the package around it. The process ends after it."""
    found = importlib.util.find_spec("peft_sparse")
    assert found is not None
    package = ModuleType("peft_sparse")
    package.__path__ = found.submodule_search_locations or []
    sys.modules["peft_sparse"] = package
