r"""Layer-wise reconstruction of one pretrained model: what it recovers and what it costs, against retraining.

    python benchmarks/reconstruction.py quality --output benchmarks/results/reconstruction-smollm2-cpu.json
    python benchmarks/reconstruction.py plot --result (that file) --output docs/numbers/reconstruction.png
    python benchmarks/reconstruction.py loop --output benchmarks/results/reconstruction-loop-cpu.json
    python benchmarks/reconstruction.py memory --output benchmarks/results/reconstruction-memory-cpu.json

- quality: perplexity of SmolLM2-135M-Instruct after pruning, after reconstruction by every region and mode, and after
  retraining with MaskLoRA on the same tokens and on ten times as many.
- loop: `reconstruct` against a transcription of the published loop (PERP, arXiv:2312.15230, section 3.3: whole blocks,
  one sequence at a time, masks as reparametrisation) on the first blocks, with equal steps. The two take turns.
- memory: peak resident memory of reconstruction, of one LoRA step of the whole model, and of reconstructing a larger
  model from disk. Each runs in its own process.

The text is that of benchmarks/criteria.py.
"""

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_linear_schedule_with_warmup,
)

from peft_sparse import (
    MaskLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    environment,
    pack_sequences,
    perplexity,
    prune,
    prune_checkpoint,
    reconstruct,
    reconstruct_checkpoint,
    sample_sequences,
)
from peft_sparse.reconstruction import Fit
from peft_sparse.reconstruction.regions import RegionSize

from common import (
    Rows,
    add_text_arguments,
    described,
    documents,
    parser,
    peak_resident,
    reset_peak,
    smollm2_dir,
    write_json,
)


RATE = 1e-3
RETRAINING_RATE = 2e-3


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Return the perplexity of every way to recover, as rows."""
    model_dir = smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    calibration_text, evaluation_text = documents(args)
    calibration = sample_sequences(calibration_text, tokenizer, args.sequences, args.length, args.seed)
    more = pack_sequences(calibration_text, tokenizer, args.length)[: 10 * args.sequences]
    evaluation = pack_sequences([evaluation_text], tokenizer, 1024, separator="")[: args.windows]
    dense = AutoModelForCausalLM.from_pretrained(model_dir)

    settings = {
        **described(args, calibration_text, evaluation_text, calibration, evaluation),
        "learning_rate": {"reconstruction": RATE, "retraining": RETRAINING_RATE},
        "batch_size": {"reconstruction": 1, "retraining": args.batch_size},
    }
    rows = Rows(args.output, settings)

    def row(criterion: str, pattern: str, recovery: str, work: Any = None, **options: Any) -> None:
        wanted = {"criterion": criterion, "pattern": pattern, "recovery": recovery, **options}
        if rows.find(**wanted):
            return
        model = copy.deepcopy(dense)
        torch.manual_seed(args.seed)
        gc.collect()
        reset_peak()
        started = time.perf_counter()
        report = work(model) if work else None
        seconds, peak = time.perf_counter() - started, peak_resident()
        model = report if isinstance(report, nn.Module) else model
        measured = {"perplexity": perplexity(model, evaluation), "seconds": seconds, "peak_bytes": peak}
        rows.add({**wanted, **measured})

    def pruned(criterion: str, pattern: str) -> Any:
        needed = None if criterion == "magnitude" else calibration
        return lambda m: prune(m, pattern, criterion=criterion, calibration=needed, batch_size=args.batch_size)

    def rebuilt(criterion: str, pattern: str, tuner: Any = "full", **options: Any) -> Any:
        fit = Fit(tuner=tuner, learning_rate=RATE, seed=args.seed)
        return lambda m: reconstruct(m, pattern, calibration, criterion=criterion, fit=fit, **options)

    def retrain(criterion: str, pattern: str, tokens: Tensor) -> Any:
        return lambda m: retrained(m, pruned(criterion, pattern), tokens, args)

    def recover(cell: tuple[str, str], ways: list[tuple[RegionSize, str]], times: tuple[int, ...]) -> None:
        for region, mode in ways:
            work = rebuilt(*cell, region=region, mode=mode)
            row(*cell, "reconstructed", work, region=region, mode=mode)
        for factor in times:
            tokens = calibration if factor == 1 else more
            row(*cell, "MaskLoRA, retrained", retrain(*cell, tokens), tokens=tokens.numel(), times=factor)

    cells = [(criterion, pattern) for pattern in ("0.5", "2:4", "0.6") for criterion in ("wanda", "magnitude")]
    others: list[tuple[RegionSize, str]] = [
        ("matrix", "SS"), ("block", "SS"), ("submodule", "DD"), (5, "SS"), ("submodule", "SD")
    ]  # fmt: skip
    row("none", "0", "dense")
    # The most important rows come first, so that a run that is stopped leaves a useful table.
    for cell in cells:
        row(*cell, "pruned", pruned(*cell))
        recover(cell, [("submodule", "SS")], (1,))
        if cell == cells[0]:
            recover(cell, others, ())
    tuner = MaskLoRAConfig(r=16, lora_alpha=32, target_modules="all-linear", train_norms=True)
    work = rebuilt(*cells[0], tuner=tuner)
    row(*cells[0], "reconstructed", work, region="submodule", mode="SS", tuner="MaskLoRA")
    recover(cells[0], [], (10,))
    for cell in cells[1:]:
        recover(cell, others, (10,))
    return rows.result()


def retrained(model: nn.Module, prune_it: Any, tokens: Tensor, args: argparse.Namespace) -> nn.Module:
    """Prune, retrain with MaskLoRA for one pass over `tokens`, and return the merged model."""
    prune_it(model)
    config = MaskLoRAConfig(r=16, lora_alpha=32, target_modules="all-linear", train_norms=True, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        training = SparseTrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=args.batch_size, learning_rate=RETRAINING_RATE,
            warmup_steps=0.1, use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no",
            seed=args.seed, logging_steps=1000, dataloader_pin_memory=False,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        SparseTrainer(peft_model, training, train_dataset=data).train()
    return peft_model.merge_and_unload()


def loop(args: argparse.Namespace) -> dict[str, Any]:
    """Return time and final error of `reconstruct` and of the published loop, on equal blocks, data and steps."""
    dense = AutoModelForCausalLM.from_pretrained(smollm2_dir())
    dense.model.layers = dense.model.layers[: args.blocks]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    tokens = sample_sequences(documents(args)[0], tokenizer, args.sequences, args.length, args.seed)
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        ours, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
        started = time.perf_counter()
        fit = Fit(learning_rate=RATE, holdout=0, max_steps=args.sequences)
        report = reconstruct(ours, 0.5, tokens, criterion="wanda", region="block", mode="SS", fit=fit)
        middle = time.perf_counter()
        errors = published_loop(theirs, tokens, RATE)
        ended = time.perf_counter()
        rounds.append(
            {
                "ours_seconds": middle - started,
                "published_seconds": ended - middle,
                "ours_errors": [region.error for region in report.regions],
                "published_errors": errors,
            }
        )
        print(rounds[-1], flush=True)
    return {
        "rounds": rounds,
        "time_ratio": median(r["ours_seconds"] / r["published_seconds"] for r in rounds),
        "blocks": args.blocks,
        "sequences": args.sequences,
        "tokens_per_sequence": args.length,
        "steps": args.sequences,
        "environment": environment(),
    }


def published_loop(model: Any, tokens: Tensor, rate: float) -> list[float]:
    """Reconstruct block by block as the paper's loop does. Return the final ||f(x) - t|| / ||t|| of each block."""
    layers, n = model.model.layers, len(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        hidden = [model.model.embed_tokens(row[None]) for row in tokens]
        rotary = model.model.rotary_emb(hidden[0], positions)
    call = {"position_embeddings": rotary, "attention_mask": None}
    errors = []
    for layer in layers:
        targets = _published_pruning(layer, hidden, call)
        layer.requires_grad_(True)
        _mean_error(layer, hidden, targets, call)
        optimizer = torch.optim.AdamW(layer.parameters(), rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, int(0.1 * n), n)
        for x, target in zip(hidden, targets, strict=True):
            nn.functional.mse_loss(layer(x, **call), target).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        errors.append(_mean_error(layer, hidden, targets, call))
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                torch_prune.remove(module, "weight")
        with torch.no_grad():
            hidden = [layer(x, **call) for x in hidden]
    return errors


def _published_pruning(layer: nn.Module, hidden: list[Tensor], call: dict[str, Any]) -> list[Tensor]:
    """Prune half of the weights by Wanda, with masks as reparametrisation. Return the outputs of the dense layer."""
    linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    squares: dict[str, Any] = dict.fromkeys(linears, 0.0)
    hooks = [
        m.register_forward_hook(lambda _, x, __, name=name: _add_squares(squares, name, x[0], len(hidden)))
        for name, m in linears.items()
    ]
    with torch.no_grad():
        targets = [layer(x, **call) for x in hidden]
    for hook in hooks:
        hook.remove()
    for name, m in linears.items():
        score = m.weight.detach().abs() * squares[name].sqrt()
        order = torch.sort(score, dim=-1, stable=True)[1][:, : m.in_features // 2]
        torch_prune.custom_from_mask(m, "weight", torch.ones_like(score).scatter_(1, order, 0))
    return targets


def _add_squares(squares: dict[str, Any], name: str, inputs: Tensor, n: int) -> None:
    squares[name] = squares[name] + inputs.flatten(0, -2).norm(dim=0) ** 2 / n


@torch.no_grad()
def _mean_error(layer: nn.Module, hidden: list[Tensor], targets: list[Tensor], call: dict[str, Any]) -> float:
    pairs = [(layer(x, **call) - target, target) for x, target in zip(hidden, targets, strict=True)]
    return float(sum(e.square().sum() for e, _ in pairs) / sum(t.square().sum() for _, t in pairs)) ** 0.5


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Return the peak of resident memory of each job, and of the imports alone. Each runs in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=args.large_blocks, num_attention_heads=16,
            num_key_value_heads=4, vocab_size=4096,
        )  # fmt: skip
        large = LlamaForCausalLM(config)
        size = sum(parameter.nbytes for parameter in large.parameters())
        large.save_pretrained(Path(folder) / "large")
        del large
        peaks = {}
        for job in ("imports", "loaded", "reconstruct", "lora", "pruned from disk", "reconstructed from disk"):
            command = [sys.executable, __file__, "job", "--job", job, "--folder", folder, "--output", "-"]
            command += ["--sequences", str(args.sequences), "--length", str(args.length)]
            command += ["--batch-size", str(args.batch_size)]
            # Otherwise glibc keeps freed memory for later, and the peak contains it.
            environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}
            run = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
            peaks[job] = int(run.stdout.split()[-1])
            print(job, peaks[job] // 2**20, "MiB", flush=True)
    return {
        "peak_bytes": peaks,
        "bytes_of_the_model_on_disk": size,
        "sequences": args.sequences,
        "tokens_per_sequence": args.length,
        "batch_size": args.batch_size,
        "environment": environment(),
    }


def job(args: argparse.Namespace) -> None:
    """Run one job of `memory` in this process, and print its peak."""
    tokens = torch.randint(0, 4096, (args.sequences, args.length), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"criterion": "wanda", "batch_size": args.batch_size, "fit": Fit(max_steps=4)}
    if args.job in ("loaded", "reconstruct", "lora"):
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir())
    if args.job == "reconstruct":
        reconstruct(model, 0.5, tokens, **options)
    if args.job == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        rows = tokens[: args.batch_size]
        model(input_ids=rows, labels=rows).loss.backward()
    if args.job == "pruned from disk":
        source, output = Path(args.folder) / "large", Path(args.folder) / "pruned"
        prune_checkpoint(source, output, 0.5, criterion="sparsegpt", calibration=tokens, activations="disk")
    if args.job == "reconstructed from disk":
        source, output = Path(args.folder) / "large", Path(args.folder) / "sparse"
        reconstruct_checkpoint(source, output, 0.5, tokens, activations="disk", **options)
    print(peak_resident())


def plot(args: argparse.Namespace) -> None:
    """Draw perplexity against time and against memory, from the result of `quality`."""
    from matplotlib.figure import Figure

    result = json.loads(Path(args.result).read_text())
    rows = [row for row in result["rows"] if (row["criterion"], row["pattern"]) == ("wanda", "0.5")]
    dense = next(row["perplexity"] for row in result["rows"] if row["recovery"] == "dense")
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (label, key, unit) in zip(
        axes,
        (("seconds, pruning included", "seconds", 1), ("peak resident memory, GiB", "peak_bytes", 2**30)),
        strict=True,
    ):
        for row in rows:
            words = [str(row[k]) for k in ("recovery", "tuner", "region", "mode") if k in row]
            name = " ".join([*words, f"on x{row['times']} tokens"] if "times" in row else words)
            axis.plot(row[key] / unit, row["perplexity"], "o", label=name)
        axis.axhline(dense, linestyle=":", color="grey")
        axis.set(xlabel=label)
    axes[0].set(ylabel="perplexity, WikiText-2", title="SmolLM2-135M-Instruct, Wanda, half of the weights")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(args.output, dpi=110)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("part", choices=("quality", "loop", "memory", "plot", "job"))
    add_text_arguments(options)
    options.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    options.add_argument("--length", type=int, default=128, help="tokens of each")
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--windows", type=int, default=8, help="evaluation windows of 1,024 tokens")
    options.add_argument("--blocks", type=int, default=4, help="loop: how many blocks")
    options.add_argument("--rounds", type=int, default=3, help="loop: how often")
    options.add_argument("--large-blocks", type=int, default=24, help="memory: blocks of the model on disk")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", required=True)
    options.add_argument("--result", help="plot: the JSON of quality")
    options.add_argument("--job", help=argparse.SUPPRESS)
    options.add_argument("--folder", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.part in ("job", "plot"):
        {"job": job, "plot": plot}[args.part](args)
        return
    result = {"quality": quality, "loop": loop, "memory": memory}[args.part](args)
    write_json(args.output, result)


if __name__ == "__main__":
    main()
