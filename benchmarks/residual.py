r"""A low-rank residual in closed form, beside a pruned model: what it gives, what it costs, how large it is.

    python benchmarks/residual.py --output benchmarks/results/residual-smollm2-cpu.json
    python benchmarks/residual.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz ...

For each pattern, the model is pruned by each of `--pruned-by`, and then corrected by `residual_lora` of each rank. All
steps use the same calibration tokens. Time is that of the process, in CPU seconds. The text is that of
benchmarks/criteria.py.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import pack_sequences, perplexity, prune, sample_sequences
from peft_sparse.reconstruction import residual_lora

from common import Rows, add_text_arguments, described, documents, parser, smollm2_dir


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
    dense = AutoModelForCausalLM.from_pretrained(model_dir)
    if not rows:
        rows.add({"pattern": "dense", "perplexity": perplexity(dense, evaluation), "bytes": bytes_of(dense)})
    for pattern, pruned_by in itertools.product(args.patterns, args.pruned_by):
        ranks = [rank for rank in args.ranks if not rows.find(pattern=pattern, pruned_by=pruned_by, r=rank)]
        if not ranks:
            continue
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        torch.manual_seed(args.seed)
        row: dict[str, Any] = {"pattern": pattern, "pruned_by": pruned_by}
        criterion, _, update = pruned_by.partition("+")
        seconds = time.process_time()
        report = prune(
            model, pattern, calibration, criterion=criterion, update=bool(update), batch_size=args.batch_size
        )
        seconds = time.process_time() - seconds
        if 0 in ranks:
            rows.add(
                row
                | {
                    "r": 0,
                    "perplexity": perplexity(model, evaluation),
                    "error": report.error,
                    "cpu_seconds": seconds,
                    "threads": torch.get_num_threads(),
                }
            )
        for rank in filter(None, ranks):
            seconds = time.process_time()
            adapted, residual = residual_lora(model, dense, calibration, r=rank, batch_size=args.batch_size)
            seconds = time.process_time() - seconds
            rows.add(
                row
                | {
                    "r": rank,
                    "perplexity": perplexity(adapted, evaluation),
                    "error_pruned": residual.error_pruned,
                    "error": residual.error,
                    "cpu_seconds": seconds,
                    "threads": torch.get_num_threads(),
                    "parameters": residual.parameters,
                    "bytes": bytes_of_adapter(adapted),
                }
            )
            model = adapted.unload()


def bytes_of(model: torch.nn.Module) -> int:
    """Return the bytes of the parameters of a model. A shared parameter counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def bytes_of_adapter(model: PeftModel) -> int:
    """Return the bytes of the file that holds the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", help="a local folder; default: SmolLM2-135M-Instruct")
    add_text_arguments(options)
    options.add_argument("--calibration-sequences", type=int, default=64)
    options.add_argument("--calibration-length", type=int, default=128, help="tokens")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--length", type=int, default=1024, help="tokens of an evaluation window")
    options.add_argument("--windows", type=int, default=4, help="number of evaluation windows, taken from the start")
    options.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    options.add_argument(
        "--pruned-by",
        nargs="+",
        default=["wanda", "wanda+update", "sparsegpt", "sparsegpt+update"],
        help="a criterion, or a criterion and update",
    )
    options.add_argument("--ranks", type=int, nargs="+", default=[0, 16, 64], help="0 is the pruned model alone")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", required=True)
    return options.parse_args()


if __name__ == "__main__":
    main()
