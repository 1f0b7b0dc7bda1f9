"""Time and memory of one training step per tuner, as ratios to PEFT's LoRA in the same run.

    python benchmarks/tuners.py --output benchmarks/results/tuners-smollm2-cpu.json

A step is forward and backward of SmolLM2-135M-Instruct, pruned to 50 % by magnitude, on one sequence; every linear
layer of the blocks is adapted. Rounds visit the tuners in turn, and a ratio is taken within its round, so a machine
that slows down slows all of them. Memory is what autograd keeps from forward to backward, parameters not counted.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import peft_sparse.tuners.layer
from peft_sparse import MaskLoRAConfig, prune
from peft_sparse.report import environment


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from demo import smollm2_dir  # noqa: E402


def plain_formula(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """MaskLoRA as autograd would do it by itself: the published formula."""
    return F.linear(x, weight + scaling * (B @ A).masked_fill(weight == 0, 0), bias)


@contextlib.contextmanager
def by_plain_formula() -> Iterator[None]:
    layer: Any = peft_sparse.tuners.layer
    fused, layer.mask_lora_linear = layer.mask_lora_linear, plain_formula
    try:
        yield
    finally:
        layer.mask_lora_linear = fused


def tuners(rank: int) -> dict[str, tuple[PeftConfig, Callable[[], contextlib.AbstractContextManager[None]]]]:
    lora: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    return {
        "LoRA (PEFT)": (LoraConfig(**lora), contextlib.nullcontext),
        "MaskLoRA": (MaskLoRAConfig(**lora), contextlib.nullcontext),
        "MaskLoRA, plain formula": (MaskLoRAConfig(**lora), by_plain_formula),
        "HiRA (PEFT)": (HiraConfig(r=rank, target_modules="all-linear"), contextlib.nullcontext),
    }


def step_seconds(model: nn.Module, tokens: Tensor) -> float:
    synchronize()
    started = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    synchronize()
    return time.perf_counter() - started


def bytes_kept(model: nn.Module, tokens: Tensor) -> int:
    """Bytes of the storages that autograd holds from forward to backward, each counted once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
    del loss
    return total


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(base: nn.Module, tokens: Tensor, rank: int, rounds: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in tuners(rank)}
    kept: dict[str, int] = {}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, (config, context) in tuners(rank).items():
            model = get_peft_model(base, config).train()
            with context():
                step_seconds(model, tokens)  # the first step of a model warms up
                seconds[name].append(min(step_seconds(model, tokens) for _ in range(2)))
                kept[name] = kept.get(name) or bytes_kept(model, tokens)
            model.unload()
    reference = next(iter(seconds))
    return [
        {
            "tuner": name,
            "seconds": statistics.median(times),
            "time_ratio": statistics.median(a / b for a, b in zip(times, seconds[reference], strict=True)),
            "bytes_kept": kept[name],
            "memory_ratio": kept[name] / kept[reference],
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=dtype).to(device)
    prune(base, 0.5)
    tokens = torch.randint(0, base.config.vocab_size, (1, arguments.tokens), device=device)
    rows = measure(base, tokens, arguments.rank, arguments.rounds)
    print("\n| tuner | step | time / LoRA | kept for backward | memory / LoRA |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['tuner']} | {row['seconds']:.2f} s | {row['time_ratio']:.2f} | "
            f"{row['bytes_kept'] / 2**20:.0f} MiB | {row['memory_ratio']:.2f} |"
        )
    if arguments.output:
        settings = {
            "tokens": arguments.tokens,
            "rank": arguments.rank,
            "rounds": arguments.rounds,
            "dtype": str(dtype),
        }
        result = {"settings": settings, "seed": 0, "rows": rows, "environment": environment()}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
