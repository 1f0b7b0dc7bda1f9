"""`peft-sparse reconstruct`: prunes a model region by region and fits each region to its dense outputs."""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from ..recipes import TextArguments
from ..training.arguments import SparseTrainingArguments
from . import groups
from .arguments import add_fields
from .outcome import begin_work
from .sources import EVALUATION, MODEL, TEXT, SourceArguments
from .training_run import start


SUMMARY: str = "Prune a model region by region, and fit each region to its dense outputs."
EXAMPLE: str = "peft-sparse reconstruct --model Qwen/Qwen2.5-0.5B --text_file text.txt --sparsity 0.5"

DEFAULTS: dict[str, Any] = {
    "output_dir": "reconstructed",
    "criterion": "wanda",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "report_to": "none",
    "calibration_length": 128,
    "reconstruction_learning_rate": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `peft-sparse reconstruct`."""
    training = SparseTrainingArguments
    add_fields(parser, SourceArguments, {"the model (default: SmolLM2-135M-Instruct, from PyPI)": MODEL})
    add_fields(parser, training, {"to what sparsity (the default model: 0.5)": groups.SPARSITY})
    add_fields(parser, SourceArguments, {"the text (default: the documentation of Python)": TEXT})
    add_fields(parser, TextArguments, {"how much of it": ("calibration_length",)}, DEFAULTS)
    add_fields(parser, training, {"pruning": groups.PRUNING, "regions": groups.RECONSTRUCTION}, DEFAULTS)
    add_fields(parser, training, {"how a region is fitted": groups.TRAINING}, DEFAULTS)
    add_fields(parser, SourceArguments, {"evaluation": EVALUATION})
    run_group = (*groups.RUN, "resume_from_checkpoint")
    add_fields(parser, training, {"the run": run_group}, DEFAULTS, all_others=True)


def run(args: argparse.Namespace) -> list[str]:
    """Reconstruct the model of `args`, save it, and return what was written."""
    work = start(args, "reconstruct", DEFAULTS)
    trainer, options = work.trainer, work.recipe.args
    model: Any = trainer.model
    # Reconstruction would move its blocks only, and leave the rest of the model where it is.
    model.to(options.device)
    work.measure("dense", model)
    result = trainer.train(resume_from_checkpoint=work.resume_from())
    begin_work()
    passes = options.length_of_regions()["epochs"] or 1
    tokens = round(options.calibration_samples * work.texts["calibration"].shape[1] * passes)
    work.measure("reconstructed", model, tokens, result.metrics["train_runtime"])
    folder = str(Path(str(options.output_dir)) / "sparse")
    trainer.save_merged_model(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(options.device)
    work.measure("saved", reloaded)
    return [f"{folder} (load it by AutoModelForCausalLM.from_pretrained)", *work.finish("sparse")]
