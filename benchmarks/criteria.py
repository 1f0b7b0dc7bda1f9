r"""Perplexity and layer-wise output error of every criterion at every pattern, on one pretrained model.

    python benchmarks/criteria.py --output benchmarks/results/criteria-smollm2-cpu.json
    python benchmarks/criteria.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz ...
    python benchmarks/criteria.py --criteria wanda --patterns 0.6 0.7 --beside allocation=owl allocation=erk ...

The model is SmolLM2-135M-Instruct from PyPI. The text is that of examples/demo.py, unless files are named: documents
as JSON lines with a field "text" for calibration, and the raw test split of WikiText-2 for evaluation. Calibration
takes random windows of random documents. Perplexity is measured on `"\n\n".join` of the evaluation text, in windows
without overlap. Tokens that do not fill the last window are dropped.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import pack_sequences, perplexity, prune, sample_sequences
from peft_sparse.pruning.criteria import CRITERIA

from common import DEVICE, Rows, add_text_arguments, described, documents, parser, smollm2_dir


def main() -> None:
    args = arguments()
    model_dir = args.model or smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    calibration_text, evaluation_text = documents(args)
    calibration = sample_sequences(
        calibration_text, tokenizer, args.calibration_sequences, args.calibration_length, args.seed
    )
    evaluation = pack_sequences([evaluation_text], tokenizer, args.length, separator="")[: args.windows]
    rows = Rows(args.output, described(args, calibration_text, evaluation_text, calibration, evaluation))
    model = AutoModelForCausalLM.from_pretrained(model_dir).to(DEVICE)
    dense = {name: value.clone() for name, value in model.state_dict().items()}

    if not rows:
        rows.add({"criterion": "dense", "perplexity": perplexity(model, evaluation)})
    for pattern, criterion, beside in itertools.product(args.patterns, args.criteria, args.beside):
        if rows.find(criterion=criterion, pattern=pattern, beside=beside):
            continue
        model.load_state_dict(dense)
        torch.manual_seed(args.seed)
        options: dict[str, Any] = {"criterion": criterion, "calibration": calibration, "batch_size": args.batch_size}
        report = prune(model, pattern, **options, **chosen(beside))
        rows.add(
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


def chosen(beside: str) -> dict[str, Any]:
    """Return the arguments of `prune` in a text such as "allocation=owl" or "refinement=swap,update"."""
    pairs = (part.partition("=") for part in beside.split(",") if part)
    return {name: value or True for name, _, value in pairs}


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", help="a local folder; default: SmolLM2-135M-Instruct")
    add_text_arguments(options)
    options.add_argument("--calibration-sequences", type=int, default=128)
    options.add_argument("--calibration-length", type=int, default=256, help="tokens")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--length", type=int, default=1024, help="tokens of an evaluation window")
    options.add_argument("--windows", type=int, default=20, help="number of evaluation windows, taken from the start")
    options.add_argument("--patterns", nargs="+", default=["0.5", "2:4", "0.6"])
    options.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    options.add_argument(
        "--beside",
        nargs="+",
        default=[""],
        help="arguments of prune, such as allocation=owl or refinement=swap,update",
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--pictures", help="a folder for the pictures of sparsity and error by depth")
    options.add_argument("--output", required=True)
    return options.parse_args()


if __name__ == "__main__":
    main()
