"""Reconstruction seen as one run of `Trainer`: its optimizer and schedule, its steps and logs."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import TrainOutput

from ..model.blocks import block_of, find_stacks, prunable_weights
from ..reconstruction.fitting import Step
from ..reconstruction.regions import RegionSize, regions_in
from ..reconstruction.report import ReconstructionReport, RegionReport


def optimizer_of(
    kind: Any, weight_decay: float, options: dict[str, Any], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer of `parameters`, of the class and options that `Trainer` chose."""
    made: torch.optim.Optimizer = kind([{"params": parameters, "weight_decay": weight_decay}], **options)
    return made


def schedule_of(
    kind: str, warmup: float, options: dict[str, Any] | None, optimizer: torch.optim.Optimizer, steps: int
) -> LRScheduler:
    """Return the schedule that `TrainingArguments` describe; warm-up in steps, or as a share."""
    # As `TrainingArguments.get_warmup_steps`: below 1 it is a share.
    return get_scheduler(kind, optimizer, int(warmup) if warmup >= 1 else math.ceil(warmup * steps), steps, options)


class TrainingLog:
    """Makes of a reconstruction what the callbacks and loggers of `trainer` take for one training run.

    Args:
        kept: whether finished regions are, to go on from.
    """

    def __init__(self, trainer: Trainer, size: RegionSize, kept: bool) -> None:
        self.trainer: Any = trainer
        self.size = size
        self.kept = kept
        self.sums: dict[str, Tensor | float] = {"run": 0.0, "log": 0.0}
        self.counts = {"run": 0, "log": 0, "region": 0}
        self.regions = 0

    def start(self, steps: int) -> None:
        """Begin the run, of so many optimiser steps for each region."""
        trainer, size = self.trainer, self.size
        targets = prunable_weights(trainer.model, trainer.args.target_modules, trainer.args.exclude_modules)
        stacks = [stack for stack in find_stacks(trainer.model) if any(block_of(name, stack) for name in targets)]
        regions = 0 if size == "matrix" else sum(regions_in(stack, size) for stack in stacks)
        trainer.control.should_training_stop = False
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
        trainer.state.global_step, trainer.state.max_steps = 0, regions * steps
        trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)

    def step(self, step: Step) -> None:
        """Count an optimiser step, and log when the arguments say so.

        Raises:
            RuntimeError: a callback stopped the run, whose model is half dense.
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
        # After the last step Transformers' own callback says so.
        if control.should_training_stop and trainer.state.global_step < trainer.state.max_steps:
            how = (
                "Go on where it stopped with `train(resume_from_checkpoint=True)` in a new process."
                if self.kept
                else 'Nothing was kept, as `save_strategy="no"`: load the model again.'
            )
            raise RuntimeError(
                f"A callback stopped reconstruction in {step.region!r}: the {self.regions} regions before are "
                f"finished, the others are not. {how}"
            )

    def region(self, report: RegionReport) -> None:
        """Log the errors of a finished region."""
        # Those of a run that is resumed were counted by nobody here.
        self.trainer.state.global_step += report.steps - self.counts["region"]
        self.counts["region"] = 0
        errors = {"error_pruned": report.error_pruned, "error": report.error, "reverted": float(report.reverted)}
        self.trainer.log({"region": self.regions, **errors})
        self.regions += 1

    def finish(self, report: ReconstructionReport) -> TrainOutput:
        """End the run."""
        trainer = self.trainer
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        metrics = {"train_runtime": report.seconds, "train_loss": self._mean("run")}
        trainer.log(dict(metrics))
        return TrainOutput(trainer.state.global_step, metrics["train_loss"], metrics)

    def _mean(self, what: str) -> float:
        """Return the mean loss of the steps that were counted as `what`, and begin anew."""
        mean = float(self.sums[what]) / max(1, self.counts[what])
        self.sums[what], self.counts[what] = 0.0, 0
        return mean
