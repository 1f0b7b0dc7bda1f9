"""Runs a reconstruction with the optimiser, learning rate schedule, callbacks and logs of a `Trainer`."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import TrainOutput

from ..model.blocks import block_of, find_stacks, prunable_weights
from ..reconstruction import ReconstructionObserver, ReconstructionReport, RegionReport, Step
from ..reconstruction.regions import RegionSize, regions_in
from .midway_evaluation import MidwayEvaluation


def optimizer_of(
    kind: Any, weight_decay: float, options: dict[str, Any], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimiser of `parameters`.

    Args:
        kind: the class that `Trainer` chose.
        weight_decay: weight decay of all parameters.
        options: the other arguments of the class, among them the learning rate.
        parameters: the parameters to train.
    """
    made: torch.optim.Optimizer = kind([{"params": parameters, "weight_decay": weight_decay}], **options)
    return made


def schedule_of(
    kind: str, warmup: float, options: dict[str, Any] | None, optimizer: torch.optim.Optimizer, steps: int
) -> LRScheduler:
    """Return the learning-rate schedule that `TrainingArguments` describe.

    Args:
        kind: `lr_scheduler_type`.
        warmup: `warmup_steps`: a number of steps, or below 1 a fraction of `steps`.
        options: `lr_scheduler_kwargs`.
        optimizer: the optimiser.
        steps: number of optimiser steps of a region.
    """
    # As in `TrainingArguments.get_warmup_steps`.
    return get_scheduler(kind, optimizer, int(warmup) if warmup >= 1 else math.ceil(warmup * steps), steps, options)


class TrainingLog(ReconstructionObserver):
    """Reports a reconstruction to the callbacks and loggers of a trainer as one training run.

    Args:
        trainer: the trainer.
        size: size of the regions.
        kept: whether finished regions are kept, so that a run can be resumed.
        evaluation: evaluates the model: after a step with `eval_strategy="steps"`, and after a region, or after the
            matrices of a block, with `eval_strategy="epoch"`.
    """

    def __init__(self, trainer: Trainer, size: RegionSize, kept: bool, evaluation: MidwayEvaluation) -> None:
        self.trainer: Any = trainer
        self.size = size
        self.kept = kept
        self.evaluation = evaluation
        # The names of the last matrices of the blocks, if each matrix is a region.
        self.last_of_blocks: set[str] = set()
        self.sums: dict[str, Tensor | float] = {"run": 0.0, "log": 0.0}
        self.counts = {"run": 0, "log": 0, "region": 0}
        self.regions = 0

    def start(self, steps_per_region: int) -> None:
        """Begin the run."""
        trainer, size = self.trainer, self.size
        targets = prunable_weights(trainer.model, trainer.args.target_modules, trainer.args.exclude_modules)
        stacks = [stack for stack in find_stacks(trainer.model) if any(block_of(name, stack) for name in targets)]
        if size == "matrix":
            self.last_of_blocks = set({block_of(name, stack): name for stack in stacks for name in targets}.values())
        regions = 0 if size == "matrix" else sum(regions_in(stack, size) for stack in stacks)
        trainer.control.should_training_stop = False
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
        trainer.state.global_step, trainer.state.max_steps = 0, regions * steps_per_region
        trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        # Weights that are frozen now are pruned and fitted later, so no count of their zeros may be kept.
        trainer._guard().release()
        self.evaluation.start()
        if trainer.args.eval_on_start:
            self.evaluation()

    def step(self, step: Step) -> None:
        """Count an optimiser step, and log the mean loss if the arguments ask for this.

        Raises:
            RuntimeError: a callback stopped the run, so that the rest of the model is dense.
        """
        trainer = self.trainer
        trainer.state.global_step += 1
        for what in self.sums:
            self.sums[what] = self.sums[what] + step.loss
        for what in self.counts:
            self.counts[what] += 1
        control = trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
        if control.should_log:
            loss = self._mean("log")
            trainer.log({"loss": loss, "learning_rate": step.learning_rate, "region": self.regions})
        if control.should_evaluate:
            self.evaluation()
        # After the last step, a callback of transformers always stops the run.
        if control.should_training_stop and trainer.state.global_step < trainer.state.max_steps:
            how = (
                "Resume it with `train(resume_from_checkpoint=True)` in a new process."
                if self.kept
                else 'Nothing was kept, because `save_strategy="no"`. Load the model again.'
            )
            raise RuntimeError(
                f"A callback stopped reconstruction in {step.region!r}. The {self.regions} regions before it are "
                f"finished, and the others are not. {how}"
            )

    def region(self, report: RegionReport) -> None:
        """Log the errors of a finished region."""
        # The steps of a region that an earlier run finished were not counted in this run.
        self.trainer.state.global_step += report.steps - self.counts["region"]
        was_fitted_now = self.counts["region"] > 0 or report.name in self.last_of_blocks
        self.counts["region"] = 0
        errors = {"error_pruned": report.error_pruned, "error": report.error, "reverted": float(report.reverted)}
        self.trainer.log({"region": self.regions, **errors})
        self.regions += 1
        args = self.trainer.args
        if args.eval_strategy == "epoch" and was_fitted_now and self.regions >= args.eval_delay:
            self.evaluation()

    def finish(self, report: ReconstructionReport) -> TrainOutput:
        """End the run, and return its number of steps and its metrics."""
        trainer = self.trainer
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        metrics = {"train_runtime": report.seconds, "train_loss": self._mean("run")}
        trainer.log(dict(metrics))
        return TrainOutput(trainer.state.global_step, metrics["train_loss"], metrics)

    def _mean(self, what: str) -> float:
        """Return the mean loss of the steps that were counted as `what`, and reset the count."""
        mean = float(self.sums[what]) / max(1, self.counts[what])
        self.sums[what], self.counts[what] = 0.0, 0
        return mean
