"""`SparseTrainer`: a `transformers.Trainer` for pruned models."""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    BaseImageProcessor,
    DataCollator,
    EvalPrediction,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..calibration.norms import NormsReport
from ..model.environment import remember
from ..model.sharding import FSDP1, has_shards
from ..model.tree import has_adapters
from ..pruning.criteria import find_criterion
from ..pruning.prune import sparsity
from ..pruning.report import PruningReport
from ..reconstruction import ReconstructionReport
from ..reconstruction.progress import fingerprint_of_model
from ..reporting import RunReport
from ..sharing.card import card_in, complete_card
from ..sharing.card_facts import facts_of_model
from ..sharing.hub import repo_of
from .added_adapters import check_added_adapters, load_added_adapter
from .arguments import SparseTrainingArguments
from .calibration_samples import first_samples
from .chain import AfterReconstruction, where_to_resume
from .checkpoints import checkpoint_to_resume
from .checks import check_asked, check_callbacks, check_data, check_trained, check_unmerged
from .distilling import Distilling, find_teacher
from .endings import as_before, without_noise
from .freezing import FreezingCallback
from .learning_rates import norm_drop, retraining_schedule
from .pruning_callback import PruningCallback
from .pruning_log import PruningLog
from .rate_search import RateSearch, recorded_rate
from .recalibration import Recalibration
from .reconstruction_run import ReconstructionRun
from .run_report import RunReportCallback
from .saving import save_plain_model, what_was_trained
from .several_adapters import load_adapters
from .termination import TerminationCallback, check_thread
from .zero_guard import ZeroGuardCallback


if TYPE_CHECKING:
    import datasets


class SparseTrainer(Trainer):
    """A `transformers.Trainer` for pruned models: it prunes if asked, keeps every zero, and logs the sparsity.

    If the arguments set `sparsity` or `pattern`, the model is pruned when training begins, or step by step by
    `pruning_schedule` (see `PruningCallback`). During training every zero of the model is kept, also in weights that
    are trained directly and in layers that are not pruned in this run (see `ZeroGuardCallback`). The zeros of trained
    weights are checked at each log, and all zeros before each save and at the end of training. Each log of the
    training contains `sparsity`, the fraction of zeros in the prunable weights: those of the base, or where adapters
    are merged, the merged ones. The metrics of evaluations and predictions contain it as `eval_sparsity` and
    `test_sparsity`, so that `metric_for_best_model="sparsity"` can be used. A pruning is an entry of
    `state.log_history`, with its sparsity as `pruning`. After `trainer.remove_callback(ZeroGuardCallback)` no zero is
    kept or checked, and training logs no sparsity.

    At its end, `train` writes `report.json` and `report.html` into `output_dir`, unless
    `trainer.remove_callback(RunReportCallback)` was called, or files of the user have these names. Prunings are handed
    on to the loggers of `report_to`.

    If the arguments set `retraining_schedule`, the learning rates are those of the function `retraining_schedule`. The
    original schedule η is the one that `learning_rate`, `lr_scheduler_type` and the warm-up describe, over
    `original_steps`.

    If the arguments set `recovery="none"`, `train` prunes the model and returns.

    If the arguments set `find_learning_rate`, short trials find the learning rate when training begins, and are
    undone. The rate replaces `args.learning_rate`, and is an entry of `state.log_history` as `found_learning_rate`.

    If the arguments set `recovery="reconstruct"`, training is a call of `reconstruct` on the first
    `calibration_samples` samples of the training set. Optimiser, learning rate schedule, epochs or `max_steps` (of
    each region), batch size, gradient accumulation, gradient clipping, bf16, seed and logging are those of the
    arguments. Callbacks receive the events `on_train_begin`, `on_step_end`, `on_log`, `on_evaluate` and
    `on_train_end`. The model is evaluated after every `eval_steps` steps with `eval_strategy="steps"`, and after each
    region (with regions of one matrix: after each block) with `eval_strategy="epoch"`. Regions that are not reached
    yet are dense then. For evaluations the model must be on the training device. Without them it stays on its device,
    and only the blocks that are fitted move to the training device. Finished regions are saved in
    `output_dir/reconstruction`, unless `save_strategy="no"`; `train(resume_from_checkpoint=True)` continues from them.

    If the arguments set `recovery="reconstruct,retrain"`, `train` does one after the other, and callbacks receive the
    events of two trainings. All parameters of a region are fitted. Then the adapter of `peft_config` is attached to
    the reconstructed model and retrained, or without `peft_config` all weights. The arguments `reconstruction_...` are
    those of the first half. `train(resume_from_checkpoint=True)` continues where the run was stopped, in either half.

    If the arguments set `recalibrate_norms`, the running statistics of BatchNorms are measured anew after each
    pruning, after reconstruction, and after retraining with the adapters merged, so that the merged model has them.
    The attribute `norms_report` tells what was measured last. Checkpoints that are written during training have the
    statistics of the training.

    If the arguments set `distillation`, the training loss is (1 - α) · L_task + α · L_distillation with
    α = `distillation_weight`. Both losses are means over the predictions that have a label. L_distillation is
    T² · KL(p_t ‖ p_s) of the teacher's and the model's probabilities at temperature T = `distillation_temperature`, or
    the relative squared error of the hidden states, as a mean over the blocks. The evaluation loss is the task loss.

    Args:
        model: the model to train, as in `Trainer`.
        args: the training arguments, a `SparseTrainingArguments`. Default: `SparseTrainingArguments()`.
        data_collator: forms a batch from a list of samples, as in `Trainer`.
        train_dataset: the training set, as in `Trainer`. Its first samples are also the calibration data, if there is
            no `calibration_dataset`.
        eval_dataset: the evaluation set, or a dict of several, as in `Trainer`.
        processing_class: the tokeniser or processor, which is saved with the model, as in `Trainer`.
        model_init: a function that returns a new model for each call of `train`, as in `Trainer`. Each model is
            pruned, and gets its own adapter if `peft_config` is given.
        compute_loss_func: computes the task loss from outputs, labels and the number of items, as in `Trainer`.
        compute_metrics: computes metrics at evaluation, as in `Trainer`.
        callbacks: further callbacks, as in `Trainer`.
        optimizers: an optimiser and a learning rate schedule, as in `Trainer`.
        optimizer_cls_and_kwargs: an optimiser class and its arguments, as in `Trainer`.
        preprocess_logits_for_metrics: applied to the logits at evaluation, as in `Trainer`.
        peft_config: the configuration of an adapter, such as `MaskLoRAConfig(target_modules="all-linear")`. For
            retraining, the trainer attaches it to the model with `peft.get_peft_model`, as TRL's trainers do. For
            reconstruction alone, it is the tuner that fits each region, and is merged afterwards. None trains the
            model as it is; reconstruction then trains all parameters of a region.
        teacher: the dense model for `distillation`, of any dtype, with the same tokeniser. It is moved to the training
            device, unless it was loaded across several devices. It is neither trained nor saved. By default the
            trainer copies the model, without adapters, before it prunes. The copy takes as much memory as the model.
            For reconstruction it is the model before it was pruned, and gives the targets: `model` has been pruned
            already, and nothing more is pruned. By default the model is pruned region by region. If `distillation` is
            set and the model is still dense, the teacher serves the distillation alone.
        calibration_dataset: the data set whose first `calibration_samples` samples calibration and reconstruction use.
            Default: `train_dataset`.

    Raises:
        TypeError: `args` is not a `SparseTrainingArguments`.
        ValueError: the model has adapters already, and `peft_config` or a reconstruction is asked for; calibration is
            needed, and its data set is missing or has fewer samples than `calibration_samples`; distillation or
            reconstruction has no dense model, or one that does not fit; a `teacher` is given, and neither distillation
            nor reconstruction; `optimizers` are given for a reconstruction; distillation runs with several GPUs in one
            process; the training is parallel by FSDP1; `find_learning_rate` is set, and a learning rate schedule is
            given, or the training is parallel by FSDP or DeepSpeed; `recalibrate_norms` is set, and the model has no
            BatchNorm, or the training is parallel by FSDP or DeepSpeed.
    """

    args: SparseTrainingArguments
    # None while `Trainer.__init__` calls `model_init`: the model that it makes there is not trained, and not pruned.
    _pruning: PruningCallback | None = None
    # The model that reconstruction has made and retraining continues with.
    _made_by_chain: nn.Module | None = None
    # The model whose reconstruction was stopped after some of its regions.
    _half_done: weakref.ref[nn.Module] | None = None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: SparseTrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: "Dataset | IterableDataset | datasets.Dataset | None" = None,
        eval_dataset: "Dataset | dict[str, Dataset] | datasets.Dataset | None" = None,
        processing_class: (
            PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin | None
        ) = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        peft_config: PeftConfig | None = None,
        teacher: nn.Module | None = None,
        calibration_dataset: "Dataset | IterableDataset | datasets.Dataset | None" = None,
    ) -> None:
        args = SparseTrainingArguments() if args is None else args
        if not isinstance(args, SparseTrainingArguments):
            raise TypeError(
                f"Expected `args` as SparseTrainingArguments, got {type(args).__name__}. SparseTrainingArguments has "
                "every argument of TrainingArguments."
            )
        check_asked(args, model, optimizers)
        self.peft_config = peft_config
        self.calibration_dataset = calibration_dataset
        # `_attach` reads the arguments before `Trainer.__init__` sets them.
        self.args = args
        if model is not None and not args.reconstructs:
            model = self._attach(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if getattr(getattr(self.accelerator.state, "fsdp_plugin", None), "fsdp_version", None) == 1:
            raise ValueError(FSDP1)
        self.reconstruction_report: ReconstructionReport | None = None
        self._asked = args.pruning_options()
        self._recalibration = Recalibration(self) if args.recalibrate_norms else None
        if args.pruning_pattern() is not None and not args.reconstructs:
            calibration = first_samples(self, 1) if self._measures() else None
            self._pruning = PruningCallback(calibration=calibration, schedule=args.pruning_times(), **self._asked)
            self._pruning.after_pruning = self._recalibration
            self.add_callback(self._pruning)
        self._add_callbacks()
        self.teacher = find_teacher(self, teacher)
        self._distilling = Distilling(self)
        self._teacher_is_given = teacher is not None
        # The optimiser that an earlier training made.
        self._made: Any = None

    def _add_callbacks(self) -> None:
        args = self.args
        own: list[TrainerCallback] = [ZeroGuardCallback(args.target_modules, args.exclude_modules)]
        own += [TerminationCallback()] if args.save_on_sigterm else []
        # After the zero guard, which has its hooks then.
        own += [RateSearch(self)] if args.find_learning_rate else []
        own += [PruningLog(self.callback_handler), RunReportCallback()]
        for callback in own:
            # The user may have given it.
            if not self._has(type(callback)):
                self.add_callback(callback)

    def _attach(self, model: nn.Module) -> nn.Module:
        """Return `model` with the adapter of `peft_config`, if retraining is to have one."""
        if self.peft_config is None:
            return model
        if has_adapters(model):
            raise ValueError(
                "`peft_config` attaches an adapter, and the model has adapters already. Leave `peft_config` out, or "
                "pass the model without adapters."
            )
        # The initial adapter is the same in every process and in every run.
        set_seed(self.args.seed)
        # PEFT writes the names of the adapted layers into the configuration, which may serve another model too.
        adapted: nn.Module = get_peft_model(cast(PreTrainedModel, model), copy.deepcopy(self.peft_config))
        return adapted

    def _measures(self) -> bool:
        """Return whether pruning needs calibration."""
        options = self._asked
        beside = options["allocation"] or options["refinement"] or options["update"]
        return bool(find_criterion(options["criterion"])[1].needs or beside)

    @property
    def pruning_report(self) -> PruningReport | None:
        """The report of the last pruning. None if nothing was pruned yet."""
        if self.reconstruction_report is not None:
            return self.reconstruction_report.pruning
        last = max(self._prunes(), key=lambda callback: callback.turn, default=None)
        return None if last is None else last.report

    @property
    def norms_report(self) -> NormsReport | None:
        """What `recalibrate_norms` measured last. None if nothing was measured."""
        return self._recalibration.report if self._recalibration else None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Prune the model if asked, and then train it, or reconstruct it.

        Args:
            resume_from_checkpoint: True continues from the last complete checkpoint in `output_dir`, and a path from
                that checkpoint. A warning names later checkpoints that are not complete. With
                `recovery="reconstruct"` it continues after the last finished region. With
                "reconstruct,retrain" the finished regions are loaded first, and then the checkpoint if there is one.
            trial: the trial of a hyperparameter search, as in `Trainer.train`.
            ignore_keys_for_eval: keys of the model's outputs that evaluation does not gather, as in `Trainer.train`.

        Returns:
            The number of optimiser steps, the mean training loss and the metrics.

        Raises:
            ValueError: before retraining, the arguments ask for another pruning than when the trainer was made; there
                is no sample or no parameter to train; `save_on_sigterm` is set in another thread than the main one; a
                trial or a callback that prunes or freezes is given for a reconstruction, or an earlier call has
                stopped in its middle; the checkpoint belongs to a model with other masks, to another sparsity, or is
                not complete. Pruning and reconstruction also raise the errors of `prune` and `reconstruct`.
            RuntimeError: a weight lost a zero, a callback stopped reconstruction before its last region, or
                `find_learning_rate` found no rate that lowers the loss.
        """
        reports = [each for each in self.callback_handler.callbacks if isinstance(each, RunReportCallback)]
        for report in reports:
            report.begin(bool(resume_from_checkpoint))
        output = self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        for report in reports if trial is None else ():
            report.write(self)
        return output

    def run_report(self) -> RunReport:
        """Return the report of the last run, which `train` has written. It can be completed and written again.

        For example, `write_report(dataclasses.replace(trainer.run_report(), stages=...), folder)`.
        """
        kept = [each for each in self.callback_handler.callbacks if isinstance(each, RunReportCallback)]
        return (kept[0] if kept else RunReportCallback()).report(self)

    def _train(
        self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        if self.args.recovery != "retrain":
            check_callbacks(self, self._pruning)
        if self.args.recovery == "none":
            return self._only_prune()
        if self.args.reconstructs:
            if trial is not None:
                raise ValueError(
                    f'`hyperparameter_search` does not support `recovery="{self.args.recovery}"`. Make one '
                    "SparseTrainer for each trial, and call the search library directly."
                )
            resume_regions, checkpoint = resume_from_checkpoint, None
            if self.args.retrains:
                check_data(self)
                resume_regions, checkpoint = where_to_resume(self.args, resume_from_checkpoint)
            output = self._reconstruct(resume_regions, ignore_keys_for_eval)
            self._recalibrate()
            if not self.args.retrains:
                return output
            self._go_on_to_retraining(output)
            resume_from_checkpoint = checkpoint
        resume_from_checkpoint = checkpoint_to_resume(self.args, resume_from_checkpoint)
        if self._has(TerminationCallback):
            check_thread()
        check_added_adapters(self.model, self.args.save_strategy != "no")
        check_data(self)
        check_unmerged(self.model)
        trainer: Any = self
        if self._made is not None and trainer.optimizer is self._made:
            # `Trainer` would go on with its momenta.
            trainer.optimizer = None
        check_trained(self)
        if self.model_init is None:
            self._prune_first(self.model)
        makes = trainer.optimizer is None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        try:
            with without_noise(self):
                output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            # Callbacks after the guard may have changed weights at the end of training.
            self._guard().check()
            self._recalibrate()
            remember(self.model, retraining=what_was_trained(self, output))
            return output
        finally:
            self._made = trainer.optimizer if makes else None
            # `Trainer` leaves this after an error.
            self.is_in_train = False

    def _recalibrate(self) -> None:
        if self._recalibration is not None:
            self._recalibration(self.model)

    def _renew_model(self) -> None:
        """Make a new model by `model_init`, if there is one, as `Trainer.train` does before it trains."""
        if self.model_init is not None:
            self._made_by_chain = None
            self.model = self.callback_handler.model = self.call_model_init()

    def _only_prune(self) -> TrainOutput:
        self._renew_model()
        self._prune_first(self.model)
        assert self.pruning_report is not None
        return TrainOutput(0, 0.0, {"train_runtime": self.pruning_report.seconds})

    def _reconstruct(self, resume: str | bool | None, ignore_keys: list[str] | None) -> TrainOutput:
        self._renew_model()
        if has_adapters(self.model):
            raise ValueError(
                "This SparseTrainer has reconstructed its model and attached an adapter already. Make a new "
                "SparseTrainer with a dense model, or give `model_init`. To train the adapter further, make a "
                'SparseTrainer with this model and `recovery="retrain"`.'
            )
        dense = self.teacher if self._teacher_is_given else None
        if dense is None and self._half_done is not None and self._half_done() is self.model:
            raise ValueError(
                "An earlier call of `train` was stopped in the middle of the reconstruction, so that this model is no "
                "longer dense and gives no targets. Make a new SparseTrainer with the dense model, and continue by "
                "`train(resume_from_checkpoint=True)`."
            )
        run = ReconstructionRun(self, dense, resume, ignore_keys)
        try:
            with as_before(self.model), self._released():
                self.reconstruction_report, output = run()
        except BaseException:
            self._half_done = weakref.ref(self.model) if run.regions else None
            raise
        return output

    def _go_on_to_retraining(self, output: TrainOutput) -> None:
        """Attach the adapter to the reconstructed model, and put the result where `Trainer` expects its model."""
        assert self.reconstruction_report is not None
        self.remove_callback(AfterReconstruction)
        fingerprint = fingerprint_of_model(self.model)
        seconds = self.reconstruction_report.seconds
        self.add_callback(AfterReconstruction(fingerprint, seconds, output.global_step))
        self.model = self._attach(self.model)
        if self.place_model_on_device:
            super()._move_model_to_device(self.model, self.args.device)
        self.model_wrapped = self.callback_handler.model = self._made_by_chain = self.model

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        for callback in self._prunes():
            callback.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.args.find_learning_rate and resume_from_checkpoint:
            self.args.learning_rate = recorded_rate(resume_from_checkpoint) or self.args.learning_rate
        # Here and not in `train`, because `auto_find_batch_size` calls this again after an error.
        with as_before(self.model), self._released():
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_adapters(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # `Trainer` would look for a whole model, or for the adapter "default", after all of the training.
        best = self.state.best_model_checkpoint
        if best is None or not self._load_adapters(self.model, best):
            super()._load_best_model()

    def _load_adapters(self, model: nn.Module, checkpoint: str) -> bool:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return load_added_adapter(model, Path(checkpoint))
        return load_added_adapter(model, Path(checkpoint)) or load_adapters(model, Path(checkpoint))

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        """Undo, after the context, what callbacks of this package changed for a run."""
        try:
            yield
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, (FreezingCallback, TerminationCallback, ZeroGuardCallback)):
                    callback.release()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model from `model_init`, with the adapter of `peft_config`, and pruned if asked."""
        if self._made_by_chain is not None:
            # `Trainer` asks again when retraining begins, for the model that was just reconstructed.
            return self._made_by_chain
        model = super().call_model_init(trial)
        if not self.args.reconstructs:
            model = self._attach(model)
        self._prune_first(model)
        return model

    def _prune_first(self, model: nn.Module) -> None:
        # A resumed run prunes before it loads the checkpoint, so that it measures with the biases of the first run.
        if self._pruning and self._pruning.schedule is None and not self._pruning.has_pruned(model):
            self._pruning.prune(model, self.args.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        trainer: Any = self
        self._check_unchanged()
        method = self.args.retraining_schedule
        if method is not None and trainer.lr_scheduler is None:
            rounds = self.args.pruning_rounds if self.args.pruning_schedule == "cycles" else None
            drop: Any = None
            if method == "allr" and self._pruning and (rounds or self._pruning.norms):
                drop = self._pruning.norm_drop if rounds else norm_drop(*self._pruning.norms)
            trainer.lr_scheduler = retraining_schedule(
                method,
                optimizer or trainer.optimizer,
                self.args.original_rates(num_training_steps),
                num_training_steps,
                norm_drop=drop,
                rounds=rounds or 1,
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
        """Return the loss of `Trainer`. In training it is combined with the loss of `distillation`."""
        compute = super().compute_loss
        if self.args.distillation is None or self.teacher is None or not model.training:
            return compute(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self._distilling.loss(compute, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradient of a batch as `Trainer` does.

        Raises:
            ValueError: a subclass has another `compute_loss`, which leaves out the `distillation` that is set.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.args.distillation is not None:
            self._distilling.check_used()
        return loss

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self.args.reconstructs:
            super()._move_model_to_device(model, device)

    def _check_unchanged(self) -> None:
        for name, value in self.args.pruning_options().items():
            if value != self._asked[name]:
                raise ValueError(
                    f"The arguments now have `{name}={value}`, and had `{name}={self._asked[name]}` when this "
                    "SparseTrainer was made. It prunes by the latter. Make a new SparseTrainer. To search over "
                    "pruning arguments, call `prune` in `model_init`."
                )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        guard = self._guard()
        if guard.weights:
            guard.check(trained_only=True)
            # The metrics of an evaluation have theirs already, under a name with a prefix.
            if not any(name.endswith("_sparsity") for name in logs):
                logs["sparsity"] = round(guard.sparsity(), 6)
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate or predict as `Trainer` does. The metrics also hold `<metric_key_prefix>_sparsity`."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        share = self._sparsity_now()
        if share is not None:
            assert output.metrics is not None
            output.metrics[f"{metric_key_prefix}_sparsity"] = round(share, 6)
        return output

    def _sparsity_now(self) -> float | None:
        """Return the sparsity of the model. None if it has no prunable weights, or they cannot be read."""
        if self.is_in_train and self._guard().weights:
            # It has counted the zeros of quantised weights already, which takes long.
            return self._guard().sparsity()
        try:
            return sparsity(self.model, self.args.target_modules, self.args.exclude_modules)
        except ValueError:
            return None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._guard().check()
        super().save_model(output_dir, _internal_call)
        if output_dir is not None and _internal_call:
            # Before `Trainer` deletes older checkpoints.
            for callback in self._prunes():
                callback.save_base(Path(output_dir), self.model, self.args, self.state)

    def save_merged_model(self, output_dir: str) -> None:
        """Save the model with its adapters merged, as a plain model for `from_pretrained`, with a model card.

        The adapters may have been attached in any of PEFT's or Transformers' ways. The trained model does not change.
        With several processes, call this in each of them: the weights are gathered from all processes, and one process
        writes. A head that was tied to the embedding, and that an adapter or `modules_to_save` has changed, is saved
        untied. A model without `save_pretrained` is saved as the state dict `model.safetensors`.

        Args:
            output_dir: the folder to write to.

        Raises:
            TypeError: the model has adapters that cannot be merged, see `merged_state_dict`.
            ValueError: the folder holds an adapter; merging an adapter of another method would fill zeros; or the
                model's family cannot load its head untied from the embedding. Nothing is written.
            RuntimeError: a weight lost a zero.
        """
        self._save_plain(output_dir, merge=True)

    def save_base_model(self, output_dir: str) -> None:
        """Save the base model without its adapters, for `from_pretrained`. The saved adapters are loaded onto it.

        The trained model does not change. With several processes, call this in each of them: the weights are gathered
        from all processes, and one process writes. Adapters that are merged are left out too.

        Args:
            output_dir: the folder to write to.

        Raises:
            TypeError: the base weights cannot be saved in this way, see `merged_state_dict`.
            ValueError: the folder holds an adapter. Nothing is written.
            RuntimeError: a weight lost a zero.
        """
        self._save_plain(output_dir, merge=False)

    def _save_plain(self, output_dir: str, merge: bool) -> None:
        self._guard().check()
        beside = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        save_plain_model(
            self.model,
            output_dir,
            merge=merge,
            write=self.args.should_save,
            sparsity=sparsity(self.model, self.args.target_modules, self.args.exclude_modules),
            targets=(self.args.target_modules, self.args.exclude_modules),
            processors=() if beside is None else (beside,),
        )
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a model card, as `Trainer` does. It tells how adapters are loaded, or how sparse a plain model is.

        Args:
            args, kwargs: as in `Trainer.create_model_card`.
        """
        before = card_in(str(self.args.output_dir))
        super().create_model_card(*args, **kwargs)
        adapted = has_adapters(self.model)
        # One process writes the card, and cannot gather weights that are sharded.
        if not adapted and self.is_world_process_zero() and not has_shards(self.model):
            targets = (self.args.target_modules, self.args.exclude_modules)
            facts = facts_of_model(self.model, str(self.args.output_dir), targets=targets, repo_id=repo_of(self))
            complete_card(str(self.args.output_dir), facts, before=before)

    def _has(self, kind: type[TrainerCallback]) -> bool:
        return any(isinstance(callback, kind) for callback in self.callback_handler.callbacks)

    def _prunes(self) -> list[PruningCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, PruningCallback)]

    def _guard(self) -> ZeroGuardCallback:
        # Not an attribute, because resuming may replace the callback by one restored from the checkpoint. If the user
        # has removed it, a guard that remembers nothing takes its place.
        guards = [c for c in self.callback_handler.callbacks if isinstance(c, ZeroGuardCallback)]
        return guards[0] if guards else ZeroGuardCallback()
