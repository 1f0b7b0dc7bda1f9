"""A choice is a name or a value: `"sparsegpt"`, or `SparseGPT(damping=0.1)`.

Each kind of choice has a table from names to the classes of its values.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


def chosen(
    argument: str, table: Mapping[str, type], choice: Any, options: Mapping[str, Any] | None = None, also: str = ""
) -> Any:
    """Return the value that `choice` stands for.

    Args:
        argument: the name of the caller's argument, for error messages.
        table: the class of each choice, by name.
        choice: a name in `table`, or an instance of one of its classes.
        options: the fields that differ from their defaults, by name. They are allowed only if `choice` is a name.
        also: what else the caller takes, for the error message.

    Raises:
        ValueError: `choice` is unknown, an option is unknown, or the class refuses an option's value.
    """
    if isinstance(choice, tuple(table.values())):
        if options:
            raise ValueError(
                f"`{argument}_options` goes with a name, but `{argument}` is the value {choice}. Put the options into "
                "the value."
            )
        return choice
    if not isinstance(choice, str) or choice not in table:
        classes = ", ".join(cls.__name__ for cls in table.values())
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, table))}, or a value of one of the classes {classes}; "
            f"got {choice!r}.{also}"
        )
    cls: Any = table[choice]
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := [name for name in options or {} if name not in known]:
        possible = f"Its options are {', '.join(map(repr, known))}." if known else "It has no options."
        raise ValueError(f"`{argument}={choice!r}` has no option {unknown[0]!r}. {possible}")
    return cls(**options or {})


def spelled(table: Mapping[str, type], value: Any) -> str:
    """Return the name of `value` in `table`, followed by the fields that differ from their defaults."""
    name = next((name for name, cls in table.items() if type(value) is cls), type(value).__name__)
    changed = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{name}({', '.join(changed)})" if changed else name


def check_numbers(value: Any, **accepted: tuple[bool, str]) -> None:
    """Raise ValueError for the first field of `value` whose condition does not hold.

    Args:
        value: the value whose fields are checked.
        accepted: for each field, whether its value is accepted, and what is accepted in words.
    """
    for name, (holds, expected) in accepted.items():
        if not holds:
            raise ValueError(f"`{name}` of {type(value).__name__} must be {expected}, got {getattr(value, name)!r}.")
