"""`peft-sparse evaluate`: measures models side by side."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..evaluation import compare_models
from ..evaluation.protocol import WINDOW
from .story import prepare
from .text_files import read_documents


SUMMARY: str = "Compare models: perplexity, zero-shot tasks, size, sparsity, speed."
EXAMPLE: str = "peft-sparse evaluate DENSE PRUNED ADAPTER --text_file text.txt --tasks perp --limit 200"

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add to `parser` which models are compared, on which text and tasks, and what else is measured."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="Folders or Hub ids of models and adapters. The others are compared with the first, the dense model.",
    )
    text = parser.add_argument_group("the text of perplexity and agreement")
    _add(
        text,
        "--text_file",
        metavar="FILE",
        help="Plain text, or JSON lines with a field text (.jsonl, .json). Also .gz.",
    )
    _add(text, "--dataset_name", metavar="NAME", help="Data set on the Hub, with a column text.")
    _add(text, "--dataset_config", metavar="NAME", help="Configuration of the data set.")
    _add(text, "--dataset_split", metavar="NAME", default="test", help="Split of the data set. Default: test.")
    _add(text, "--window", type=int, metavar="N", default=WINDOW, help=f"Tokens of a window. Default: {WINDOW}.")
    _add(text, "--max_windows", type=int, metavar="N", help="Measure only so many windows. Default: all.")
    tasks = parser.add_argument_group("zero-shot tasks, by lm-eval")
    _add(tasks, "--tasks", nargs="+", metavar="TASK", help="perp for the seven tasks of the papers, or lm-eval names.")
    _add(tasks, "--limit", type=int, metavar="N", help="Evaluate N rows of each task, drawn at random. Default: all.")
    _add(
        tasks,
        "--data_dir",
        metavar="DIR",
        help="Folder with the rows of the seven tasks, see docs/details/evaluation.md.",
    )
    speed = parser.add_argument_group("speed")
    together = "Rounds of generation. All models are then in memory together. 0 measures none. Default: 5."
    _add(speed, "--rounds", type=int, metavar="N", default=5, help=together)
    _add(speed, "--new_tokens", type=int, metavar="N", default=32, help="Tokens to generate. Default: 32.")
    _add(speed, "--speed", action="store_true", help="Measure the sparse kernels of this machine against dense ones.")
    run_options = parser.add_argument_group("the run")
    _add(run_options, "--base", metavar="MODEL", help="Base of the adapters, if it is not where they say.")
    _add(run_options, "--dtype", choices=DTYPES, default="auto", help="Dtype of the weights. Default: as saved.")
    _add(run_options, "--device", metavar="DEVICE", help="Such as cpu or cuda:1. Default: the GPU if there is one.")
    _add(run_options, "--batch_size", type=int, metavar="N", default=1, help="Windows and prompts that run together.")
    _add(run_options, "--seed", type=int, metavar="N", default=0, help="Seed of the rows of tasks. Default: 0.")
    _add(run_options, "--json", metavar="FILE", help="Write all numbers to this file.")


def run(args: argparse.Namespace) -> list[str]:
    """Measure the models of `args`, print the table, and return the file that was written, if any.

    Raises:
        FileNotFoundError: the folder of `--json` or the text is not there.
    """
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"Expected a folder for --json, and there is none for {args.json!r}. Make it first.")
    if args.json and Path(args.json).is_dir():
        raise IsADirectoryError(f"Expected a file for --json, got the folder {args.json!r}. Give the name of a file.")
    prepare()
    found = compare_models(
        args.models,
        _documents(args),
        window=args.window,
        max_windows=args.max_windows,
        tasks=args.tasks,
        limit=args.limit,
        data_dir=args.data_dir,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        kernels=args.speed,
        seed=args.seed,
        batch_size=args.batch_size,
        base=args.base,
        dtype=args.dtype,
        device=args.device,
    )
    print(found)
    if not args.json:
        return []
    Path(args.json).write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    return [args.json]


def _documents(args: argparse.Namespace) -> Iterable[Any] | None:
    """Return the texts of the arguments, or None if there are none."""
    if args.dataset_name is not None:
        from datasets import load_dataset

        return load_dataset(args.dataset_name, args.dataset_config, split=args.dataset_split)["text"]
    return None if args.text_file is None else read_documents(args.text_file)


def _add(group: Any, name: str, **options: Any) -> None:
    """Add an argument that may be written with underscores or with dashes."""
    group.add_argument(*dict.fromkeys((name, "--" + name[2:].replace("_", "-"))), **options)
