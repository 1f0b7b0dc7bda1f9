r"""What to retrain after pruning, at equal tokens: perplexity, tokens per second and peak memory of every way.

    python benchmarks/retraining.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz \
        --output benchmarks/results/retraining-smollm2-cpu.json
    python benchmarks/retraining.py --table --output (that file)

SmolLM2-135M-Instruct is pruned by magnitude, every layer to the same sparsity. The parts are these:
- ways: PERP's table (Zimmer et al. 2023, arXiv:2312.15230, table 13) transposed: norms, output head, MaskLoRA,
  ScaledLoRA, LoRA-Prune, LoRA that stays unmerged, all weights. The model has no biases, so there is no row for them.
- cycles: iterative magnitude pruning against pruning once.
- distillation: the logits or the hidden states of the dense model, beside the task loss.
- rates: the ways with other learning rates. Each way has a rate of its own. This part shows how much the result
  depends on the rate.

A row is one training run. All runs share one process. The peak of resident memory is reset before each run, with the
model loaded. On a busy machine compare tokens per CPU second, because other processes change them least. The text is
that of benchmarks/criteria.py.
"""

import argparse
import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import (
    MaskLoRAConfig,
    ScaledLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    pack_sequences,
    perplexity,
    prune,
    sparsity,
)
from peft_sparse.model.blocks import norm_names

from common import (
    Rows,
    add_text_arguments,
    described,
    documents,
    parser,
    peak_resident,
    reset_peak,
    smollm2_dir,
)


@dataclass(frozen=True)
class Way:
    """What is trained, its learning rate, and other rates to compare.

    Multiplicative updates have other rates than additive ones, because Adam moves an entry by about its rate a step.
    """

    attach: Callable[[Any], Any]
    rate: float
    others: tuple[float, ...]


def adapter(kind: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(
        model, kind(r=16, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    )


def norms(model: Any) -> Any:
    model.requires_grad_(False)
    for name in norm_names(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def head(model: Any) -> Any:
    # SmolLM2 ties the head to the embedding. The head gets its own copy, so that training leaves the embedding alone.
    model.requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


ADDITIVE, MULTIPLICATIVE, WEIGHTS = (6e-3, (2e-3, 1.8e-2)), (1e-2, (3e-2,)), (1e-3, (3e-4, 3e-3))
WAYS = {
    "MaskLoRA": Way(adapter(MaskLoRAConfig, lora_alpha=32), *ADDITIVE),
    "full": Way(lambda model: model, *WEIGHTS),
    "LoRA, unmerged": Way(adapter(LoraConfig, lora_alpha=32), *ADDITIVE),
    "norms": Way(norms, *MULTIPLICATIVE),
    "ScaledLoRA": Way(adapter(ScaledLoRAConfig), *MULTIPLICATIVE),
    "LoRA-Prune": Way(adapter(MaskLoRAConfig, lora_alpha=32, masking="merge"), *ADDITIVE),
    "head": Way(head, *WEIGHTS),
}
PARTS = ("ways", "cycles", "distillation", "rates")


class Benchmark:
    """The rows that are measured so far, and the methods that measure the others."""

    def __init__(self, args: argparse.Namespace) -> None:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
        text, evaluation_text = documents(args)
        packed = pack_sequences(text, tokenizer, args.length)
        self.args = args
        self.train = packed[: args.sequences]
        self.evaluation = pack_sequences([evaluation_text], tokenizer, 1024, separator="")[: args.windows]
        settings = {
            **described(args, text, evaluation_text, self.train, self.evaluation),
            "batch_size": args.batch_size,
        }
        self.rows = Rows(args.output, settings)

    def row(self, part: str, name: str, work: Callable[[], dict[str, Any]], **options: Any) -> dict[str, Any]:
        """Return the row of an earlier run, or measure it by `work`."""
        wanted = {"part": part, "way": name, **options}
        done = self.rows.find(**wanted)
        if done is None:
            done = {**wanted, **work()}
            self.rows.add(done)
        return done

    def trained(
        self, name: str, level: float, rate: float, *, on_the_way: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Train one way and evaluate the merged model, or the trained model where its adapter does not merge."""
        model = WAYS[name].attach(dense() if on_the_way else pruned(level))
        if on_the_way:
            options |= {"sparsity": level, "pruning_schedule": "cycles"}
        model, costs = train(model, self.train, self.args, rate, **options)
        counts = [p.numel() for p in model.parameters() if p.requires_grad]
        model = merged(model)
        return {
            "perplexity": finite_perplexity(model, self.evaluation),
            "sparsity_reached": sparsity(model),
            "trainable_parameters": sum(counts),
            **costs,
        }

    def ways(self) -> None:
        """Measure every way at every sparsity, the most important first."""
        for level in self.args.sparsities:
            self.row("ways", "pruned", partial(self.untrained, level), sparsity=level)
            for name, way in WAYS.items():
                work = partial(self.trained, name, level, way.rate)
                self.row("ways", name, work, sparsity=level, learning_rate=way.rate)

    def rates(self) -> None:
        """Measure the ways at the first sparsity with other learning rates."""
        level = self.args.sparsities[0]
        for name, way in WAYS.items():
            for rate in way.others:
                self.row("ways", name, partial(self.trained, name, level, rate), sparsity=level, learning_rate=rate)

    def cycles(self) -> None:
        """Measure iterative magnitude pruning against pruning once, on equal tokens. Each cycle restarts the rate."""
        level = self.args.cycles_sparsity
        self.row("cycles", "pruned", partial(self.untrained, level), sparsity=level)
        for name in ("MaskLoRA", "full"):
            for count in (1, 3):
                options: dict[str, Any] = {
                    "pruning_rounds": count,
                    "lr_scheduler_type": "cosine_with_restarts",
                    "lr_scheduler_kwargs": {"num_cycles": count},
                }
                rate = WAYS[name].rate
                work = partial(self.trained, name, level, rate, on_the_way=True, **options)
                self.row("cycles", name, work, sparsity=level, cycles=count, learning_rate=rate)

    def distillation(self) -> None:
        """Measure distillation beside the task loss. The row without distillation is that of `ways`."""
        level, rate = self.args.sparsities[0], WAYS["MaskLoRA"].rate
        for weight in (0.5, 1.0):
            for kind in ("logits", "hidden_states"):
                options: dict[str, Any] = {"distillation": kind, "distillation_weight": weight}
                work = partial(self.trained, "MaskLoRA", level, rate, **options)
                self.row("distillation", "MaskLoRA", work, sparsity=level, learning_rate=rate, **options)

    def untrained(self, level: float) -> dict[str, Any]:
        model = pruned(level) if level else dense()
        return {
            "perplexity": finite_perplexity(model, self.evaluation),
            "parameters": sum(p.numel() for p in model.parameters()),
        }


def dense() -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_dir())


def pruned(level: float) -> Any:
    model = dense()
    prune(model, level)
    return model


def merged(model: Any) -> Any:
    """Return the merged model. A dense LoRA stays unmerged, because merging it would fill the zeros."""
    unmergeable = isinstance(model, PeftModel) and model.active_peft_config.peft_type == "LORA"
    return model.merge_and_unload() if isinstance(model, PeftModel) and not unmergeable else model


def finite_perplexity(model: nn.Module, sequences: Tensor) -> float | None:
    """Return the perplexity, or None if it is not finite, as after a learning rate that is too high."""
    try:
        return perplexity(model, sequences)
    except (ValueError, OverflowError):
        return None


def train(
    model: Any, tokens: Tensor, args: argparse.Namespace, rate: float, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Train for one pass over `tokens`. Return the model, and the time and memory of the training."""
    linear: dict[str, Any] = {"num_train_epochs": 1, "warmup_steps": 0.1, "lr_scheduler_type": "linear"}
    with tempfile.TemporaryDirectory() as folder:
        training = SparseTrainingArguments(
            folder, per_device_train_batch_size=args.batch_size, learning_rate=rate, weight_decay=0.0,
            use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no", seed=args.seed,
            logging_steps=1000, dataloader_pin_memory=False, disable_tqdm=True, **(linear | options),
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        teacher = dense() if training.distillation else None
        trainer = SparseTrainer(model, training, train_dataset=data, teacher=teacher)
        gc.collect()
        # Otherwise the memory that earlier rows freed still counts.
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak()
        started, cpu_started = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    count = trainer.state.global_step * args.batch_size * tokens.shape[1]
    return model, {
        "tokens": count,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "tokens_per_second": count / seconds,
        "tokens_per_cpu_second": count / cpu_seconds,
        "peak_bytes": peak_resident(),
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as the table of docs/numbers/recovery.md."""
    print("| sparsity | trained | share | perplexity | tokens per CPU second | peak GiB | rate |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    total = rows[0]["parameters"]
    for row in rows:
        beside = [f"{row[key]} {key}" for key in ("cycles",) if key in row]
        beside += [f"{row['distillation']}, weight {row['distillation_weight']}"] if "distillation" in row else []
        name = ", ".join([row["way"], *beside])
        cells = ["", "", "", ""]
        if "tokens" in row:
            share, memory = row["trainable_parameters"] / total, row["peak_bytes"] / 2**30
            cells = [
                f"{share:.2%}",
                f"{row['tokens_per_cpu_second']:.0f}",
                f"{memory:.2f}",
                f"{row['learning_rate']:g}",
            ]
        value = "not finite" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        print("|", " | ".join([f"{row.get('sparsity', 0):.0%}", name, cells[0], value, *cells[1:]]), "|")


def main() -> None:
    options = parser(__doc__)
    add_text_arguments(options)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--sequences", type=int, default=64, help="training sequences, each seen once")
    options.add_argument("--length", type=int, default=128, help="tokens of each")
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    options.add_argument("--cycles-sparsity", type=float, default=0.8)
    options.add_argument("--windows", type=int, default=4, help="evaluation windows of 1,024 tokens")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", required=True)
    options.add_argument("--table", action="store_true", help="print the rows of the output, and run nothing")
    args = options.parse_args()
    if args.table:
        table(json.loads(Path(args.output).read_text())["rows"])
        return
    benchmark = Benchmark(args)
    benchmark.row("dense", "dense", lambda: benchmark.untrained(0.0))
    for part in args.parts:
        getattr(benchmark, part)()


if __name__ == "__main__":
    main()
