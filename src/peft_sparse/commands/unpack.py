"""`peft-sparse unpack`: writes the plain model that was packed."""

import argparse

from ..sharing.packing import unpack_checkpoint


SUMMARY: str = "Write the plain model of a packed one, for programs that do not know packed ones."
EXAMPLE: str = "peft-sparse unpack pruned-packed pruned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("source", help="folder of a packed model, or its name on the Hub")
    parser.add_argument("target", help="folder to write, which does not exist or is empty")


def run(args: argparse.Namespace) -> list[str]:
    """Unpack, print both sizes, and return the folder that was written."""
    print(unpack_checkpoint(args.source, args.target))
    return [args.target]
