"""How a command ends: its exit code, and one line that says what to do."""

import sys
import traceback

from .last_words import say_last


DONE, FAILED, BAD_ARGUMENTS, REFUSED = 0, 1, 2, 3

# Errors that say what a user can change. Others are defects, which need their traceback.
EXPLAINED = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)
# Those of them by which the package and Transformers refuse something.
REFUSALS = (ValueError, TypeError, OSError, ImportError)


class BadArguments(ValueError):
    """The arguments of a command cannot be meant so. The command then ends with exit code 2."""


class _Work:
    """Whether the command has begun to change weights or to write results."""

    begun = False


def begin_work() -> None:
    """Note that from now on weights change or results are written. An error is a failure then, not a refusal."""
    _Work.begun = True


def forget_work() -> None:
    """Note that nothing is changed yet."""
    _Work.begun = False


def code_of(error: BaseException) -> int:
    """Return the exit code for an error.

    An error is a refusal if it is a `ValueError`, `TypeError`, `OSError` or `ImportError` and comes before the work:
    before `begin_work`, and without a note. The package adds notes to errors that come while blocks are changed.
    """
    if isinstance(error, BadArguments):
        return BAD_ARGUMENTS
    before_work = not _Work.begun and not getattr(error, "__notes__", ())
    return REFUSED if isinstance(error, REFUSALS) and before_work else FAILED


def one_line(command: str, error: BaseException) -> str:
    """Return what is told about an error: the command, how it ended, and the message and notes in one line."""
    how = {FAILED: "failed", BAD_ARGUMENTS: "bad arguments", REFUSED: "refused"}[code_of(error)]
    words = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
    if not isinstance(error, EXPLAINED) or not words:
        words = f"{type(error).__name__}: {words}"
    return f"{f'peft-sparse {command}'.strip()}: {how}: {words}"


def tell(command: str, error: BaseException, whole: bool) -> int:
    """Write what is to be said about `error` to stderr, the line last, and return the exit code.

    Args:
        command: the name of the command.
        error: what ended it.
        whole: whether the traceback is shown before the line. That of a defect always is.
    """
    if whole or not isinstance(error, EXPLAINED):
        traceback.print_exception(error)
    sys.stdout.flush()
    say_last(one_line(command, error))
    return code_of(error)
