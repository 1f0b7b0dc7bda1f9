r"""What held-out batches and the order of the sequences change in a reconstruction, on a small model.

    python benchmarks/held_out.py --model FOLDER --text-file tinystories.txt.gz \
        --output benchmarks/results/held-out-stories260k-cpu.json

Wanda prunes attention and MLP in turn while they are fitted (mode SS, full weights, AdamW, rate 1e-3, one sequence of
128 tokens in a step, one pass over 32 sequences). The order is drawn anew for each region, or is that of the data, as
in the loop of "A Free Lunch in LLM Compression" (arXiv:2510.14444). The last fifth of the text is evaluated on.
"""

import copy
import gzip
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import Fit, environment, pack_sequences, perplexity, reconstruct

from common import parser, write_json


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--text-file", required=True)
    arguments.add_argument("--output", required=True)
    arguments.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--sequences", type=int, default=32)
    args = arguments.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with gzip.open(args.text_file, "rt", encoding="utf-8") as file:
        text = file.read()
    cut = len(text) * 4 // 5
    train, evaluation = (pack_sequences(part, tokenizer, 128) for part in (text[:cut], text[cut:]))
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows: list[dict[str, Any]] = []
    for pattern in args.patterns:
        for holdout in (0.1, 0.0):
            for shuffled in (True, False):
                found = []
                for seed in args.seeds:
                    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
                    model, fit = copy.deepcopy(dense), Fit(learning_rate=1e-3, holdout=holdout, seed=seed)
                    calibration = train[order[: args.sequences]]
                    kept = torch.arange if not shuffled else torch.randperm
                    with mock.patch("torch.randperm", lambda n, kept=kept, **options: (
                        kept(n, **options) if kept is not torch.arange else torch.arange(n)
                    )):  # fmt: skip
                        level: Any = pattern if ":" in pattern else float(pattern)
                        reconstruct(model, level, calibration, criterion="wanda", fit=fit)
                    found.append(perplexity(model, evaluation, batch_size=20))
                mean = sum(found) / len(found)
                rows.append(
                    {"pattern": pattern, "holdout": holdout, "shuffled": shuffled, "perplexities": found, "mean": mean}
                )
                print(rows[-1], flush=True)
    settings = {"model": Path(args.model).parent.name, "text": Path(args.text_file).name, "sequences": args.sequences}
    dense_value = perplexity(dense, evaluation, batch_size=20)
    write_json(args.output, {"rows": rows, "dense": dense_value, **settings, "environment": environment()})


if __name__ == "__main__":
    main()
