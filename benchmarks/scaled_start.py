r"""How ScaledLoRA starts: the forms and starts of the tuner, and PEFT's HiRA, each at its own best learning rate.

    python benchmarks/scaled_start.py --model FOLDER --text-file tinystories-sample.txt.gz \
        --output benchmarks/results/scaled-start-stories260k-cpu.json
    python benchmarks/scaled_start.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz \
        --rank 16 --length 256 --batch_size 1 --steps 40 --windows 4 --window 1024 --seeds 1 \
        --output benchmarks/results/scaled-start-smollm2-cpu.json
    python benchmarks/scaled_start.py --table --output (that file)

A pruned model is retrained by adapters alone, with AdamW without weight decay. After 10 % of warm-up the rate falls
linearly. With the seed 0 the rate is halved or doubled until both neighbours of the best rate are worse. The other
seeds run at this rate. A seed sets A and the order of the sequences. The starts are these:
- default: W ⊙ (1 + BA), A random and B = 0, but one row of A and one column of B are constant.
- HiRA (PEFT): W ⊙ (1 + BA), A random, B = 0.
- product: W ⊙ (BA), one component of ones, the others as HiRA (`residual=False`).
- product, ones x 0.1 (or 0): the same, and the component of ones moves by this fraction of each step of AdamW.
- paper: W ⊙ (BA), every entry 1 / sqrt(r), as published.
- rank 1, and residual, rank 1: the two formulas with r = 1.
"""

import argparse
import copy
import gzip
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import HiraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_sparse import ScaledLoRAConfig, pack_sequences, perplexity, prune
from peft_sparse.tuners import ScaledLoraLayer

from common import DEVICE, Rows, add_text_arguments, described, documents, parser, smollm2_dir


# Configuration, fields that differ from the default, and the fraction of a step that the component of ones moves.
STARTS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "default": (ScaledLoRAConfig, {}, 1),
    "HiRA (PEFT)": (HiraConfig, {}, 1),
    "product": (ScaledLoRAConfig, {"residual": False}, 1),
    "paper": (ScaledLoRAConfig, {"init_weights": "paper"}, 1),
    "rank 1": (ScaledLoRAConfig, {"r": 1, "residual": False}, 1),
    "residual, rank 1": (ScaledLoRAConfig, {"r": 1, "residual": True}, 1),
    "product, ones x 0.1": (ScaledLoRAConfig, {"residual": False}, 0.1),
    "product, ones x 0": (ScaledLoRAConfig, {"residual": False}, 0),
}


class Benchmark:
    """The model, the text, and the rows that are measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = args.model or smollm2_dir()
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if args.text_file:
            with gzip.open(args.text_file, "rt", encoding="utf-8") as file:
                whole = file.read()
            cut = len(whole) * 85 // 100
            text, evaluation_text = [whole[:cut]], whole[cut:]
        else:
            text, evaluation_text = documents(args)
        self.train = pack_sequences(text, tokenizer, args.length)[: args.sequences]
        self.evaluation = pack_sequences([evaluation_text], tokenizer, args.window, separator="")[: args.windows]
        common = described(args, text, evaluation_text, self.train, self.evaluation)
        if args.text_file:
            for part in ("calibration", "evaluation"):
                common[part]["name"] = Path(args.text_file).name
        settings = {
            **common,
            **{name: getattr(args, name) for name in ("rank", "steps", "batch_size")},
            **({"model": Path(args.model).parent.name} if args.model else {}),
        }
        self.rows = Rows(args.output, settings)

    def pruned(self, criterion: str, sparsity: float | str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder).to(DEVICE)
        prune(model, sparsity, None if criterion == "magnitude" else self.train[:64], criterion=criterion)
        return model

    def run(self, model: Any, start: str, rate: float, seed: int) -> float:
        """Train a copy of the pruned model, and return its perplexity. It is infinite if the loss is not finite."""
        kind, options, fraction = STARTS[start]
        set_seed(seed)
        common = {"r": self.args.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(copy.deepcopy(model), kind(**common | options)).train()
        ones = component_of_ones(model) if fraction != 1 else []
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), rate, weight_decay=0.0)
        steps, batch = self.args.steps, self.args.batch_size
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
        )
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-steps * batch // len(self.train))
        order = torch.cat([torch.randperm(len(self.train), generator=generator) for _ in range(epochs)])
        for indices in order[: steps * batch].view(steps, batch):
            ids = self.train[indices].to(DEVICE)
            loss = model(input_ids=ids, labels=ids).loss
            if not loss.isfinite():
                return math.inf
            loss.backward()
            before = [entries.clone() for entries in ones]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            for entries, old in zip(ones, before, strict=True):
                entries.lerp_(old, 1 - fraction)
        return perplexity(model, self.evaluation)

    def measure(self, criterion: str, sparsity: float | str, starts: list[str]) -> None:
        """Add the rows of one pruned model."""
        model = self.pruned(criterion, sparsity)
        place = {"criterion": criterion, "sparsity": sparsity}
        if not self.rows.find(**place, start="pruned"):
            self.rows.add({**place, "start": "pruned", "perplexity": perplexity(model, self.evaluation)})
        for start in starts:

            def result(rate: float, seed: int, start: str = start) -> float:
                wanted = {**place, "start": start, "rate": rate, "seed": seed}
                done = self.rows.find(**wanted)
                if done is None:
                    began = time.process_time()
                    found = self.run(model, start, rate, seed)
                    done = {**wanted, "perplexity": found, "cpu_seconds": time.process_time() - began}
                    self.rows.add(done)
                return done["perplexity"]

            rate = bracketed(lambda rate: result(rate, 0), self.args.first_rate)
            for seed in range(1, self.args.seeds):
                result(rate, seed)


def component_of_ones(model: Any) -> list[Tensor]:
    """Return the first row of A and the first column of B of every layer, as views."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, ScaledLoraLayer)]
    return [
        part.detach() for layer in layers for part in (layer.A["default"].weight[0], layer.B["default"].weight[:, 0])
    ]


def bracketed(measure: Callable[[float], float], rate: float) -> float:
    """Halve or double the rate until both neighbours of the best rate are worse, and return the best one."""
    known: dict[float, float] = {}
    while True:
        for near in (rate, rate / 2, rate * 2):
            known.setdefault(near, math.nan)
            if math.isnan(known[near]):
                known[near] = measure(near)
        best = min((rate, rate / 2, rate * 2), key=lambda near: known[near])
        if best == rate:
            return rate
        rate = best


def table(rows: list[dict[str, Any]]) -> str:
    """Return the mean perplexity over the seeds at the best rate, by start and pruned model, as Markdown."""
    places = list(dict.fromkeys((row["criterion"], row["sparsity"]) for row in rows))
    lines = ["| start | " + " | ".join(f"{s}, {c}" for c, s in places) + " |", "| --- |" + " ---: |" * len(places)]
    for start in dict.fromkeys(row["start"] for row in rows):
        cells = []
        for place in places:
            found = [r for r in rows if (r["criterion"], r["sparsity"]) == place and r["start"] == start]
            at_zero = [row for row in found if row.get("seed", 0) == 0]
            if not at_zero:
                cells.append("")
                continue
            rate = min(at_zero, key=lambda row: row["perplexity"]).get("rate")
            values = [row["perplexity"] for row in found if row.get("rate") == rate]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}" + ("" if rate is None else f" at {rate:g}"))
        lines.append(f"| {start} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", help="folder of the model; SmolLM2-135M-Instruct if left out")
    options.add_argument("--text-file", help="gzipped text, of which the last 15 % are for evaluation")
    add_text_arguments(options)
    options.add_argument("--models", nargs="+", default=["magnitude:0.5", "wanda:2:4", "wanda:0.5", "magnitude:0.7"])
    options.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--sequences", type=int, default=2000)
    options.add_argument("--batch_size", type=int, default=4)
    options.add_argument("--steps", type=int, default=80)
    options.add_argument("--windows", type=int, default=48)
    options.add_argument("--window", type=int, default=128)
    options.add_argument("--first_rate", type=float, default=0.04)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--table", action="store_true", help="print the table of a result")
    args = options.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text())["rows"]))
        return
    benchmark = Benchmark(args)
    for name in args.models:
        criterion, _, sparsity = name.partition(":")
        benchmark.measure(criterion, sparsity if ":" in sparsity else float(sparsity), args.starts)


if __name__ == "__main__":
    main()
