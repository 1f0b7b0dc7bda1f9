"""`compress` runs a recipe: it prunes a model, recovers its quality, merges and saves it, and measures every stage."""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..evaluation.perplexity import perplexity
from ..model.environment import peak_memory
from ..pruning.prune import sparsity
from ..reconstruction.progress import foreign_files, is_progress
from ..reporting import RunReport, Stage, describe_saved, write_report
from ..sharing import write_card
from ..training.arguments import SparseTrainingArguments
from ..training.one_bar import show_one_bar
from ..training.reconstruction_run import FOLDER
from ..training.run_report import changed_arguments
from ..training.trainer import SparseTrainer
from .recipe import Recipe, load_recipe


# The folder of the compressed model in `output_dir`. The report is written beside it.
MODEL = "sparse"


def compress(
    model: PreTrainedModel,
    recipe: str | Path | Recipe,
    train: Tensor,
    *,
    calibration: Tensor | None = None,
    evaluation: Mapping[str, Tensor] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    output_dir: str | Path = "compressed",
    resume: bool = False,
    **changes: Any,
) -> RunReport:
    """Prune a language model, recover its quality, merge, save, and measure it after each stage. One run.

    The stages are those of `recovery` in the recipe: pruning alone; pruning and retraining; or reconstruction, which
    prunes region by region, and retraining. The compressed model is written to `output_dir/sparse`, from which plain
    `from_pretrained` loads it, and the report to `report.json` and `report.html` in `output_dir`. Finished regions are
    needed to resume a run, and are deleted at its end. Checkpoints of retraining stay as `save_strategy` and
    `save_total_limit` say.

    Args:
        model: a dense causal language model, without adapters. It is changed in place.
        recipe: "fast", "balanced" or "best"; or the path of a YAML file; or a `Recipe`.
        train: token ids to retrain on, (sequences, tokens). Calibration and reconstruction use the first
            `calibration_samples` of them, if there is no `calibration`.
        calibration: token ids for pruning and reconstruction, (sequences, tokens).
        evaluation: token ids to measure perplexity on after each stage, (sequences, tokens), by the name of the text.
            They should be texts that are not trained on. The model is moved to the training device for this. None
            measures nothing.
        processing_class: the tokenizer, which is saved with the model.
        output_dir: the folder to write to. A `Recipe` has its own.
        resume: whether to continue a run in `output_dir` that was stopped. If there is none, the run starts anew.
        changes: arguments that replace those of the recipe, such as `sparsity=0.6` or `pattern="2:4"`. They are those
            of `SparseTrainingArguments`, and `adapter`, `r`, `lora_alpha`, `train_norms` and `bias`.

    Returns:
        The report, whose text is a table of the stages.

    Raises:
        TypeError: `changes` are given beside a `Recipe`.
        ValueError: the recipe, a name or a value is unknown; no sparsity is asked for; the training is parallel by
            FSDP or DeepSpeed; there are too few sequences; or an error of the trainer.
    """
    recipe = _as_recipe(recipe, output_dir, changes)
    args = recipe.args
    _check(args)
    calibrated = train if calibration is None else calibration
    stages = _Stages(args, {} if evaluation is None else dict(evaluation), train.shape[1], calibrated.shape[1])
    own = None if calibration is None else Sequences(calibration)
    trainer = SparseTrainer(
        model,
        args,
        data_collator=default_data_collator,
        train_dataset=Sequences(train),
        processing_class=processing_class,
        callbacks=[stages],
        peft_config=recipe.adapter.config("CAUSAL_LM") if args.retrains else None,
        calibration_dataset=own,
    )
    show_one_bar(trainer)
    stages.trainer = trainer
    output = Path(str(args.output_dir))
    begun = is_progress(output / FOLDER) if args.reconstructs else any(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    resumed = resume and begun
    if evaluation:
        # Reconstruction would move its blocks only, and leave the rest of the model where it is.
        model.to(args.device)
    stages.add("dense", model)
    trainer.train(resume_from_checkpoint=resumed or None)
    if args.recovery == "none":
        stages.add("pruned", trainer.model, args.calibration_samples * calibrated.shape[1])
    trainer.save_merged_model(str(output / MODEL))
    saved = type(model).from_pretrained(output / MODEL, dtype=model.dtype).to(args.device)
    stages.add("saved", saved)
    report = dataclasses.replace(
        trainer.run_report(),
        task="compress",
        recipe=recipe.name,
        arguments=changed_arguments(recipe.text, recipe.adapter, args),
        stages=tuple(stages.found),
        texts={name: described_tokens(tokens) for name, tokens in _texts(train, calibration, evaluation).items()},
        saved=(describe_saved(output, MODEL, saved),) if args.should_save else (),
        resumed=resumed,
    )
    if args.should_save:
        write_report(report, output)
        write_card(output / MODEL, report=report, model=saved)
        if not foreign_files(output / FOLDER):
            shutil.rmtree(output / FOLDER, ignore_errors=True)
    return report


def _as_recipe(recipe: str | Path | Recipe, output_dir: str | Path, changes: dict[str, Any]) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, output_dir, **changes)
    if changes:
        raise TypeError(
            f"A `Recipe` has its arguments already, and {', '.join(map(repr, changes))} are given beside it. Give "
            "them to `load_recipe`, or change `recipe.args`."
        )
    return recipe


def _check(args: SparseTrainingArguments) -> None:
    if args.pruning_pattern() is None:
        raise ValueError('A compression needs a sparsity. Give `sparsity=0.5`, or `pattern="2:4"`.')
    if args.fsdp or args.deepspeed:
        raise ValueError(
            "`compress` measures the whole model after each stage, and FSDP and DeepSpeed divide it among processes. "
            "Run it in one process or with DDP, or use SparseTrainer and measure afterwards."
        )


class _Stages(TrainerCallback):
    """Measures the model at the ends of the stages, and the time that each stage took.

    Args:
        args: the arguments of the trainer.
        evaluation: the texts, by name.
        length: the tokens in a sequence of training.
        calibration_length: the tokens in a sequence of calibration.
    """

    def __init__(
        self, args: SparseTrainingArguments, evaluation: dict[str, Tensor], length: int, calibration_length: int
    ) -> None:
        self.args, self.evaluation = args, evaluation
        self.length, self.calibrated = length, args.calibration_samples * calibration_length
        self.found: list[Stage] = []
        # Set when there is one. It hands the perplexities on to the loggers.
        self.trainer: Trainer | None = None
        self._start()

    def add(self, name: str, model: nn.Module, tokens: int = 0) -> None:
        """Measure `model` after the stage `name`, which read `tokens` tokens, and log the perplexities."""
        seconds, cpu = time.perf_counter() - self._since, time.process_time() - self._cpu_since
        if name in ("dense", "saved"):
            seconds = cpu = 0.0
        peak = peak_memory()
        values = {text: perplexity(model, tokens) for text, tokens in self.evaluation.items()}
        share = sparsity(model, self.args.target_modules, self.args.exclude_modules)
        self.found.append(Stage(name, values, share, seconds, cpu, tokens, peak))
        if self.trainer is not None and values:
            one = len(values) == 1
            named = {f"{name}_perplexity" + ("" if one else f"_{text}"): value for text, value in values.items()}
            self.trainer.log(named)
        self._start()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the pruned model before it is retrained."""
        if self.args.recovery == "retrain":
            self.add("pruned", kwargs["model"], self.calibrated)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the reconstructed or retrained model."""
        is_first = all(stage.name != "reconstructed" for stage in self.found)
        name = "reconstructed" if self.args.reconstructs and is_first else "retrained"
        if name == "reconstructed":
            tokens = round(self.calibrated * (self.args.length_of_regions()["epochs"] or 1))
        else:
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            tokens = state.global_step * batch * self.length
        self.add(name, kwargs["model"], tokens)

    def _start(self) -> None:
        self._since, self._cpu_since = time.perf_counter(), time.process_time()


class Sequences(Dataset[dict[str, Tensor]]):
    """Token sequences as samples for causal language modelling."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def _texts(train: Tensor, calibration: Tensor | None, evaluation: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    texts = {"train": train} | ({} if calibration is None else {"calibration": calibration})
    return texts | {f"evaluation, {name}": tokens for name, tokens in (evaluation or {}).items()}


def described_tokens(tokens: Tensor) -> dict[str, Any]:
    """Return the number of sequences, their length and a digest, for reports."""
    digest = hashlib.sha256(tokens.to(torch.int64).cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
    return {"sequences": len(tokens), "length": tokens.shape[1], "digest": digest}
