r"""A low-rank residual in closed form, beside a pruned model: what it gives, what it costs, how large it is.

    python benchmarks/residual.py --output benchmarks/results/residual-smollm2-cpu.json
    python benchmarks/residual.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz ...
    python benchmarks/residual.py --pruned-by wanda --patterns 2:4 --ranks 16 --steps 50 --output (that file)

For each pattern, the model is pruned by each of `--pruned-by`, and then corrected by `residual_lora` of each rank. All
steps use the same calibration tokens. Time is that of the process, in CPU seconds. The text is that of
benchmarks/criteria.py. With `--steps`, a LoRA adapter is trained on the calibration documents instead, from PEFT's own
start and from the residual.
"""

import argparse
import copy
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import (
    SparseTrainer,
    SparseTrainingArguments,
    pack_sequences,
    perplexity,
    prune,
    sample_sequences,
)
from peft_sparse.reconstruction import residual_lora

from common import DEVICE, Rows, add_text_arguments, described, documents, parser, smollm2_dir


def main() -> None:
    args = arguments()
    model_dir = args.model or smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    calibration_text, evaluation_text = documents(args)
    calibration = sample_sequences(
        calibration_text, tokenizer, args.calibration_sequences, args.calibration_length, args.seed
    )
    evaluation = pack_sequences([evaluation_text], tokenizer, args.length, separator="")[: args.windows]
    rows = Rows(args.output, described(args, calibration_text, evaluation_text, calibration, evaluation))
    training = pack_sequences(calibration_text, tokenizer, args.calibration_length) if args.steps else None
    dense = AutoModelForCausalLM.from_pretrained(model_dir).to(DEVICE)
    if not rows:
        rows.add({"pattern": "dense", "perplexity": perplexity(dense, evaluation), "bytes": bytes_of(dense)})
    for pattern, pruned_by in itertools.product(args.patterns, args.pruned_by):
        wanted = {"pattern": pattern, "pruned_by": pruned_by}
        if all(rows.find(**wanted, r=rank, start="") for rank in args.ranks) and training is None:
            continue
        torch.manual_seed(args.seed)
        model = AutoModelForCausalLM.from_pretrained(model_dir).to(DEVICE)
        criterion, _, update = pruned_by.partition("+")
        started = time.process_time()
        report = prune(
            model, pattern, calibration, criterion=criterion, update=bool(update), batch_size=args.batch_size
        )
        seconds = time.process_time() - started
        for rank in args.ranks:
            row: dict[str, Any] = wanted | {"r": rank}
            if training is not None and rank:
                retrain(rows, row, args, model, dense, calibration, training, evaluation)
            elif rank and not rows.find(**row, start=""):
                rows.add(row | corrected(copy.deepcopy(model), dense, calibration, evaluation, rank, args.batch_size))
            elif not rows.find(**row, start=""):
                rows.add(row | {"perplexity": perplexity(model, evaluation), "error": report.error} | spent(seconds))


def corrected(
    model: nn.Module, dense: nn.Module, calibration: Tensor, evaluation: Tensor, rank: int, batch_size: int
) -> dict[str, Any]:
    """Correct a pruned model, and return what that gives and costs."""
    started = time.process_time()
    adapted, report = residual_lora(model, dense, calibration, r=rank, batch_size=batch_size)
    seconds = time.process_time() - started
    return {
        "perplexity": perplexity(adapted, evaluation),
        "error_pruned": report.error_pruned,
        "error": report.error,
        **spent(seconds),
        "parameters": report.parameters,
        "bytes": bytes_of_adapter(adapted),
    }


def retrain(
    rows: Rows,
    row: dict[str, Any],
    args: argparse.Namespace,
    model: nn.Module,
    dense: nn.Module,
    calibration: Tensor,
    training: Tensor,
    evaluation: Tensor,
) -> None:
    """Train a LoRA adapter from PEFT's own start and from the residual, at each learning rate."""
    data = [{"input_ids": tokens, "labels": tokens} for tokens in training]
    for rate, start in itertools.product(args.learning_rates, ("lora", "residual")):
        own = row | {"start": start, "steps": args.steps, "learning_rate": rate}
        if rows.find(**own):
            continue
        torch.manual_seed(args.seed)
        copied: Any = copy.deepcopy(model)
        if start == "lora":
            config = LoraConfig(r=row["r"], lora_alpha=row["r"], target_modules="all-linear")
            adapted = get_peft_model(copied, config)
        else:
            adapted, _ = residual_lora(copied, dense, calibration, r=row["r"], batch_size=args.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            settings = SparseTrainingArguments(
                folder,
                max_steps=args.steps,
                learning_rate=rate,
                per_device_train_batch_size=args.batch_size,
                save_strategy="no",
                report_to="none",
                seed=args.seed,
                use_cpu=DEVICE == "cpu",
            )
            SparseTrainer(adapted, settings, train_dataset=data).train()
        rows.add(own | {"perplexity": perplexity(adapted, evaluation)})


def spent(seconds: float) -> dict[str, Any]:
    return {"cpu_seconds": seconds, "threads": torch.get_num_threads()}


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of the parameters of a model. A shared parameter counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def bytes_of_adapter(model: PeftModel) -> int:
    """Return the bytes of the file that holds the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", help="a local folder; default: SmolLM2-135M-Instruct")
    add_text_arguments(options)
    options.add_argument("--calibration-sequences", type=int, default=64)
    options.add_argument("--calibration-length", type=int, default=128, help="tokens")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--length", type=int, default=1024, help="tokens of an evaluation window")
    options.add_argument("--windows", type=int, default=4, help="number of evaluation windows, taken from the start")
    options.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    options.add_argument(
        "--pruned-by",
        nargs="+",
        default=["wanda", "wanda+update", "sparsegpt", "sparsegpt+update"],
        help="a criterion, or a criterion and update",
    )
    options.add_argument("--ranks", type=int, nargs="+", default=[0, 16, 64], help="0 is the pruned model alone")
    options.add_argument("--steps", type=int, default=0, help="optimiser steps of retraining from both starts")
    options.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", required=True)
    return options.parse_args()


if __name__ == "__main__":
    main()
