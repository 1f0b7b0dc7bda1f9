"""`peft-sparse compress`: runs a whole recipe, from a dense model to a sparse one with a report."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..pruning.prune import sparsity
from ..recipes import RECIPES, AdapterArguments, Recipe, TextArguments, compress
from ..recipes.compression import MODEL as FOLDER
from ..recipes.recipe import read_recipe
from ..reporting.writing import JSON, PAGE
from ..training.arguments import SparseTrainingArguments
from . import groups
from .arguments import add_fields, parsed
from .outcome import BadArguments, begin_work
from .sources import (
    EVALUATION,
    MODEL,
    TEXT,
    SourceArguments,
    check_lengths,
    check_output,
    held_out,
    load_all,
    packed_for,
    shuffled,
    tell_model,
    tell_text,
)
from .story import prepare, say


SUMMARY: str = "Run a whole recipe: prune, reconstruct, retrain, merge, measure, and write a report."
EXAMPLE: str = "peft-sparse compress --model Qwen/Qwen2.5-0.5B --text_file text.txt --sparsity 0.5 --recipe balanced"

# Below the values of a recipe, which are below those that are given.
DEFAULTS: dict[str, Any] = {"output_dir": "compressed", "report_to": "none", "logging_steps": 10}


@dataclass
class RecipeArguments:
    """Which recipe, and how it is run."""

    recipe: str = field(default="balanced", metadata={"help": f"{', '.join(RECIPES)}, or a YAML file of your own."})
    resume: bool = field(default=False, metadata={"help": "Continue a run in `output_dir` that was stopped."})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `peft-sparse compress`. Values of the recipe are not shown."""
    add_fields(parser, SourceArguments, {"the model (default: SmolLM2-135M-Instruct, from PyPI)": MODEL})
    add_fields(parser, RecipeArguments, {"the recipe": ("recipe", "resume")})
    training = SparseTrainingArguments
    add_fields(parser, training, {"to what sparsity (default: 0.5)": groups.SPARSITY})
    add_fields(parser, SourceArguments, {"the text (default: the documentation of Python)": TEXT})
    add_fields(parser, SourceArguments, {"evaluation": EVALUATION})
    lengths = {"sequence_length": None, "calibration_length": None}
    add_fields(parser, TextArguments, {"how much text (default: as in the recipe)": tuple(lengths)}, lengths)
    add_fields(
        parser,
        training,
        {
            "pruning (default: as in the recipe)": groups.PRUNING,
            "reconstruction (default: as in the recipe)": groups.RECONSTRUCTION,
            "retraining (default: as in the recipe)": (*groups.TRAINING, *groups.RETRAINING),
            "the run": groups.RUN,
        },
        dict.fromkeys((*groups.PRUNING, *groups.RECONSTRUCTION, *groups.TRAINING)) | DEFAULTS,
        all_others=True,
    )
    adapter = ("adapter", "r", "lora_alpha", "train_norms", "bias")
    add_fields(parser, AdapterArguments, {"the adapter of retraining": adapter})


def run(args: argparse.Namespace) -> list[str]:
    """Compress the model of `args` by a recipe, and return what was written."""
    given = vars(args)
    (chosen,) = parsed(given, RecipeArguments)
    sources, recipe = parsed(given, SourceArguments)[0], recipe_of(chosen.recipe, given)
    check_output(str(recipe.args.output_dir), FOLDER, source=sources.model_name_or_path)
    prepare()
    documents, model, tokenizer = load_all(sources)
    check_lengths(model, **vars(recipe.text), evaluation_length=sources.evaluation_length)
    train = packed_for(documents, tokenizer, recipe.text, "sequence_length")
    calibration = packed_for(documents, tokenizer, recipe.text, "calibration_length")
    evaluation = held_out(documents, tokenizer, sources)
    tell_model(sources, model, recipe.args.device)
    tell_text(documents, train, evaluation)
    say(f"recipe {recipe.name}, {_stages(recipe)}")
    if sources.model_name_or_path is None and recipe.name == "balanced":
        say("This takes about six minutes on two CPU cores.")
    with _noticing_work(model):
        report = compress(
            model,
            recipe,
            train,
            calibration=shuffled(calibration, recipe.args.seed),
            evaluation={documents.name: evaluation},
            processing_class=tokenizer,
            resume=chosen.resume,
        )
    say(f"\n{report}\n\npeak memory {(report.peak_memory_bytes or 0) / 2**30:.1f} GiB")
    output = Path(str(recipe.args.output_dir))
    files = [str(output / name) for name in (JSON, PAGE)]
    return [f"{output / FOLDER} (load it by AutoModelForCausalLM.from_pretrained)", *files]


@contextlib.contextmanager
def _noticing_work(model: Any) -> Iterator[None]:
    """Note that the work has begun if an error leaves the context after `model` was pruned, which comes first."""
    before = sparsity(model)
    try:
        yield
    except Exception:
        if sparsity(model) != before:
            begin_work()
        raise


def recipe_of(name: str, given: dict[str, Any]) -> Recipe:
    """Return the recipe `name` with the values that are given in the place of its own.

    Raises:
        BadArguments: there is no such recipe, or a value is refused.
    """
    try:
        values = read_recipe(name)
    except ValueError as error:
        raise BadArguments(str(error)) from error
    if {"sparsity", "pattern"} & given.keys():
        values = {key: value for key, value in values.items() if key not in ("sparsity", "pattern")}
    values = DEFAULTS | {"dataloader_pin_memory": torch.cuda.is_available()} | values | given
    if values.get("sparsity") is None and values.get("pattern") is None:
        values["sparsity"] = 0.5
    text, adapter, args = parsed(values, TextArguments, AdapterArguments, SparseTrainingArguments)
    return Recipe(name, args, adapter, text)


def _stages(recipe: Recipe) -> str:
    """Return in words what the stages of a recipe are."""
    args, text = recipe.args, recipe.text
    how = [args.criterion, *(["swaps"] if args.refinement else []), *(["least squares"] if args.update else [])]
    read = f"{args.calibration_samples * text.calibration_length:,} tokens"
    stages = [f"prune to {args.pruning_pattern()} by {', '.join(how)}"]
    if args.reconstructs:
        stages[0] += f" and fit each region to its dense outputs on {read}"
    if args.retrains:
        length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        what = "all weights" if recipe.adapter.adapter == "none" else recipe.adapter.adapter
        batch = args.train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
        stages.append(f"retrain {what} for {length} of {batch * text.sequence_length:,} tokens")
    return "; ".join([*stages, "merge, save and measure"])
