r"""How near the rate of `find_learning_rate` comes to the best of a grid: perplexity after training at each.

    python benchmarks/learning_rates.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz \
        --tuners MaskLoRA --length 128 --rates 1e-3,2e-3,4e-3,8e-3 \
        --output benchmarks/results/learning-rates-smollm2-cpu.json
    python benchmarks/learning_rates.py --model stories260K --text-file tinystories.txt.gz --tuners MaskLoRA \
        --output benchmarks/results/learning-rates-stories260k-cpu.json
    python benchmarks/learning_rates.py --table --output (one of these files)

The model is pruned, and the same pruned model is trained at each rate of a grid with steps of a factor of 2, and at
the rate that is found. The search begins at 1e-3 in every row. All runs train for 40 steps of one sequence, with 10 %
of warm-up and a rate that falls linearly. The optimiser is AdamW without weight decay. MaskLoRA has rank 16, alpha 32
and `train_norms`. A text file of one piece is divided: the first 85 % train, and the rest evaluates.
"""

import argparse
import copy
import gzip
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_sparse import (
    MaskLoRAConfig,
    ScaledLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    pack_sequences,
    perplexity,
    prune,
)

from common import DEVICE, Rows, add_text_arguments, described, documents, parser, smollm2_dir


COMMON: dict[str, Any] = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TUNERS: dict[str, Any] = {
    "MaskLoRA": MaskLoRAConfig(**COMMON, lora_alpha=32, train_norms=True),
    "full": None,
    "ScaledLoRA": ScaledLoRAConfig(**COMMON),
}
GRIDS = {
    "MaskLoRA": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
    "full": [4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3],
    "ScaledLoRA": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2],
}
START = 1e-3
CASES: list[tuple[str, float | str]] = [
    ("sparsegpt", 0.5),
    ("magnitude", 0.5),
    ("sparsegpt", "2:4"),
    ("sparsegpt", 0.7),
    ("sparsegpt", 0.6),
]


def texts(args: argparse.Namespace) -> tuple[list[str], str]:
    if args.text_file is None:
        return documents(args)
    with gzip.open(args.text_file, "rt", encoding="utf-8") as file:
        text = file.read()
    cut = len(text) * 85 // 100
    return [text[:cut]], text[cut:]


def train(base: Any, tuner: str, rate: float | None, tokens: Tensor, args: argparse.Namespace) -> tuple[Any, Any]:
    """Train a copy of `base` at `rate`, or at the rate that is found. Return the model and the arguments."""
    model = copy.deepcopy(base)
    set_seed(args.seed)
    config = TUNERS[tuner]
    model = model if config is None else get_peft_model(model, copy.deepcopy(config))
    with tempfile.TemporaryDirectory() as folder:
        training = SparseTrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=1, learning_rate=rate or START,
            find_learning_rate=rate is None, warmup_steps=0.1, weight_decay=0.0, seed=args.seed, report_to="none",
            use_cpu=DEVICE == "cpu", save_strategy="no", logging_steps=1000, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = SparseTrainer(model, training, train_dataset=data)
        trainer.train()
    return model, trainer


def measure(rows: Rows, base: Any, tokens: Tensor, evaluation: Tensor, args: argparse.Namespace, **case: Any) -> None:
    """Measure the rate that is found and those of the grid, unless they are measured."""
    grid = GRIDS[case["tuner"]] if args.rates is None else [float(rate) for rate in args.rates.split(",")]
    for rate in (None, *grid):
        wanted = {**case, "rate": rate or "found"}
        if rows.find(**wanted):
            continue
        started = time.process_time()
        model, trainer = train(base, case["tuner"], rate, tokens, args)
        seconds = time.process_time() - started
        entry: dict[str, Any] = next((e for e in trainer.state.log_history if "found_learning_rate" in e), {})
        found: dict[str, Any] = {key: entry[key] for key in ("found_learning_rate", "search_steps") if key in entry}
        try:
            value: float | None = perplexity(model, evaluation)
        except (ValueError, OverflowError):
            value = None
        rows.add({**wanted, "perplexity": value, "cpu_seconds": seconds, **found})


def table(rows: Rows) -> None:
    """Print the table of docs/numbers/recovery.md."""
    print("| pruned | tuner | perplexity pruned | best of the grid | found | steps of the search |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for row in (row for row in rows if row.get("rate") == "found"):
        case = {key: row[key] for key in ("criterion", "pattern", "tuner")}
        grid = [r for r in rows if all(r.get(k) == v for k, v in case.items()) and r["rate"] != "found"]
        if not grid:
            continue
        best = min(grid, key=lambda r: r["perplexity"] or math.inf)
        pruned = rows.find(criterion=case["criterion"], pattern=case["pattern"], tuner="none")
        assert pruned is not None
        excess = row["perplexity"] / best["perplexity"] - 1
        print(
            f"| {row['criterion']} {row['pattern']} | {row['tuner']} | {pruned['perplexity']:.2f} "
            f"| {best['perplexity']:.2f} at {best['rate']:g} | {row['perplexity']:.2f} at "
            f"{row['found_learning_rate']:.2g} ({excess:+.1%}) | {row['search_steps']} |"
        )


def main() -> None:
    options = parser(__doc__)
    add_text_arguments(options)
    options.add_argument("--text-file", help="gzipped text of one piece, in place of the other two files")
    options.add_argument("--model", help="a folder or a name. Default: SmolLM2-135M-Instruct")
    options.add_argument("--name", help="the name of the model in the result, if it is a folder")
    options.add_argument("--tuners", default=",".join(TUNERS))
    options.add_argument("--criteria", default="sparsegpt,magnitude")
    options.add_argument("--patterns", default="0.5,2:4,0.7,0.6")
    options.add_argument("--rates", help="the grid. Default: one for each tuner")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--table", action="store_true", help="print the table of the output file")
    options.add_argument("--output", required=True)
    args = options.parse_args()
    folder = args.model or smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text, held_out = texts(args)
    packed = pack_sequences(text, tokenizer, args.length)
    calibration, tokens = packed[:64, :128], packed[64 : 64 + max(64, args.steps + 8)]
    evaluation = pack_sequences([held_out], tokenizer, 512 if args.text_file is None else 256, separator="")[:8]
    settings = described(args, text, held_out, calibration, evaluation)
    if args.model:
        settings["model"] = args.name or args.model
    if args.text_file:
        settings["calibration"]["name"] = settings["evaluation"]["name"] = Path(args.text_file).name
    rows = Rows(args.output, {**settings, "steps": args.steps, "tokens_per_step": args.length})
    if args.table:
        table(rows)
        return
    for criterion, pattern in CASES:
        if criterion not in args.criteria.split(",") or str(pattern) not in args.patterns.split(","):
            continue
        base = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
        prune(base, pattern, calibration=None if criterion == "magnitude" else calibration, criterion=criterion)
        case = {"criterion": criterion, "pattern": str(pattern)}
        if not rows.find(**case, tuner="none"):
            rows.add({**case, "tuner": "none", "perplexity": perplexity(base, evaluation)})
        for tuner in args.tuners.split(","):
            measure(rows, base, tokens, evaluation, args, **case, tuner=tuner)


if __name__ == "__main__":
    main()
