"""The reconstruction that `SparseTrainer` runs: `reconstruct`, with the optimiser, data and folders of a `Trainer`."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..model.weights import share, zero_counts
from ..pruning.checks import pruning_task
from ..pruning.offloaded import one_layer_at_a_time
from ..reconstruction import Fit, ReconstructionReport, reconstruct
from ..reconstruction.checks import as_sparse_as_asked, check_teaching, zeros_before
from ..reconstruction.progress import foreign_files, is_progress
from .calibration_samples import first_samples
from .midway_evaluation import MidwayEvaluation
from .reconstruction_log import TrainingLog, optimizer_of, schedule_of


# The folder in `output_dir` that holds the finished regions.
FOLDER = "reconstruction"


class ReconstructionRun:
    """Reconstructs the model of a trainer by its arguments.

    Args:
        trainer: the trainer. Its model, `teacher`, `peft_config` and data are read.
        dense: the model before it was pruned, if the model of the trainer has been pruned already.
        resume: True continues the run in `output_dir`, a path that of another folder, None starts anew.
        ignore_keys: keys of the model's outputs that evaluation does not gather.
    """

    def __init__(
        self, trainer: Trainer, dense: nn.Module | None, resume: str | bool | None, ignore_keys: list[str] | None
    ) -> None:
        self.trainer: Any = trainer
        self.args: Any = trainer.args
        self.dense = dense
        self.resume = resume
        self.evaluation = MidwayEvaluation(trainer, ignore_keys)
        # How many regions are finished, so that the model is another one.
        self.regions = 0

    def __call__(self) -> tuple[ReconstructionReport, TrainOutput]:
        """Run it. Everything is checked before the finished regions of an earlier run are deleted.

        Returns:
            The report of `reconstruct`, and what `Trainer.train` would return.
        """
        trainer, args = self.trainer, self.args
        pruning = self._pruning()
        self.evaluation.check()
        state_dir = self._state_dir()
        log = TrainingLog(trainer, args.region_size(), state_dir is not None, self.evaluation)
        batch_size = args.batch_of_regions()
        try:
            report = reconstruct(
                trainer.model,
                calibration=list(first_samples(trainer, batch_size)),
                **pruning,
                dense=self.dense,
                region=args.region_size(),
                mode=args.reconstruction_mode,
                fit=self._fit(),
                batch_size=batch_size,
                activations=args.activations,
                device=args.device,
                state_dir=state_dir,
                observer=log,
            )
        finally:
            self.regions = log.regions
        return report, log.finish(report)

    def _fit(self) -> Fit:
        trainer, args = self.trainer, self.args
        rate = args.rate_of_regions()
        optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        # In a chain, the adapter of `peft_config` is that of retraining.
        tuner = None if args.retrains else trainer.peft_config
        return Fit(
            tuner=tuner or "full",
            loss=args.reconstruction_loss,
            learning_rate=rate,
            **args.length_of_regions(),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            # Partials, because a resumed run compares their arguments.
            optimizer=partial(optimizer_of, optimizer_class, args.weight_decay, options | {"lr": rate}),
            scheduler=partial(schedule_of, args.lr_scheduler_type, args.warmup_steps, args.lr_scheduler_kwargs),
            autocast=torch.bfloat16 if args.bf16 else None,
            holdout=args.reconstruction_holdout,
            seed=args.seed,
        )

    def _pruning(self) -> dict[str, Any]:
        """Return what `reconstruct` is to prune: nothing if the dense model is given beside a pruned one."""
        options: dict[str, Any] = self.args.pruning_options()
        if options["pattern"] is None:
            return options
        task = pruning_task(self.trainer.model, **options)
        with one_layer_at_a_time(task.weights) as reading:
            if self.dense is None:
                # `reconstruct` checks this too, but after the finished regions of an earlier run are deleted.
                check_teaching(task, None, reading, tell=False)
                return options
            counts = zeros_before(task, reading)
            if not as_sparse_as_asked(task, counts) and self.args.distillation is not None:
                # The teacher is that of the distillation alone.
                self.dense = None
                check_teaching(task, None, reading, tell=False)
                return options
        if not as_sparse_as_asked(task, counts):
            raise ValueError(
                "`teacher` is the dense model of a model that was pruned before. Expected a model pruned to "
                f"{task.pattern}, got one with a sparsity of {share(zero_counts(task.weights).values()):.4f}. Leave "
                "`teacher` out: the model is then pruned region by region, and gives its own targets. Or prune it "
                "before."
            )
        return options | {"pattern": None}

    def _state_dir(self) -> Path | None:
        if self.args.save_strategy == "no" and not self.resume:
            return None
        folder = Path(self.resume) if isinstance(self.resume, str) else Path(str(self.args.output_dir)) / FOLDER
        if not self.resume:
            if foreign := foreign_files(folder):
                raise ValueError(
                    f"Reconstruction keeps its finished regions in {str(folder)!r}, where {foreign[0]!r} is not one "
                    "of its files and would be deleted. Move the folder, or give another `output_dir`."
                )
            if self.trainer.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            # No process writes before the folder is gone.
            self.trainer.accelerator.wait_for_everyone()
        elif not is_progress(folder):
            raise ValueError(
                f"Expected {str(folder)!r} to hold the finished regions of a reconstruction, found none. Resume with "
                "the `output_dir` of that run, or leave `resume_from_checkpoint` out to start again."
            )
        return folder
