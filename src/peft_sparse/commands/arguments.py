"""Arguments of commands: the fields of dataclasses in groups, those that people need first."""

import argparse
import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .groups import WORDS
from .outcome import BadArguments


# Arguments that only experts need: `--help_all` shows them.
HIDDEN = "all arguments of transformers.TrainingArguments"


def add_fields(
    parser: argparse.ArgumentParser,
    kind: Any,
    groups: Mapping[str, Sequence[str]],
    defaults: Mapping[str, Any] | None = None,
    *,
    all_others: bool = False,
) -> None:
    """Add fields of the dataclass `kind` as arguments. The values of those that are not given are left out.

    Args:
        parser: the parser of a command.
        kind: the dataclass.
        groups: names of fields by the title of their group.
        defaults: defaults of the command, which the help shows in the place of those of `kind`.
        all_others: whether the fields that the parser does not have yet are arguments too. `--help_all` shows them.
    """
    fields = {each.name: each for each in dataclasses.fields(kind) if each.init}
    for title, names in groups.items():
        _add_group(parser, kind, title, [fields[name] for name in names], defaults or {})
    if all_others:
        shown = {action.dest for action in parser._actions}
        rest = [each for name, each in fields.items() if name not in shown]
        for action in _add_group(parser, kind, HIDDEN, rest, defaults or {}):
            action.help, action.told = argparse.SUPPRESS, action.help  # type: ignore[attr-defined]
        parser.add_argument("--help_all", "--help-all", action=_HelpAll, help="show the arguments of training too")


def parsed(values: Mapping[str, Any], *kinds: Any) -> tuple[Any, ...]:
    """Return instances of dataclasses with `values`, as `HfArgumentParser` makes them.

    Raises:
        BadArguments: a class refuses its values.
    """
    try:
        return HfArgumentParser(kinds).parse_dict(dict(values), allow_extra_keys=True)
    except json.JSONDecodeError as error:
        raise BadArguments(f"Expected JSON such as '{{\"damping\": 0.1}}', got {error.doc!r}. {error}.") from error
    except (ValueError, TypeError) as error:
        raise BadArguments(str(error)) from error


def check_pruned(options: Any) -> None:
    """Check that the arguments of a training name a sparsity.

    Raises:
        BadArguments: they do not.
    """
    if options.pruning_pattern() is None:
        raise BadArguments('A sparsity is needed. Give --sparsity 0.5, or --pattern "2:4".')


def _add_group(
    parser: argparse.ArgumentParser, kind: Any, title: str, fields: list[Any], defaults: Mapping[str, Any]
) -> list[argparse.Action]:
    """Let `HfArgumentParser` make the arguments of `fields`, and add them as a group."""
    hints = typing.get_type_hints(kind)
    made = dataclasses.make_dataclass(
        kind.__name__,
        [(each.name, hints[each.name], _with_default(each, defaults)) for each in fields],
        namespace={"_argument_group_name": title},
        kw_only=True,
    )
    own = HfArgumentParser(made, add_help=False)
    for action in own._actions:
        action.default = argparse.SUPPRESS
        action.metavar = _metavar(action)
        option = action.option_strings[0]
        if option.startswith("--no_") and action.nargs == 0:
            action.help = f"Switch --{option[5:]} off."
    parser._add_container_actions(own)
    return own._actions


def _with_default(field: Any, defaults: Mapping[str, Any]) -> Any:
    default = defaults.get(field.name, field.default)
    made = field.default_factory is not dataclasses.MISSING and field.name not in defaults
    metadata = dict(field.metadata)
    shown = field.default_factory() if made else default
    said = WORDS.get(field.name) or metadata.get("help") or ""
    metadata["help"] = said
    if shown not in (None, False, [], {}, "", dataclasses.MISSING) and "Default" not in said:
        metadata["help"] = f"{said} Default: {getattr(shown, 'value', shown)}.".replace("%", "%%").strip()
    if made:
        return dataclasses.field(default_factory=field.default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _metavar(action: argparse.Action) -> str | None:
    """Return what the help shows in the place of a value."""
    if action.nargs == 0 or action.choices:
        return None
    if action.const is not None or action.type is string_to_bool:
        return "true|false"
    return {int: "N", float: "X", dict: "JSON"}.get(action.type, "TEXT")  # type: ignore[call-overload]


class _HelpAll(argparse.Action):
    """Prints the help with the arguments that it leaves out."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        """Print the whole help and end the process."""
        for action in parser._actions:
            action.help = getattr(action, "told", action.help)
        parser.print_help()
        parser.exit()
