"""What each criterion, allocation and refinement costs beside SparseGPT, and the error and perplexity that it reaches.

    python benchmarks/refinement.py --output benchmarks/results/refinement-cost-smollm2-cpu.json
    python benchmarks/refinement.py --patterns 0.5 --output benchmarks/results/pruning-cost-smollm2-cpu.json

The model is SmolLM2-135M-Instruct from PyPI. The text is that of examples/demo.py, unless files are named. Each row
is a whole `prune` of the first blocks (`--blocks`): calibration, the proof, and the report of errors are included.
"as in fast" ends swaps and update where the recipe `fast` does.
Seconds are those of the processor in this process, so other work on the machine counts little. For each pattern all
ways run one after the other; `--rounds` repeats this, and the row has the median. Perplexity is that of the whole
model, in which the later blocks stay dense.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import LeastSquares, Swap, pack_sequences, perplexity, prune, sample_sequences

from common import Rows, add_text_arguments, described, documents, parser, smollm2_dir


WAYS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"criterion": "sparsegpt"},
    "magnitude, no text": {"criterion": "magnitude", "calibration": None},
    "wanda": {"criterion": "wanda"},
    "ria": {"criterion": "ria"},
    "gblm": {"criterion": "gblm"},
    "wanda, owl": {"criterion": "wanda", "allocation": "owl"},
    "wanda, dsnot": {"criterion": "wanda", "refinement": "dsnot"},
    "wanda, swap": {"criterion": "wanda", "refinement": "swap"},
    "wanda, update": {"criterion": "wanda", "update": True},
    "wanda, swap, update": {"criterion": "wanda", "refinement": "swap", "update": True},
    "as in fast": {
        "criterion": "wanda",
        "refinement": Swap(tolerance=2e-3, candidates=4),
        "update": LeastSquares(tolerance=5e-3),
    },
}


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    train, text = documents(args)
    calibration = sample_sequences(train, tokenizer, args.calibration_sequences, args.calibration_length, args.seed)
    evaluation = pack_sequences([text], tokenizer, 1024, separator="")[: args.windows]
    settings = described(args, train, text, calibration, evaluation) | {"blocks": args.blocks, "rounds": args.rounds}
    rows = Rows(args.output, settings)
    dense = AutoModelForCausalLM.from_pretrained(smollm2_dir())
    if not rows:
        rows.add({"way": "dense", "perplexity": perplexity(dense, evaluation)})
    for pattern in args.patterns:
        if rows.find(pattern=pattern, way=args.ways[0]):
            continue
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
        for round_ in range(args.rounds):
            for way in args.ways:
                model = copy.deepcopy(dense)
                found[way].append(measured(model, pattern, calibration, args.blocks, WAYS[way]))
                if not round_:
                    found[way][0]["perplexity"] = perplexity(model, evaluation)
        for way, repeats in found.items():
            seconds = statistics.median(row["seconds"] for row in repeats)
            beside = statistics.median(
                row["seconds"] / other["seconds"] for row, other in zip(repeats, found[args.ways[0]], strict=True)
            )
            rows.add({"pattern": pattern, "way": way, **repeats[0], "seconds": seconds, "beside_first": beside})


def measured(model: Any, pattern: str, calibration: Tensor, blocks: int, options: dict[str, Any]) -> dict[str, Any]:
    """Prune the first blocks of `model`. Return the seconds of the processor and the mean error of the weights."""
    targets = rf".*layers\.({'|'.join(map(str, range(blocks)))})\..*"
    started = time.process_time()
    call: dict[str, Any] = {"calibration": calibration, "batch_size": 8, "target_modules": targets} | options
    report = prune(model, pattern, **call)
    return {"seconds": time.process_time() - started, "error": report.error, "threads": torch.get_num_threads()}


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    add_text_arguments(options)
    options.add_argument("--patterns", nargs="+", default=["0.5", "2:4", "0.7"])
    options.add_argument("--blocks", type=int, default=30, help="how many blocks are pruned, from the first on")
    options.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="times are compared with the first"
    )
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--calibration-sequences", type=int, default=64)
    options.add_argument("--calibration-length", type=int, default=128, help="tokens")
    options.add_argument("--windows", type=int, default=4, help="windows of 1,024 tokens for perplexity")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, required=True)
    return options.parse_args()


if __name__ == "__main__":
    main()
