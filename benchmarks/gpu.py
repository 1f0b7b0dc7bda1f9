"""What this package computes, takes and keeps on a GPU: correctness against the CPU, steps of tuners, and pruning.

    python benchmarks/gpu.py --minutes 8 --output gpu.json
    python benchmarks/gpu.py --toy

The first command runs on the CUDA device that it finds, without network and without data: the models have random
weights in the shapes of Llama 3.1 8B, with a small vocabulary. The tasks run in the order of their importance. After
`--minutes` no further task begins, and those that were left out are named. The results are written as JSON, and as a
Markdown table beside it, after every task. `--toy` runs every task at a tiny size, on a CPU if there is no GPU.

A step is forward and backward of one sequence, with base weights in bfloat16 and adapters in float32. The tuners take
turns, and the median over the rounds counts. With autocast the forward pass runs under autocast to bfloat16, as with
`bf16=True`. The peak is what a step allocates above the model, its adapter and its gradients.
"""

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_checks import eight_bit_gradients, formulas, pruned_alike
from peft_sparse import Fit, MaskLoRAConfig, ScaledLoRAConfig, environment, prune, reconstruct
from traffic import bytes_per_weight
from tuners import computed_by, products_alone

from common import DEVICE, parser, seconds_of, write_json


Row = dict[str, Any]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(frozen=True)
class Sizes:
    """Sizes of the models and of the data."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    key_value_heads: int = 8
    vocabulary: int = 4096
    rank: int = 16
    tokens: tuple[int, ...] = (4096, 1024, 16384)
    blocks: int = 4
    sequences: int = 8
    length: int = 1024
    rounds: int = 9


TOY = Sizes(64, 128, 4, 2, 32, 4, (32, 16), 2, 4, 16, 1)


def model_of(sizes: Sizes, blocks: int, dtype: torch.dtype = DTYPE) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_hidden_layers=blocks,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.key_value_heads, vocab_size=sizes.vocabulary,
        max_position_embeddings=max(*sizes.tokens, sizes.length),
        bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype=dtype,
    )  # fmt: skip
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(dtype)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    before = os.environ.get("PEFT_SPARSE_FUSED")
    os.environ["PEFT_SPARSE_FUSED"] = "0"
    try:
        yield
    finally:
        del os.environ["PEFT_SPARSE_FUSED"]
        if before is not None:
            os.environ["PEFT_SPARSE_FUSED"] = before


def peak_of(step: Callable[[], Any]) -> int | None:
    """Return the bytes that a step allocates on the GPU above what was allocated before it, or None without one."""
    if DEVICE != "cuda":
        step()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# -- pruning ----------------------------------------------------------------------------------------------------------


PRUNING: dict[str, Callable[[Any, Tensor], Any]] = {
    "wanda": lambda model, ids: prune(model, 0.5, ids, criterion="wanda"),
    "sparsegpt": lambda model, ids: prune(model, 0.5, ids, criterion="sparsegpt"),
    "swaps": lambda model, ids: prune(model, 0.5, ids, criterion="wanda", refinement="swap"),
    "update": lambda model, ids: prune(model, 0.5, ids, criterion="wanda", update=True),
    "reconstruct": lambda model, ids: reconstruct(model, 0.5, ids, criterion="wanda", fit=Fit(holdout=0)),
}


def pruning(name: str, sizes: Sizes) -> Iterator[Row]:
    """Measure one way to prune the one block of a model on the device."""
    model = model_of(sizes, 1)
    ids = torch.randint(0, sizes.vocabulary, (sizes.sequences, sizes.length), device=DEVICE)
    seconds = 0.0

    def once() -> None:
        nonlocal seconds
        seconds = seconds_of(lambda: PRUNING[name](model, ids))[0]

    peak = peak_of(once)
    yield {"pruning": name, "sequences": len(ids), "tokens": ids.shape[1], "seconds": seconds, "peak": peak}


# -- tuners -----------------------------------------------------------------------------------------------------------


Context = Callable[[], contextlib.AbstractContextManager[None]]


def tuners(rank: int, targets: str | list[str]) -> dict[str, tuple[PeftConfig, Context]]:
    common: dict[str, Any] = {"target_modules": targets, "r": rank}
    plain = contextlib.nullcontext
    return {
        "LoRA (PEFT)": (LoraConfig(**common), plain),
        "MaskLoRA": (MaskLoRAConfig(**common), plain),
        "MaskLoRA, PEFT_SPARSE_FUSED=0": (MaskLoRAConfig(**common), unfused),
        "MaskLoRA, int8": (MaskLoRAConfig(**common, gradient_dtype="int8"), plain),
        "MaskLoRA, fp8": (MaskLoRAConfig(**common, gradient_dtype="fp8"), plain),
        "large products alone": (MaskLoRAConfig(**common), partial(computed_by, products_alone)),
        "ScaledLoRA": (ScaledLoRAConfig(**common), plain),
        "ScaledLoRA, PEFT_SPARSE_FUSED=0": (ScaledLoRAConfig(**common), unfused),
        "ScaledLoRA, rank 1": (ScaledLoRAConfig(**common | {"r": 1}), plain),
        "LoRA-Prune": (MaskLoRAConfig(**common, masking="merge"), plain),
        "HiRA (PEFT)": (HiraConfig(**common), plain),
    }


def steps(sizes: Sizes, blocks: int, tokens: int, targets: str | list[str], autocast: bool) -> Iterator[Row]:
    """Measure a step of each tuner: seconds, and peak memory."""
    base = model_of(sizes, blocks)
    prune(base, 0.5)
    ids = torch.randint(0, sizes.vocabulary, (1, tokens), device=DEVICE)
    found: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    ways = {name: (attached(base, config), context) for name, (config, context) in tuners(sizes.rank, targets).items()}

    def step(model: nn.Module) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    for turn in range(sizes.rounds + 1):
        for name, (model, context) in ways.items():
            with context():
                if not turn:
                    step(model)
                    peaks[name] = peak_of(partial(step, model))
                else:
                    found.setdefault(name, []).append(seconds_of(partial(step, model))[0])
    reference = found["LoRA (PEFT)"]
    for name, seconds in found.items():
        yield {
            "tuner": name, "blocks": blocks, "tokens": tokens, "autocast": autocast,
            "targets": targets if isinstance(targets, str) else ", ".join(targets),
            "seconds": statistics.median(seconds), "seconds_range": [min(seconds), max(seconds)],
            "time_ratio": statistics.median(own / other for own, other in zip(seconds, reference, strict=True)),
            "peak": peaks[name],
            "peak_ratio": None if DEVICE != "cuda" else (peaks[name] or 0) / (peaks["LoRA (PEFT)"] or 1),
        }  # fmt: skip


def attached(base: nn.Module, config: PeftConfig) -> nn.Module:
    """Return a model with an adapter that shares every other weight with `base`."""
    shared = {id(parameter): parameter for parameter in base.parameters()}
    return get_peft_model(copy.deepcopy(base, shared), config).train()


# -- all tasks --------------------------------------------------------------------------------------------------------


def tasks(sizes: Sizes) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    """Name the tasks in the order of their importance."""
    yield "correctness of the formulas", partial(formulas, sizes.hidden, sizes.rank)
    yield "correctness of eight bits", partial(eight_bit_gradients, sizes.hidden, sizes.rank, DTYPE)
    first, *others = sizes.tokens
    toy_ids = torch.randint(0, TOY.vocabulary, (TOY.sequences, TOY.length))
    yield f"steps, 1 block, all-linear, {first} tokens", partial(steps, sizes, 1, first, "all-linear", False)
    yield f"steps, autocast, {first} tokens", partial(steps, sizes, 1, first, "all-linear", True)
    for tokens in others:
        yield f"steps, 1 block, all-linear, {tokens} tokens", partial(steps, sizes, 1, tokens, "all-linear", False)
    yield "bytes per weight", partial(bytes_per_weight, sizes.hidden, sizes.rank, DEVICE, DTYPE)
    yield "correctness of pruning", partial(pruned_alike, model_of(TOY, 2, torch.float32), toy_ids, PRUNING)
    for name in PRUNING:
        yield f"pruning, {name}", partial(pruning, name, sizes)
    for tokens in sizes.tokens:
        yield f"steps, q and v, {tokens} tokens", partial(steps, sizes, 1, tokens, ["q_proj", "v_proj"], False)
    for tokens in others:
        yield f"steps, autocast, {tokens} tokens", partial(steps, sizes, 1, tokens, "all-linear", True)
    yield f"steps, {sizes.blocks} blocks", partial(steps, sizes, sizes.blocks, first, "all-linear", False)


def table(result: Row) -> str:
    """Return the result as Markdown."""
    lines = [
        f"# {result['environment']['hardware']}",
        "",
        "| check | error | allowed | |",
        "| --- | ---: | ---: | --- |",
    ]
    rows = result["rows"]
    for row in (row for row in rows if "check" in row):
        word = "passed" if row["passed"] else "FAILED"
        lines.append(f"| {row['check']} | {row['error']:.1e} | {row['allowed']:.1e} | {word} |")
    lines += ["", "| blocks, targets, tokens | tuner | step | time / LoRA | peak | peak / LoRA |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in (row for row in rows if "tuner" in row):
        where = f"{row['blocks']}, {row['targets']}, {row['tokens']}{', autocast' if row['autocast'] else ''}"
        lines.append(
            f"| {where} | {row['tuner']} | {row['seconds'] * 1e3:.2f} ms | {row['time_ratio']:.2f} | "
            f"{in_mebibytes(row['peak'])} | {'' if row['peak_ratio'] is None else format(row['peak_ratio'], '.2f')} |"
        )
    lines += ["", "| pruning of one block | seconds | peak |", "| --- | ---: | ---: |"]
    for row in (row for row in rows if "pruning" in row):
        lines.append(f"| {row['pruning']} | {row['seconds']:.2f} | {in_mebibytes(row['peak'])} |")
    lines += ["", "| what is computed | how | bytes per weight |", "| --- | --- | ---: |"]
    for row in (row for row in rows if "bytes_per_weight" in row):
        lines.append(f"| {row['part']} | {row['variant']} | {row['bytes_per_weight']:.1f} |")
    if result["left_out"]:
        lines += ["", "Left out: " + "; ".join(result["left_out"]) + "."]
    return "\n".join(lines) + "\n"


def in_mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f} MiB"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=8, help="no task begins after so many minutes")
    options.add_argument("--toy", action="store_true", help="run every task at a tiny size")
    options.add_argument("--output", type=Path, help="JSON file; the table is written beside it")
    arguments = options.parse_args()
    torch.manual_seed(0)
    sizes = TOY if arguments.toy else Sizes()
    started = time.perf_counter()
    result: Row = {"dtype": str(DTYPE), "rank": sizes.rank, "seed": 0, "rows": [], "seconds": {}, "left_out": []}
    result["environment"] = environment()
    for name, task in tasks(sizes):
        begun = time.perf_counter()
        if begun - started > 60 * arguments.minutes:
            result["left_out"].append(name)
        else:
            try:
                result["rows"] += list(task())
            except torch.OutOfMemoryError:
                result["left_out"].append(f"{name} (it needs more memory than the device has)")
            result["seconds"][name] = round(time.perf_counter() - begun, 1)
            print(name, result["seconds"][name], "s", flush=True)
            torch.cuda.empty_cache()
        if arguments.output:
            write_json(arguments.output, result)
            arguments.output.with_suffix(".md").write_text(table(result))
    print(table(result))
    if failed := [row["check"] for row in result["rows"] if not row.get("passed", True)]:
        raise SystemExit(f"Checks failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
