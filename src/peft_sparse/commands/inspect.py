"""`peft-sparse inspect`: tells what a checkpoint holds."""

import argparse
import json

from ..sharing.inspection import inspect_checkpoint


SUMMARY: str = "Tell the sparsity, n:m and masks of any checkpoint, and what an adapter is for. Builds no model."
EXAMPLE: str = "peft-sparse inspect pruned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("source", help="folder of a model or an adapter, a file with tensors, or a name on the Hub")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> list[str]:
    """Print what was found. Nothing is written."""
    found = inspect_checkpoint(args.source)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return []
