"""What `retrain` and `reconstruct` share: the arguments, the trainer, the measured stages and the report."""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, default_data_collator

from ..evaluation.perplexity import perplexity
from ..model.environment import peak_memory
from ..pruning.prune import sparsity
from ..recipes import AdapterArguments, Recipe, TextArguments
from ..recipes.compression import Sequences, described_tokens
from ..reporting import Stage, describe_saved, write_report
from ..training.arguments import SparseTrainingArguments
from ..training.one_bar import show_one_bar
from ..training.run_report import changed_arguments
from ..training.trainer import SparseTrainer
from .arguments import check_pruned, parsed
from .outcome import begin_work
from .sources import (
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


# A model with fewer zeros counts as dense.
DENSE = 0.01


class WorkBegins(TrainerCallback):
    """Notes that the work begins with the first optimiser step."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note it."""
        begin_work()


@dataclass
class Run:
    """A training run of a command.

    Args:
        recipe: the arguments.
        trainer: the trainer.
        tokenizer: the tokenizer of the model.
        text_name: what reports call the text.
        evaluation: the sequences on which perplexity is measured.
        texts: the sequences by what they are for.
        stages: what was measured.
    """

    recipe: Recipe
    trainer: SparseTrainer
    tokenizer: Any
    text_name: str
    evaluation: Tensor
    texts: dict[str, Tensor]
    stages: list[Stage] = field(default_factory=list)

    def measure(self, name: str, model: Any, tokens: int = 0, seconds: float = 0.0) -> None:
        """Measure `model` after the stage `name`, and tell it."""
        self.add(name, perplexity(model, self.evaluation), sparsity(model), tokens, seconds)

    def add(self, name: str, value: float, zeros: float, tokens: int = 0, seconds: float = 0.0) -> None:
        """Add what was measured after the stage `name`, and tell it."""
        self.stages.append(Stage(name, {self.text_name: value}, zeros, seconds, 0.0, tokens, peak_memory()))
        say(f"{name}: perplexity {value:.2f}, sparsity {zeros:.4f}")

    def resume_from(self) -> str | bool | None:
        """Return where training resumes: a folder, or True for the last checkpoint of `output_dir`."""
        given = self.recipe.args.resume_from_checkpoint
        # A command line has no bools here, because `TrainingArguments` declares a text.
        words: dict[str, bool | None] = {"true": True, "false": None}
        return words.get(str(given).lower(), given)

    def finish(self, *saved: str, adapter: str | None = None, base: str | None = None) -> list[str]:
        """Write the report, print it, and return the paths of its files.

        Args:
            saved: folders of models in `output_dir`.
            adapter: the folder of the adapter, if there is one.
            base: the folder of its base model.
        """
        recipe, output = self.recipe, Path(str(self.recipe.args.output_dir))
        written: list[str] = []
        if recipe.args.should_save:
            model: Any = self.trainer.model
            found = [describe_saved(output, folder, model) for folder in saved]
            if adapter is not None:
                found.append(describe_saved(output, adapter, model, kind="adapter", base=base))
            report = dataclasses.replace(
                self.trainer.run_report(),
                arguments=changed_arguments(recipe.text, recipe.adapter, recipe.args),
                stages=tuple(self.stages),
                texts={name: described_tokens(tokens) for name, tokens in self.texts.items()},
                saved=tuple(found),
            )
            written = [str(path) for path in write_report(report, output)]
            say(f"\n{report}\n\npeak memory {(report.peak_memory_bytes or 0) / 2**30:.1f} GiB")
        return written


def start(args: argparse.Namespace, recovery: str, defaults: Mapping[str, Any]) -> Run:
    """Read the arguments, load model and text, make the trainer, and tell what will happen.

    Args:
        args: the arguments that are given.
        recovery: what the command does: "retrain" or "reconstruct".
        defaults: values of the command where none are given.

    Raises:
        BadArguments: a value is refused, or a model is given without a text.
        ValueError: there is nothing to do, or the trainer refuses.
    """
    values = {**defaults, "dataloader_pin_memory": torch.cuda.is_available(), **vars(args), "recovery": recovery}
    (sources,) = parsed(values, SourceArguments)
    if sources.model_name_or_path is None and values.get("sparsity") is None and values.get("pattern") is None:
        values["sparsity"] = 0.5
    text, adapter, options = parsed(values, TextArguments, AdapterArguments, SparseTrainingArguments)
    if recovery == "reconstruct":
        check_pruned(options)
    check_output(str(options.output_dir), "sparse", "pruned", source=sources.model_name_or_path)
    prepare()
    documents, model, tokenizer = load_all(sources)
    _check_sparsity(options, model)
    check_lengths(model, **vars(text), evaluation_length=sources.evaluation_length)
    train = packed_for(documents, tokenizer, text, "sequence_length")
    calibration = shuffled(packed_for(documents, tokenizer, text, "calibration_length"), options.seed)
    evaluation = held_out(documents, tokenizer, sources)
    tell_model(sources, model, options.device)
    tell_text(documents, train, evaluation)
    trainer = SparseTrainer(
        model,
        options,
        data_collator=default_data_collator,  # sequences of one length need no padding token
        train_dataset=Sequences(train),
        eval_dataset=Sequences(evaluation),
        processing_class=tokenizer,
        callbacks=[WorkBegins()],
        peft_config=adapter.config("CAUSAL_LM") if recovery == "retrain" else None,
        calibration_dataset=Sequences(calibration),
    )
    show_one_bar(trainer)
    texts = {"train": train, "calibration": calibration, f"evaluation, {documents.name}": evaluation}
    recipe = Recipe(recovery, options, adapter, text)
    return Run(recipe, trainer, tokenizer, documents.name, evaluation, texts)


def _check_sparsity(options: SparseTrainingArguments, model: Any) -> None:
    """Refuse a dense model that is not to be pruned."""
    if options.pruning_pattern() is not None:
        return
    share = sparsity(model, options.target_modules, options.exclude_modules)
    if share < DENSE:
        raise ValueError(
            f"The model is dense: its sparsity is {share:.4f}. Give --sparsity 0.5 to prune it first, or the folder "
            "of a pruned model."
        )
