"""`peft-sparse push`: push a folder to the Hub, with its model card."""

import argparse

from ..sharing import push_folder


SUMMARY: str = "Push an adapter, a model or a packed model to the Hub, with its model card."
EXAMPLE: str = "peft-sparse push compressed/sparse user/smollm2-half --report compressed/report.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `push_folder`."""
    parser.add_argument("folder", help="the folder of the adapter, model or packed model")
    parser.add_argument("repo_id", help="the name on the Hub, such as user/name")
    parser.add_argument("--report", action="append", help="report.json of the run, for the card; may be repeated")
    parser.add_argument("--base_model", help="the Hub id of the base model; needed if an adapter names a folder")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="the branch to push to")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request")
    parser.add_argument("--commit_message", help="the message of the commit")


def run(args: argparse.Namespace) -> list[str]:
    """Push the folder.

    Returns:
        The address of the commit or pull request.
    """
    return [
        push_folder(
            args.folder,
            args.repo_id,
            report=args.report,
            base_model=args.base_model,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
        )
    ]
