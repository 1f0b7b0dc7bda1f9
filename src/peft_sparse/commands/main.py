"""The frame of the command line: finds the command, reads its arguments and ends it with an exit code."""

import argparse
import ast
import copy
import difflib
import importlib
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
        raise BadArguments(f"{message}. `{self.prog} --help` explains the arguments.")


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
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(given)[0].config
    if path is not None:
        actions = {action.dest: action for action in parser._actions}
        values = _values(parser, path)
        for key in values:
            if key not in actions:
                near = difflib.get_close_matches(key, actions, n=1)
                parser.error(f"{path}: unknown name {key!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
            actions[key].required = False
        parser.set_defaults(**values)
    return parser.parse_args(given)


def _values(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"{path}: expected names and values, such as `criterion: wanda`, got {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


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
