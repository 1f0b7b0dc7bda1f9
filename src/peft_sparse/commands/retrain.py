"""`peft-sparse retrain`: prunes a model if asked, retrains it without filling a zero, merges and saves it."""

import argparse
import math
from pathlib import Path
from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from ..evaluation.perplexity import perplexity
from ..recipes import AdapterArguments, TextArguments
from ..training.arguments import SparseTrainingArguments
from . import groups
from .arguments import add_fields
from .outcome import begin_work
from .sources import EVALUATION, MODEL, TEXT, SourceArguments
from .training_run import Run, start


SUMMARY: str = "Retrain a pruned model by an adapter whose merge keeps every zero."
EXAMPLE: str = "peft-sparse retrain --model pruned/sparse --text_file text.txt --max_steps 500"

DEFAULTS: dict[str, Any] = {
    "output_dir": "retrained",
    "max_steps": 80,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 2e-3,
    "warmup_steps": 0.1,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "sequence_length": 512,
    "calibration_length": 512,
}


# The best rate of docs/numbers/tuners.md. Its updates are fractions of the weights, so it needs a higher one.
SCALED_LORA_RATE = 2e-2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add to `parser` which model is retrained, on which text, by which adapter, and whether it is pruned first."""
    training = SparseTrainingArguments
    add_fields(parser, SourceArguments, {"the model (default: SmolLM2-135M-Instruct, from PyPI)": MODEL})
    add_fields(parser, SourceArguments, {"the text (default: the documentation of Python)": TEXT})
    add_fields(parser, TextArguments, {"how much of it": ("sequence_length",)}, DEFAULTS)
    add_fields(parser, AdapterArguments, {"the adapter": ("adapter", "r", "lora_alpha", "train_norms", "bias")})
    shown = DEFAULTS | {"learning_rate": f"{DEFAULTS['learning_rate']}, or {SCALED_LORA_RATE} for scaled_lora"}
    add_fields(parser, training, {"retraining": (*groups.TRAINING, *groups.RETRAINING)}, shown)
    title = "pruning before it (default: only the embedded model is pruned, to 0.5)"
    add_fields(parser, training, {title: (*groups.SPARSITY, *groups.PRUNING)})
    add_fields(parser, TextArguments, {"the text of calibration": ("calibration_length",)}, DEFAULTS)
    add_fields(parser, SourceArguments, {"evaluation": EVALUATION})
    run_group = (*groups.RUN, "resume_from_checkpoint")
    add_fields(parser, training, {"the run": run_group}, DEFAULTS, all_others=True)


def run(args: argparse.Namespace) -> list[str]:
    """Retrain the model of `args`, merge it, save everything, and return what was written."""
    scales = getattr(args, "adapter", None) == "scaled_lora"
    work = start(args, "retrain", DEFAULTS | ({"learning_rate": SCALED_LORA_RATE} if scales else {}))
    trainer, options = work.trainer, work.recipe.args
    options.eval_on_start = True  # the trainer prunes first, so this evaluation measures the pruned model
    # With ZeRO-3 the model is sharded when it is loaded, and such a model can run only during training.
    if not is_deepspeed_zero3_enabled() and options.pruning_pattern() is not None:
        work.measure("dense", trainer.model)
    result = trainer.train(resume_from_checkpoint=work.resume_from())
    begin_work()
    _add_stages(work, result)
    written = _save(work, Path(str(options.output_dir)))
    if work.recipe.adapter.adapter == "none":
        return [*written, *work.finish("sparse")]
    return [*written, *work.finish("sparse", adapter="adapter", base="pruned")]


def _add_stages(work: Run, result: Any) -> None:
    trainer, args = work.trainer, work.recipe.args
    value = perplexity(trainer.model, work.evaluation)
    first = next((entry for entry in trainer.state.log_history if "eval_loss" in entry), None)
    tokens = args.calibration_samples * work.texts["calibration"].shape[1] if trainer.pruning_report else 0
    seconds = trainer.pruning_report.seconds if trainer.pruning_report else 0.0
    if first is not None:
        work.add("pruned", math.exp(first["eval_loss"]), first["eval_sparsity"], tokens, seconds)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = trainer.state.global_step * batch * work.texts["train"].shape[1]
    zeros = next(entry["sparsity"] for entry in reversed(trainer.state.log_history) if "sparsity" in entry)
    work.add("retrained", value, zeros, tokens, result.metrics["train_runtime"])


def _save(work: Run, output: Path) -> list[str]:
    """Save the adapter, its base model and the merged model. Shards are gathered from all processes."""
    trainer: Any = work.trainer
    written = []
    if work.recipe.adapter.adapter != "none":
        trainer.model.active_peft_config.base_model_name_or_path = str(output / "pruned")
        trainer.save_base_model(str(output / "pruned"))
        trainer.save_model(str(output / "adapter"))
        written = [
            f"{output / 'pruned'} (the base model of the adapter)",
            f"{output / 'adapter'} (load it by PeftModel.from_pretrained, after `import peft_sparse`)",
        ]
    trainer.save_merged_model(str(output / "sparse"))
    return [*written, f"{output / 'sparse'} (load it by AutoModelForCausalLM.from_pretrained)"]
