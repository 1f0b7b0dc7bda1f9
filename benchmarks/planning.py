"""Memory that retraining and reconstruction of large models need, as the plans estimate it. Nothing is measured.

    python benchmarks/planning.py --output benchmarks/results/planning-estimates.json

The models have the public configurations that are written out below. Nothing is downloaded, and no weight is made. The
plans are for bfloat16, AdamW, one sequence of 2048 tokens per device, and activation checkpointing. The script prints
the table of docs/numbers/planning.md.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MixtralConfig

from peft_sparse import MaskLoRAConfig, environment, plan_reconstruction, plan_training

from common import parser, write_json


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
MODELS = {
    "Llama 3.1 8B": LlamaConfig(
        **LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
    "Llama 3.1 70B": LlamaConfig(
        **LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "Mixtral 8x7B": MixtralConfig(
        architectures=["MixtralForCausalLM"],
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    ),
}
LENGTH = 2048
# Whether adapters are trained, the number of devices, and the strategy.
RUNS: dict[str, tuple[bool, int, Any]] = {
    "full fine-tuning, 1 device": (False, 1, "ddp"),
    "full fine-tuning, 8 devices, FSDP": (False, 8, "fsdp"),
    "full fine-tuning, 8 devices, ZeRO-3": (False, 8, "zero3"),
    "MaskLoRA, 1 device": (True, 1, "ddp"),
    "MaskLoRA, 8 devices, FSDP": (True, 8, "fsdp"),
}


def plans_of(config: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for run, (adapters, devices, strategy) in RUNS.items():
        started = time.perf_counter()
        planned = plan_training(
            config,
            MaskLoRAConfig(r=16, target_modules="all-linear") if adapters else None,
            length=LENGTH,
            dtype=torch.bfloat16,
            activation_checkpointing=True,
            strategy=strategy,
            devices=devices,
        )
        found[run] = asdict(planned) | {"seconds_to_plan": round(time.perf_counter() - started, 1)}
        print(run, planned, sep="\n", flush=True)
    for activations in ("device", "cpu"):
        started = time.perf_counter()
        fitted = plan_reconstruction(
            config, 0.5, criterion="wanda", length=LENGTH, dtype=torch.bfloat16, activations=activations
        )
        sizes = {"peak_bytes": fitted.peak_bytes, "device_bytes": fitted.device_bytes}
        seconds = round(time.perf_counter() - started, 1)
        found[f"reconstruction, activations={activations!r}"] = asdict(fitted) | sizes | {"seconds_to_plan": seconds}
        print(activations, fitted, sep="\n", flush=True)
    return found


def table(estimates: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the estimates in GiB as a table with one row per run."""
    lines = ["| per device, GiB (estimates) | " + " | ".join(estimates) + " |", "| --- |" + " ---: |" * len(estimates)]
    for run in next(iter(estimates.values())):
        sizes = [plans[run].get("device_bytes", plans[run]["peak_bytes"]) / 2**30 for plans in estimates.values()]
        lines.append(f"| {run} | " + " | ".join(f"{size:,.0f}" for size in sizes) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--output", type=Path)
    args = options.parse_args()
    estimates = {name: plans_of(config) for name, config in MODELS.items()}
    print(table(estimates))
    if args.output is not None:
        result = environment() | {"estimates, not measurements": estimates}
        write_json(args.output, result)


if __name__ == "__main__":
    main()
