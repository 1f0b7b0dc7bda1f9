"""`peft-sparse pack`: writes a saved model in fewer bytes."""

import argparse

from ..sharing.packing import pack_checkpoint


SUMMARY: str = "Write a saved sparse model in fewer bytes, without loss. It loads after `import peft_sparse`."
EXAMPLE: str = "peft-sparse pack pruned pruned-packed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("source", help="folder of a saved model, or its name on the Hub")
    parser.add_argument("target", help="folder to write, which does not exist or is empty")


def run(args: argparse.Namespace) -> list[str]:
    """Pack, print both sizes, and return the folder that was written."""
    print(pack_checkpoint(args.source, args.target))
    return [f"{args.target} (load it by from_pretrained, after `import peft_sparse`)"]
