"""Imports the packages of the extra `evaluation`, which not everybody has installed."""

import importlib
from typing import Any


PACKAGES = {"lm_eval": "lm-eval", "evaluate": "evaluate", "datasets": "datasets"}


def extra(module: str) -> Any:
    """Return a module of one of the packages of the extra `evaluation`.

    Raises:
        ImportError: the package is not installed, or it does not work here.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES[module.partition(".")[0]]
        raise ImportError(
            f"Expected the package `{package}`, and importing `{module}` failed: {error}. Install it with: pip "
            "install 'peft_sparse[evaluation]'"
        ) from error
