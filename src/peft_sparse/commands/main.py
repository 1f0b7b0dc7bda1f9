"""The frame of the command line: finds the command, reads its arguments and ends it with an exit code."""

import argparse
import ast
import copy
import difflib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .last_words import say_last
from .outcome import DONE, FAILED, BadArguments, forget_work, tell


# The modules of the commands, in the order of the help. A module is imported when its command runs.
COMMANDS = (
    "compress",
    "prune",
    "reconstruct",
    "retrain",
    "evaluate",
    "inspect",
    "merge",
    "pack",
    "unpack",
    "push",
    "structured",
    "plan",
)
EPILOG = """
exit codes: 0 done, 1 failed, 2 bad arguments, 3 refused before anything was changed

`peft-sparse COMMAND --help` explains a command. docs/cli.md shows all of them.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code: 0 done, 1 failed, 2 bad arguments, 3 refused before the work.

    Args:
        arguments: what follows `peft-sparse` on the command line. Default: that of this process.
    """
    forget_work()
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = ""
    try:
        overview = _overview()
        name = overview.parse_args(given[:1]).command
        args = _parsed(_parser(name), given[1:])
        written = _module(name).run(args)
    except SystemExit as end:  # from `--help` and `--version`
        return int(end.code or 0)
    except KeyboardInterrupt:
        say_last(f"peft-sparse {name}: interrupted")
        return FAILED
    except Exception as error:
        return tell(name, error, "--traceback" in given)
    if os.environ.get("RANK", "0") == "0":
        for what in written:
            print(f"written: {what}")
    return DONE


def start(arguments: Sequence[str] | None = None) -> None:
    """Run the command of this process, and end the process with its exit code.

    Args:
        arguments: what follows `peft-sparse` on the command line. Default: that of this process.
    """
    code = main(arguments)
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        sys.exit(code)
    if code == DONE:
        distributed.barrier()
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread of gloo that outlives the interpreter may abort the process.
    os._exit(code)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors end as all others do: in one line, which comes last."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise BadArguments(
            f"{message}{'' if message.endswith(('.', '?')) else '.'} `{self.prog} --help` explains the arguments."
        )


class _OneSpelling(argparse.RawDescriptionHelpFormatter):
    """Shows `--name_of_argument` alone, and not `--name-of-argument` beside it, which works as well."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown, names = copy.copy(action), action.option_strings
        second = {f"--{name[2:].replace('_', '-')}" for name in names if "_" in name}
        shown.option_strings = [name for name in names if name not in second]
        return super()._format_action_invocation(shown)


def _overview() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="peft-sparse",
        description="Prune language models, recover their quality without filling a zero, and share the result.",
        epilog="commands:\n" + "".join(f"  {name:<12}{_summary(name)}\n" for name in COMMANDS) + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("command", type=_known, metavar="COMMAND", help="what to do, see below")
    return parser


def _known(name: str) -> str:
    if name in COMMANDS:
        return name
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    known = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(COMMANDS)}."
    raise argparse.ArgumentTypeError(f"there is no command {name!r}. {known}")


def _parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command, with the arguments that every command has."""
    module = _module(name)
    parser = _Parser(
        prog=f"peft-sparse {name}",
        description=f"{module.SUMMARY}\n\nexample:\n  {module.EXAMPLE}",
        formatter_class=_OneSpelling,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    positional = " ".join(action.dest.upper() for action in parser._actions if not action.option_strings)
    parser.usage = f"%(prog)s {positional} [arguments]".replace("  ", " ")
    every = parser.add_argument_group("every command")
    every.add_argument("--config", metavar="FILE", help="YAML file with names of arguments and their values")
    every.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _parsed(parser: argparse.ArgumentParser, given: list[str]) -> argparse.Namespace:
    """Return the arguments of a command. What `--config` names counts where the command line says nothing."""
    first = _Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(given)[0].config
    args, rest = parser.parse_known_args([*([] if path is None else _words(parser, path)), *given])
    if rest:
        options = [option for option in parser._option_string_actions if option.startswith("--")]
        near = _nearest(rest[0].partition("=")[0], options)
        hint = " Give the model by --model." if not rest[0].startswith("-") and "--model" in options else near
        parser.error(f"unrecognized arguments: {' '.join(rest)}.{hint}")
    return args


def _words(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """Return the options in a file as words of a command line. Other arguments become defaults of `parser`."""
    # It imports what every command has imported already.
    from ..recipes.recipe import read_values

    try:
        values = read_values(path)
    except (OSError, ValueError) as error:
        parser.error(f"--config: {error}")
    # What belongs to one call of a command, and not to a run.
    own = {"help", "help_all", "config", "traceback"}
    actions = {action.dest: action for action in parser._actions if action.dest not in own}
    actions |= {
        option[2:].replace("-", "_"): action
        for option, action in parser._option_string_actions.items()
        if option.startswith("--") and action.dest not in own
    }
    words: list[str] = []
    for name, value in values.items():
        key = str(name).replace("-", "_")
        if key not in actions:
            parser.error(f"{path}: unknown name {name!r}.{_nearest(key, list(actions))}")
        action = actions[key]
        if action.option_strings:
            words += _as_words(parser, action, f"{path}: {name}", value)
        else:
            action.required = False
            parser.set_defaults(**{action.dest: value})
    return words


def _as_words(parser: argparse.ArgumentParser, action: argparse.Action, name: str, value: Any) -> list[str]:
    """Return an option and its value as they are written on a command line."""
    option = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            parser.error(f"{name}: expected true or false, got {value!r}")
        return [option] if value else []
    several = isinstance(value, list)
    if several and action.nargs in (None, "?"):
        parser.error(f"{name}: expected one value, got the list {value!r}")
    # YAML reads the word `no` as false, and some arguments have this name for one of their values.
    named = {False: "no"} if "no" in (action.choices or ()) else {}
    texts = [
        json.dumps(each) if isinstance(each, (dict, list)) else str(named.get(each, each))
        for each in (value if several else [value])
        if each is not None
    ]
    if not texts:
        return []
    return [option, *texts] if action.nargs in ("*", "+") else [f"{option}={texts[0]}"]


def _nearest(word: str, known: list[str]) -> str:
    """Return a sentence with the name that is most like `word`, or that begins with it. Empty if there is none."""
    near = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def _summary(name: str) -> str:
    """Return the `SUMMARY` of a command without importing its module, which would take seconds."""
    tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "SUMMARY":
            return str(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    raise AttributeError(f"{name}.py has no SUMMARY")


def _version() -> str:
    text = Path(__file__).parents[1].joinpath("__init__.py").read_text(encoding="utf-8")
    return "peft_sparse " + text.rpartition('__version__ = "')[2].partition('"')[0]
