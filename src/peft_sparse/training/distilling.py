"""How `SparseTrainer` distils: its teacher, and the loss of a batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..calibration.inputs import evaluation_mode
from ..calibration.label_positions import label_offset
from ..model.blocks import base_model
from ..pruning.prune import sparsity
from .distillation import ADVICE, check_teacher, dense_copy, outputs_of, predictions, sum_of_losses


class Distilling:
    """Adds the loss of `distillation` to the task loss of a trainer.

    Args:
        trainer: the trainer, with its `teacher`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer
        self.used = False
        self._offset: int | None = None

    def loss(
        self, compute: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """Return (1 - α) · L_task + α · L_distillation of a batch, and the outputs of the model.

        Args:
            compute: `compute_loss` of `Trainer`, for the task loss.
            model: the model as it is trained.
            inputs: the batch.
            num_items: the number of labels by which the losses are divided. None: those of the batch.
        """
        self.used = True
        trainer, args = self.trainer, self.trainer.args
        name, weight = args.distillation, args.distillation_weight
        kept = predictions(inputs, partial(self._find_offset, compute, model, inputs, num_items))
        # The teacher runs first, so that its activations are freed before those of the model are kept for backward.
        with trainer.accelerator.autocast():
            taught = outputs_of(trainer.teacher, inputs, name)
        asked = {"output_hidden_states": True} if name == "hidden_states" else {}
        task_loss, outputs = compute(model, inputs | asked, True, num_items)
        total = sum_of_losses(name, outputs, taught, kept, args.distillation_temperature)
        if num_items is None:
            loss = total / kept.sum().clamp_min(1)
        else:
            # `num_items` counts the labels of all accumulated batches, and maybe of all processes, as for the task
            # loss.
            shared = trainer.accelerator.num_processes if args.average_tokens_across_devices else 1
            loss = total * shared / num_items
        return (1 - weight) * task_loss + weight * loss, outputs

    def check_used(self) -> None:
        """Check, after a batch was trained on, that its loss came from here.

        Raises:
            ValueError: a subclass of the trainer computes its loss without it.
        """
        if not self.used:
            raise ValueError(
                f"`distillation={self.trainer.args.distillation!r}` is a part of `SparseTrainer.compute_loss`, and "
                f"`{type(self.trainer).__name__}.compute_loss` does not call it. Call `super().compute_loss(...)` "
                "there, give the task loss as `compute_loss_func`, or leave `distillation` out."
            )

    def _find_offset(
        self, compute: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> int:
        """Return what `label_offset` finds for the loss of `Trainer`. It is tried on the first batch only."""
        if self._offset is None:
            # The task loss of this trainer, with label smoothing or `compute_loss_func` where they are given.
            task_loss = partial(compute, model, return_outputs=True, num_items_in_batch=num_items)
            name = type(base_model(model)).__name__
            with evaluation_mode(model), torch.random.fork_rng():
                self._offset = label_offset(task_loss, inputs, name, ADVICE)
        return self._offset


def find_teacher(trainer: Trainer, teacher: nn.Module | None) -> nn.Module | None:
    """Return the teacher of a trainer: the one that is given, or a copy of its dense model. None if it needs none.

    Args:
        trainer: the trainer.
        teacher: the argument `teacher` of `SparseTrainer`.

    Raises:
        ValueError: a teacher is missing, is not used, or does not fit.
    """
    own: Any = trainer
    args, model = own.args, own.model
    if args.reconstructs:
        if teacher is None and args.pruning_pattern() is None:
            raise ValueError(
                "Reconstruction needs a dense model. Set `sparsity` or `pattern`, so that the dense model is "
                "pruned region by region; or pass a pruned model, and the dense one as `teacher`."
            )
        if args.distillation is None:
            if teacher is not None:
                check_teacher(teacher, model, "logits")
            return teacher
    if args.distillation is None:
        if teacher is not None:
            raise ValueError(
                '`teacher` is given without `distillation`. Set distillation="logits" or "hidden_states", or '
                '`recovery="reconstruct"`.'
            )
        return None
    if args.n_gpu > 1:
        raise ValueError(
            f"Distillation needs one process per GPU, and this process has {args.n_gpu} GPUs. Start the script "
            "with `accelerate launch` or `torchrun`."
        )
    if teacher is None:
        if args.pruning_pattern() is None:
            raise ValueError(
                f"`distillation={args.distillation!r}` needs the dense model. Pass it as `teacher`, or set "
                "`sparsity` or `pattern`, so that SparseTrainer prunes the model and copies it before."
            )
        share = sparsity(model, args.target_modules, args.exclude_modules)
        teacher = dense_copy(model, share)
    check_teacher(teacher, model, args.distillation)
    # A teacher that was loaded across several devices stays there.
    return teacher if hasattr(teacher, "hf_device_map") else teacher.to(args.device)
