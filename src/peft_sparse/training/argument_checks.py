"""Checks the arguments of `SparseTrainer`: each value, and the values that contradict each other."""

from typing import TYPE_CHECKING, Any

from transformers.training_args import OptimizerNames

from ..calibration.activations import check_activations
from ..pruning.patterns import GROUPS, SemiStructured
from ..reconstruction import Fit
from ..reconstruction.checks import check_choices
from .distillation import DISTILLATIONS
from .learning_rates import check_method


if TYPE_CHECKING:
    from .arguments import SparseTrainingArguments


def check_arguments(args: "SparseTrainingArguments") -> None:
    """Check the arguments, except the schedule of prunings, which `pruning_times` checks.

    Raises:
        ValueError: a value is unknown or out of its range, or two arguments contradict each other.
    """
    _check_termination(args)
    _check_group(args)
    if args.calibration_samples < 1:
        raise ValueError(f"`calibration_samples` must be at least 1, got {args.calibration_samples}.")
    args.pruning_options()
    _check_reconstruction(args)
    _check_retraining(args)
    _check_distillation(args)
    _check_rate_search(args)


def _check_termination(args: "SparseTrainingArguments") -> None:
    if args.save_on_sigterm and args.enable_jit_checkpoint:
        raise ValueError(
            "`save_on_sigterm` and `enable_jit_checkpoint` both handle SIGTERM. Set one of them. With several "
            "processes set `save_on_sigterm`, because otherwise the processes may save at different steps."
        )
    if args.save_on_sigterm and args.reconstructs:
        raise ValueError(
            "Reconstruction saves each region when it is finished, and can be resumed with "
            "`resume_from_checkpoint=True` after any interruption. Leave `save_on_sigterm` out."
        )


def _check_group(args: "SparseTrainingArguments") -> None:
    if args.group is not None and args.group not in GROUPS:
        raise ValueError(f"`group` must be one of {', '.join(map(repr, GROUPS))}, got {args.group!r}.")
    pattern = args.pruning_pattern()
    if args.group is not None and isinstance(pattern, SemiStructured):
        raise ValueError(
            f"The pattern {pattern} compares within each {pattern.m} inputs, and takes no other group. Remove "
            f"`group={args.group!r}`."
        )


def _check_reconstruction(args: "SparseTrainingArguments") -> None:
    if not args.reconstructs:
        return
    loss: Any = args.reconstruction_loss
    # Without a pattern the model was pruned before, and the trainer gets the dense model.
    no_pattern = args.pruning_pattern() is None
    if args.reconstruction_batch_size is not None and args.reconstruction_batch_size < 1:
        raise ValueError(
            f"`reconstruction_batch_size` must be at least 1, got {args.reconstruction_batch_size}. Leave it out "
            "to use `per_device_train_batch_size`."
        )
    check_choices(
        args.region_size(),
        args.reconstruction_mode,
        Fit(loss=loss, holdout=args.reconstruction_holdout, **args.length_of_regions()),
        no_pattern=no_pattern,
        no_dense=not no_pattern,
    )
    check_activations(args.activations)
    if not args.retrains and (args.load_best_model_at_end or args.save_strategy == "best"):
        raise ValueError(
            '`load_best_model_at_end` and `save_strategy="best"` keep the best of several whole models, and a '
            "model is whole only after the last region of a reconstruction. Leave them out. A region whose error "
            "on the held-out batches (`reconstruction_holdout`) got worse is undone in any case."
        )
    if args.fp16:
        raise ValueError("Reconstruction does not scale the loss, and `fp16` needs that. Use `bf16=True`.")


def _check_retraining(args: "SparseTrainingArguments") -> None:
    if args.retraining_schedule is None:
        return
    check_method(args.retraining_schedule)
    if not args.retrains:
        raise ValueError(
            f"`retraining_schedule={args.retraining_schedule!r}` is a schedule for training with the task loss, "
            f'and `recovery="{args.recovery}"` has none. Leave it out, or set `recovery="retrain"`.'
        )
    if args.retraining_schedule == "allr" and args.reconstructs:
        raise ValueError(
            '`retraining_schedule="allr"` depends on how much pruning changed the norm of the weights, and '
            'reconstruction changes it too. Use another schedule, such as "llr".'
        )
    if args.retraining_schedule in ("lrw", "allr") and not args.original_steps:
        raise ValueError(
            f"`retraining_schedule={args.retraining_schedule!r}` depends on the number of steps of the original "
            "training. Set `original_steps`."
        )


def _check_distillation(args: "SparseTrainingArguments") -> None:
    if args.distillation is None:
        return
    if args.distillation not in DISTILLATIONS:
        known = ", ".join(map(repr, DISTILLATIONS))
        raise ValueError(f"`distillation` must be one of {known}, got {args.distillation!r}.")
    if not 0 < args.distillation_weight <= 1 or args.distillation_temperature <= 0:
        raise ValueError(
            "`distillation_weight` must be in (0, 1] and `distillation_temperature` above 0, got "
            f"{args.distillation_weight} and {args.distillation_temperature}. To train with the task loss alone, "
            "leave `distillation` out."
        )
    if not args.retrains:
        raise ValueError(
            f'`distillation` is a loss of retraining, and `recovery="{args.recovery}"` has none. Reconstruction '
            "fits the outputs of the dense model already, region by region. Leave `distillation` out, or set "
            '`recovery="retrain"` or `recovery="reconstruct,retrain"`.'
        )
    if args.use_liger_kernel and args.distillation == "logits":
        raise ValueError(
            'With `use_liger_kernel` the model returns no logits during training, and distillation="logits" '
            'needs them. Set `use_liger_kernel=False`, or distillation="hidden_states".'
        )


def _check_rate_search(args: "SparseTrainingArguments") -> None:
    if not args.find_learning_rate:
        return
    if not args.retrains or args.retraining_schedule or args.pruning_schedule:
        raise ValueError(
            "`find_learning_rate` finds one rate for a training with the task loss that begins at the pruned "
            "model. Leave it out without retraining, with `retraining_schedule`, whose rates are those "
            "of the original training, and with `pruning_schedule`, which prunes further during training."
        )
    optim = OptimizerNames(args.optim).value
    if "lomo" in optim or "layerwise" in optim:
        raise ValueError(
            f"`optim={optim!r}` updates the weights during backward, where `find_learning_rate` cannot "
            'set the rate. Choose another optimiser, such as "adamw_torch", or set `find_learning_rate=False`.'
        )
