"""SparseTrainer: the Trainer of transformers, pruning when asked, logging sparsity, losing no zero silently."""

import itertools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..model.blocks import base_model
from ..model.sharding import FSDP1
from ..pruning.criteria import find_criterion
from ..pruning.patterns import SemiStructured
from ..pruning.prune import sparsity
from ..pruning.report import PruningReport
from ..reconstruction import reconstruct
from ..reconstruction.progress import is_progress
from ..reconstruction.report import ReconstructionReport
from ..tuners import merged_state_dict
from .arguments import SparseTrainingArguments
from .distillation import check_teacher, dense_copy, outputs_of, predictions, sum_of_losses
from .learning_rates import norm_drop, retraining_schedule
from .pruning_callback import PruningCallback
from .reconstruction_log import TrainingLog, optimizer_of, schedule_of
from .termination import TerminationCallback
from .zero_guard import ZeroGuardCallback


class SparseTrainer(Trainer):
    """`Trainer` for pruned models.

    With `sparsity` or `pattern` in the arguments the model is pruned when training begins, or step by step by the
    `pruning_schedule` (`PruningCallback`). The zeros it has from then on are kept, those of weights that are trained
    themselves too (`ZeroGuardCallback`), and checked at every log, before every save and at the end; every log holds
    `sparsity`.

    With `retraining_schedule` the learning rates are those of `learning_rates`: η is what `learning_rate`,
    `lr_scheduler_type` and warm-up give over `original_steps`.

    With `recovery="reconstruct"` training is `reconstruct`, on the first `calibration_samples` of the training set:
    optimiser, schedule, epochs or `max_steps` (of each region), batch, accumulation, clipping, bf16, seed, logging and
    callbacks are those of the arguments. The model stays where it is, only the blocks in turn go to the device.
    Finished regions are kept in `output_dir/reconstruction`, for `train(resume_from_checkpoint=True)`, unless
    `save_strategy="no"`.

    With `distillation` the loss in training is (1 - α) · L_task + α · L_distillation, α the `distillation_weight`,
    each a mean over the predictions that have a label: T² · KL(p_t ‖ p_s) of the logits at the
    `distillation_temperature` T, or the relative squared error of the hidden states after each block (`distillation`).
    Losses in evaluation are the task's.

    Args:
        args: a `SparseTrainingArguments`.
        peft_config: the tuner that reconstruction trains with; by default the region's full weights.
        teacher: the dense model that `distillation` learns from, of any dtype, with the same tokeniser. By default a
            copy of the model, without adapters, made before it is pruned here: as much memory again. It is moved to
            the device, not trained and not saved.
        everything else: as in `Trainer`. What a `model_init` makes is pruned each time.

    Raises:
        TypeError: `args` is another kind of arguments.
        ValueError: calibration is needed and the training set is shorter than `calibration_samples`; `peft_config`
            without reconstruction, or reconstruction of a model with adapters; "allr" without pruning here; no
            teacher where one is needed, or one that does not fit; FSDP1. In `train`: arguments that ask for another
            pruning than when the trainer was made; a trial of a hyperparameter search that is to reconstruct.
        RuntimeError: while training, a pruned weight lost a zero.
    """

    args: SparseTrainingArguments
    # None while `Trainer` makes itself, and from a `model_init` a model that is not trained.
    _pruning: PruningCallback | None = None

    def __init__(
        self,
        model: Any = None,
        args: SparseTrainingArguments | None = None,
        *,
        peft_config: PeftConfig | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        args = SparseTrainingArguments() if args is None else args
        if not isinstance(args, SparseTrainingArguments):
            raise TypeError(f"Expected `args` as SparseTrainingArguments, got {type(args).__name__}.")
        reconstructs = args.recovery == "reconstruct"
        if peft_config is not None and not reconstructs:
            raise ValueError(
                '`peft_config` says what `recovery="reconstruct"` trains. To retrain, attach the adapter yourself: '
                "get_peft_model(model, peft_config)."
            )
        if reconstructs and isinstance(model, PeftModel):
            raise ValueError(
                "Reconstruction attaches and merges its adapters region by region. Pass the plain model, and the "
                "configuration as `peft_config`."
            )
        super().__init__(model, args, **kwargs)
        if getattr(getattr(self.accelerator.state, "fsdp_plugin", None), "fsdp_version", None) == 1:
            raise ValueError(FSDP1)
        self.peft_config = peft_config
        self.reconstruction_report: ReconstructionReport | None = None
        self._asked = self._pruning_options()
        if args.pruning_pattern() is not None and not reconstructs:
            beside: dict[str, Any] = {
                "allocation": args.allocation,
                "refinement": args.refinement,
                "update": args.update_kept,
            }
            measured = find_criterion(args.criterion)[1].needs or any(beside.values())
            calibration = self._calibration(1) if measured else None
            self._pruning = PruningCallback(
                schedule=args.pruning_times(), calibration=calibration, **self._pruning_options(), **beside
            )
            self.add_callback(self._pruning)
        self.add_callback(ZeroGuardCallback(args.target_modules, args.exclude_modules))
        if args.save_on_sigterm:
            self.add_callback(TerminationCallback())
        self.teacher = self._find_teacher(teacher)

    @property
    def pruning_report(self) -> PruningReport | None:
        """The report of what was pruned when training began, None before or without pruning."""
        if self.reconstruction_report is not None:
            return self.reconstruction_report.pruning
        return self._pruning.report if self._pruning else None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Prune if asked and not done yet, then train as `Trainer.train` does; or reconstruct."""
        if self.args.recovery == "reconstruct":
            if trial is not None:
                raise ValueError(
                    "Hyperparameter search sets the arguments of a training, which reconstruction is none of. Make a "
                    "SparseTrainer for each trial, and search with the library itself."
                )
            return self._reconstruct(resume_from_checkpoint)
        if self.model_init is None:
            self._prune_first(self.model)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model, as `Trainer` does for each training, pruned if asked."""
        model: nn.Module = super().call_model_init(trial)
        self._prune_first(model)
        return model

    def _prune_first(self, model: nn.Module) -> None:
        # Before a checkpoint is loaded: on the weights that the first run pruned, trained biases included.
        if self._pruning and self._pruning.schedule is None and not self._pruning.has_pruned(model):
            self._pruning.prune(model, self.args.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        trainer: Any = self
        self._check_unchanged()
        method = self.args.retraining_schedule
        if method is not None and trainer.lr_scheduler is None:
            cycles = self.args.pruning_rounds if self.args.pruning_schedule == "cycles" else None
            drop: Any = None
            if method == "allr" and self._pruning and (cycles or self._pruning.norms):
                drop = self._pruning.norm_drop if cycles else norm_drop(*self._pruning.norms)
            trainer.lr_scheduler = retraining_schedule(
                method,
                optimizer or trainer.optimizer,
                self.args.original_rates(num_training_steps),
                num_training_steps,
                norm_drop=drop,
                cycles=cycles or 1,
            )
            trainer._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of `Trainer`, while training mixed with that of `distillation`."""
        name, weight = self.args.distillation, self.args.distillation_weight
        if name is None or self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kept = predictions(model, inputs)
        # First, so that what it computes is gone before the other's activations stay.
        with self.accelerator.autocast():
            taught = outputs_of(self.teacher, inputs, name)
        asked = {"output_hidden_states": True} if name == "hidden_states" else {}
        task_loss, outputs = super().compute_loss(model, inputs | asked, True, num_items_in_batch)
        total = sum_of_losses(name, outputs, taught, kept, self.args.distillation_temperature)
        if num_items_in_batch is None:
            loss = total / kept.sum().clamp_min(1)
        else:
            # As the task loss: of all accumulated batches, and of all processes where they share one count.
            shared = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = total * shared / num_items_in_batch
        loss = (1 - weight) * task_loss + weight * loss
        return (loss, outputs) if return_outputs else loss

    def _find_teacher(self, teacher: nn.Module | None) -> nn.Module | None:
        args = self.args
        if args.distillation is None:
            if teacher is not None:
                raise ValueError(
                    '`teacher` is given and `distillation` is not. Set distillation="logits" or "hidden_states".'
                )
            return None
        if args.n_gpu > 1:
            raise ValueError(
                f"Distillation runs one process per GPU, and this one has {args.n_gpu}. Start it with accelerate "
                "launch or torchrun."
            )
        if teacher is None:
            if self._pruning is None:
                raise ValueError(
                    f"`distillation={args.distillation!r}` learns from the dense model, which nobody gave. Pass it as "
                    "`teacher`, or let SparseTrainer prune: set `sparsity` or `pattern`."
                )
            share = sparsity(self.model, args.target_modules, args.exclude_modules)
            teacher = dense_copy(self.model, share)
        check_teacher(teacher, self.model, args.distillation)
        # One that was loaded across devices stays there.
        return teacher if hasattr(teacher, "hf_device_map") else teacher.to(args.device)

    def _reconstruct(self, resume_from_checkpoint: str | bool | None) -> TrainOutput:
        args: Any = self.args
        if self.model_init is not None:
            self.model = self.callback_handler.model = self.call_model_init()
        state_dir = self._state_dir(resume_from_checkpoint)
        logged = TrainingLog(self, args.region_size(), kept=state_dir is not None)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, self.model)
        report = reconstruct(
            self.model,
            list(self._calibration(args.per_device_train_batch_size)),
            **self._pruning_options(),
            region=args.region_size(),
            mode=args.reconstruction_mode,
            loss=args.reconstruction_loss,
            tuner=self.peft_config or "full",
            learning_rate=args.learning_rate,
            epochs=args.num_train_epochs,
            max_steps=args.max_steps if args.max_steps > 0 else None,
            batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            # Partials, whose choices a resumed run compares.
            optimizer=partial(optimizer_of, optimizer_class, args.weight_decay, options),
            scheduler=partial(schedule_of, args.lr_scheduler_type, args.warmup_steps, args.lr_scheduler_kwargs),
            autocast=torch.bfloat16 if args.bf16 else None,
            holdout=args.reconstruction_holdout,
            seed=args.seed,
            activations=args.activations,
            device=args.device,
            state_dir=state_dir,
            on_start=logged.start,
            on_step=logged.step,
            on_region=logged.region,
        )
        self.reconstruction_report = report
        return logged.finish(report)

    def _state_dir(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        if self.args.save_strategy == "no" and not resume_from_checkpoint:
            return None
        folder = Path(str(self.args.output_dir)) / "reconstruction"
        if isinstance(resume_from_checkpoint, str):
            folder = Path(resume_from_checkpoint)
        if not resume_from_checkpoint:
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            # Nobody writes before it is gone.
            self.accelerator.wait_for_everyone()
        elif not is_progress(folder):
            raise ValueError(
                f"Expected {str(folder)!r} to hold what a reconstruction kept, found nothing of it. Resume with the "
                "`output_dir` of that run, or leave `resume_from_checkpoint` out to start anew."
            )
        return folder

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if self.args.recovery != "reconstruct":
            super()._move_model_to_device(model, device)

    def _pruning_options(self) -> dict[str, Any]:
        args, pattern = self.args, self.args.pruning_pattern()
        return {
            "pattern": pattern,
            "criterion": args.criterion,
            # A pattern of the arguments' "n:m" has its own group.
            "group": None if isinstance(pattern, SemiStructured) else args.group,
            "target_modules": args.target_modules,
            "exclude_modules": args.exclude_modules,
        }

    def _check_unchanged(self) -> None:
        for name, value in self._pruning_options().items():
            if value != self._asked[name]:
                raise ValueError(
                    f"The arguments now ask for another `{name}`, {value}, than when this SparseTrainer was made, "
                    f"{self._asked[name]}, by which it pruned. Make a new one; to search over pruning, call `prune` "
                    "in `model_init`."
                )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        guard = self._guard()
        if guard.weights:
            guard.check()
            logs["sparsity"] = round(guard.sparsity(), 6)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._guard().check()
        super().save_model(output_dir, _internal_call)

    def save_merged_model(self, output_dir: str) -> None:
        """Save the model with its adapters merged, for `from_pretrained`: gathered from all processes, written by one.

        The model stays as it is. Call it in every process.

        Raises:
            TypeError: adapters that cannot be merged so, see `merged_state_dict`.
            RuntimeError: a pruned weight lost a zero.
        """
        self._save_plain(output_dir, merge=True)

    def save_base_model(self, output_dir: str) -> None:
        """Save the model below the adapters, which they are loaded onto; everything else as in `save_merged_model`."""
        self._save_plain(output_dir, merge=False)

    def _save_plain(self, output_dir: str, merge: bool) -> None:
        self._guard().check()
        state = merged_state_dict(self.model, merge=merge, keep=self.args.should_save)
        if self.args.should_save:
            base: Any = base_model(self.model)
            base.save_pretrained(output_dir, state_dict=state)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
        self.accelerator.wait_for_everyone()

    def _guard(self) -> ZeroGuardCallback:
        # Looked up, not kept: resuming may replace the callback by one restored from the checkpoint.
        return next(c for c in self.callback_handler.callbacks if isinstance(c, ZeroGuardCallback))

    def _calibration(self, batch_size: int) -> "_FirstSamples":
        if self.train_dataset is None:
            purpose = "Reconstruction" if self.args.recovery == "reconstruct" else f"Criterion {self.args.criterion!r}"
            raise ValueError(f"{purpose} is calibrated on `train_dataset`, which is missing.")
        dataset, count = self.train_dataset, self.args.calibration_samples
        if isinstance(dataset, IterableDataset):
            dataset = list(itertools.islice(dataset, count))
        if len(dataset) < count:
            raise ValueError(
                f"`calibration_samples={count}`, but the training set has only {len(dataset)} samples. Ask for fewer, "
                "or bring more text."
            )
        collator = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        return _FirstSamples(dataset, collator, count, batch_size)


class _FirstSamples:
    """The first samples of a dataset, collated in batches; every process sees the same, in the same order."""

    def __init__(self, dataset: Any, collator: Any, count: int, batch_size: int) -> None:
        self.dataset, self.collator, self.count, self.batch_size = dataset, collator, count, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self.count, self.batch_size):
            yield self.collator([self.dataset[i] for i in range(start, min(start + self.batch_size, self.count))])
