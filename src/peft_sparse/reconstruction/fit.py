"""How a region is fitted: what is trained, by which loss and optimiser, on which batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_linear_schedule_with_warmup


Loss = Literal["mse", "relative_mse", "cosine"]
Tuner: TypeAlias = Literal["full"] | PeftConfig


@dataclass(frozen=True)
class Fit:
    """How `reconstruct` fits a region f with kept weights θ and mask M to its targets t.

        min over θ of loss(f(x; θ, M), t), with x the calibration inputs of the region

    Each region is trained on its own, in float32, with the model's dropout off. A step adds up the gradients of
    `gradient_accumulation_steps` batches. Tokens that `attention_mask` marks as padding are not counted. If the error
    on the held-out batches is higher after training, or not finite, the region gets back the weights that it had
    before training.

    Zimmer et al. 2023, arXiv:2312.15230, section 3.3 (PERP). "A Free Lunch in LLM Compression", 2025,
    arXiv:2510.14444.

    Args:
        tuner: what is trained. "full" trains all parameters of the region and holds its pruned entries at zero. A PEFT
            configuration trains adapters of that kind and merges them into the weights when the region is finished;
            it must be of a tuner that keeps zeros, such as `MaskLoRAConfig` or `ScaledLoRAConfig`. Its `train_norms`
            and `bias` also train the norms and biases of the region in place.
        loss: "mse": mean of (f(x) - t)² over tokens and features. "relative_mse": Σ (f(x) - t)² / Σ t². "cosine":
            mean over tokens of 1 - cos(f(x), t).
        learning_rate: peak learning rate of the default optimiser and schedule. It is not used if `optimizer` is
            given.
        epochs: passes over the training batches for each region, above 0; fractions are allowed. It is not used if
            `max_steps` is given.
        max_steps: optimiser steps for each region; 0 prunes without training.
        gradient_accumulation_steps: batches for each optimiser step.
        max_grad_norm: the norm of the gradients is clipped to this value; None or 0 does not clip.
        optimizer: function parameters -> optimizer. None is AdamW without weight decay.
        scheduler: function (optimizer, steps) -> learning-rate scheduler. None is a linear warm-up over the first 10 %
            of the steps, and then a linear decay to 0.
        autocast: dtype of mixed precision in the forward pass, such as `torch.bfloat16`; None computes in float32.
        holdout: fraction of the batches, in [0, 1), that are held out: the last ones. They are not trained on, and
            errors are measured on them. The number of held-out batches is rounded up, but at least one batch is
            trained on. If none is held out, errors are measured on the training batches.
        seed: decides the order of the batches, the initial values of adapters, dropout of adapters, and the scores of
            the criterion "random". Each region has its own seed, computed from this one and the region's number.

    Raises:
        TypeError: `tuner` is neither "full" nor the configuration of a PEFT tuner.
        ValueError: the loss is unknown; a number is out of its range; `tuner` sets `train_head`, `modules_to_save` or
            `target_parameters`.
    """

    tuner: Tuner = "full"
    loss: Loss = "mse"
    learning_rate: float = 1e-4
    epochs: float = 1
    max_steps: int | None = None
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    scheduler: Callable[[torch.optim.Optimizer, int], LRScheduler] | None = None
    autocast: torch.dtype | None = None
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"`loss` must be one of {', '.join(map(repr, get_args(Loss)))}, got {self.loss!r}.")
        for name, accepted, wanted in (
            ("holdout", 0 <= self.holdout < 1, "in [0, 1)"),
            ("epochs", self.epochs > 0, "above 0"),
            ("max_steps", self.max_steps is None or self.max_steps >= 0, "None or at least 0"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
        ):
            if not accepted:
                raise ValueError(f"`{name}` must be {wanted}, got {getattr(self, name)!r}.")
        _check_tuner(self.tuner)

    def steps(self, batches: int) -> int:
        """Return how many optimiser steps a region takes if it has `batches` training batches."""
        if self.max_steps is not None:
            return self.max_steps
        # Parts of an epoch round up, as in `Trainer`.
        return max(1, math.ceil(self.epochs * -(-batches // self.gradient_accumulation_steps)))

    def split(self, batches: int) -> tuple[list[int], list[int]]:
        """Return the numbers of the batches to train on, and the numbers of the batches to measure errors on."""
        # Rounded first, because 0.14 * 50 is 7.000000000000001 in floating point.
        held = min(math.ceil(round(self.holdout * batches, 6)), batches - 1)
        train, held_out = range(batches - held), range(batches - held, batches)
        return list(train), list(held_out or train)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of `parameters`."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=0.0, fused=True)

    def make_scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """Return the learning-rate scheduler of a run of `steps` steps."""
        if self.scheduler is not None:
            return self.scheduler(optimizer, steps)
        return get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)

    def seed_of(self, number: int) -> int:
        """Return the seed of region `number`. It does not depend on the random numbers of other regions."""
        return self.seed * 1_000_003 + number


def _check_tuner(tuner: Any) -> None:
    """Raise unless `tuner` is "full" or a PEFT configuration that can be attached to a region."""
    if tuner == "full":
        return
    kind = PEFT_TYPE_TO_TUNER_MAPPING.get(tuner.peft_type) if isinstance(tuner, PeftConfig) else None
    if kind is None or not issubclass(kind, BaseTuner):
        raise TypeError(
            f'`tuner` must be "full" or the configuration of a PEFT tuner such as MaskLoRAConfig, got {tuner!r}.'
        )
    parts = ("modules_to_save", "target_parameters", "trainable_token_indices")
    for name, none in (("train_head", "none"), *((part, None) for part in parts)):
        value = getattr(tuner, name, none)
        if value not in (none, None, []):
            raise ValueError(
                f"`{name}={value!r}` trains parameters that belong to no region. Leave it out of the configuration. "
                "`train_norms` and `bias` can be used."
            )
