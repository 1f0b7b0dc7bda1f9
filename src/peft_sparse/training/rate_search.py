"""Finds the learning rate of a training by short trials on the trainer's own model, and undoes them."""

import contextlib
import copy
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..calibration.inputs import evaluation_mode
from ..model.processes import exchange
from .endings import same_random_numbers
from .zero_guard import ZeroGuardCallback


logger = logging.getLogger(__name__)

# The name of the rate in the log history.
FOUND = "found_learning_rate"
# The optimiser steps of a trial, and the batches on which its loss is measured.
STEPS, HELD_OUT = 5, 8
# The first rates are this factor apart. The search ends with rates that are its square root apart.
FACTOR = 4.0
# How many factors of 2 a rate that improves the model, and the result, may be away from the first rate.
REACH, FARTHEST = 14, 28


def best_rate(loss_at: Callable[[float], float], start: float, untrained: float) -> float:
    """Return the rate of lowest loss, by few calls of `loss_at`.

    From `start` the search goes by factors of 4 to lower losses, until both neighbours of the best rate are worse.
    Then it tries the two rates between, by factors of 2. The result is the lowest point of the parabola through the
    best rate and its two neighbours, in the logarithm of the rate.

    Args:
        loss_at: the loss after a trial at a rate. It may be infinite or NaN.
        start: the first rate.
        untrained: the loss without a trial. The search goes on from the nearest rate that gets below it.

    Raises:
        RuntimeError: no rate near `start` gets below `untrained`.
    """
    losses: dict[int, float] = {}

    def loss(i: int) -> float:
        """Return the loss at the rate `start` · √FACTOR^i."""
        if i not in losses:
            found = loss_at(start * math.sqrt(FACTOR) ** i) if abs(i) <= FARTHEST else math.inf
            losses[i] = found if math.isfinite(found) else math.inf
        return losses[i]

    # A rate that is too low changes nothing, and one that is too high destroys what was learnt.
    nearest = (sign * i for i in range(0, REACH + 1, 2) for sign in (-1, 1))
    first = next((i for i in nearest if loss(i) < untrained), None)
    if first is None:
        raise RuntimeError(
            f"No learning rate near {start:g} brought the loss on held-out batches below that of the untrained model, "
            f"{untrained:.4f}. Check the training data and the model, set a `learning_rate` that is nearer, or set "
            "`find_learning_rate=False`."
        )
    best: int = first
    while loss(best + 2) < loss(best):
        best += 2
    while loss(best - 2) < loss(best):
        best -= 2
    best = min(best, best - 1, best + 1, key=loss)
    below, here, above = loss(best - 1), loss(best), loss(best + 1)
    curvature = below - 2 * here + above
    # With an infinite neighbour the parabola is not known.
    shift = (below - above) / (2 * curvature) if 0 < curvature < math.inf else 0.0
    return float(start * math.sqrt(FACTOR) ** (best + shift))


def recorded_rate(checkpoint: str | Path) -> float | None:
    """Return the learning rate that the run of this checkpoint found. None if it did not search."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    if not path.is_file():
        return None
    history = json.loads(path.read_text())["log_history"]
    return next((entry[FOUND] for entry in history if FOUND in entry), None)


class RateSearch(TrainerCallback):
    """Finds the learning rate when training begins, and replaces `learning_rate` by it.

    A trial trains for 5 optimiser steps on the first batches of the training set, with a rate that falls linearly from
    that of the trial towards 0. Then the task loss on the next batches is measured, and everything is undone. See
    `best_rate` for the rates that are tried.

    Args:
        trainer: the trainer that calls this callback.

    Raises:
        ValueError: the trainer has a learning rate schedule already, or trains with FSDP or DeepSpeed. When training
            begins: the training set has fewer than two batches, or the optimiser has no `lr`.
        RuntimeError: when training begins, if no rate lowers the loss.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer
        if self.trainer.lr_scheduler is not None:
            raise ValueError(
                "`find_learning_rate` makes the schedule anew for the rate that it finds, and `optimizers` gives one. "
                "Pass `optimizers=(optimizer, None)` and set `lr_scheduler_type`, or set `find_learning_rate=False`."
            )
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise ValueError(
                "`find_learning_rate` undoes its trials, and cannot do so for what FSDP and DeepSpeed keep of the "
                "weights. Find the rate in one process or with DDP, where it is logged, and set it as `learning_rate`."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run has been given the rate of the first run, before its optimiser was made. A reconstruction
        # before the training is not in it.
        if state.global_step or not self.trainer.is_in_train:
            return
        trials = Trials(self.trainer)
        found = trials.search()
        set_rate(self.trainer, found)
        self.trainer.log({FOUND: found, "search_steps": STEPS * len(trials.losses)})


class Trials:
    """Short trainings from the same start on the same batches. Each is undone.

    Args:
        trainer: a trainer whose training has begun and has made no step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.losses: dict[float, float] = {}
        # The rate of each parameter group, as a multiple of the optimiser's own.
        self.ratios = [initial / own_rate(trainer.optimizer) for initial in initial_rates(trainer.optimizer)]

    def search(self) -> float:
        """Return the best rate of the optimiser.

        Raises:
            ValueError: the training set has fewer than two batches.
            RuntimeError: no rate lowers the loss.
        """
        optimizer = self.trainer.optimizer
        with same_random_numbers(), self._same_trainer(), undoing(self.trainer.model, optimizer) as undo:
            train, held_out = self._batches()
            untrained = self._loss(held_out)

            def loss_at(rate: float) -> float:
                try:
                    for step in range(STEPS):
                        self._step(train[step % len(train)], rate * (STEPS - step) / STEPS)
                    self.losses[rate] = self._loss(held_out)
                finally:
                    undo()
                return self.losses[rate]

            found = best_rate(loss_at, own_rate(optimizer), untrained)
        tried = ", ".join(f"{rate:.2g}: {loss:.4f}" for rate, loss in sorted(self.losses.items()))
        logger.info("Loss on held-out batches by learning rate: %s. Untrained: %.4f.", tried, untrained)
        return found

    def _batches(self) -> tuple[list[list[Any]], list[Any]]:
        """Return the batches of each step of a trial, and those on which its loss is measured."""
        size = self.trainer.args.gradient_accumulation_steps
        loader = self.trainer.get_train_dataloader()
        taken = list(itertools.islice(loader, STEPS * size + HELD_OUT))
        if hasattr(loader, "end"):
            # Accelerate believes that a loader which is not read to its end is still in use.
            loader.end()
        if len(taken) < 2:
            raise ValueError(
                f"`find_learning_rate` trains on some batches and measures the loss on others, and the training set "
                f"has {len(taken)} for each process. Pass a larger training set, or set `find_learning_rate=False`."
            )
        # A small training set gives at least half of its batches to training.
        count = min(HELD_OUT, len(taken) // 2)
        train, held_out = taken[:-count], taken[-count:]
        return [train[start : start + size] for start in range(0, len(train), size)], held_out

    def _step(self, batches: list[Any], rate: float) -> None:
        """Take one optimiser step as `Trainer` does."""
        trainer: Any = self.trainer
        model, optimizer, args = trainer.model_wrapped, trainer.optimizer, trainer.args
        for group, ratio in zip(optimizer.param_groups, self.ratios, strict=True):
            group["lr"] = rate * ratio
        batches, items = trainer.get_batch_samples(iter(batches), len(batches), args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        for inputs in batches:
            # `compute_loss` may take entries out of the dict.
            trainer.training_step(model, dict(inputs), items)
        if args.max_grad_norm > 0:
            trainer._clip_grad_norm(model)
        optimizer.step()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ZeroGuardCallback):
                callback.on_optimizer_step(args, trainer.state, trainer.control)
        model.zero_grad()

    def _loss(self, batches: list[Any]) -> float:
        """Return the mean task loss of the batches of all processes."""
        trainer, total = self.trainer, 0.0
        with torch.no_grad(), evaluation_mode(trainer.model_wrapped), trainer.compute_loss_context_manager():
            for inputs in batches:
                loss = trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(dict(inputs)))
                total += float(loss.mean())
        # Every process must choose the same rate.
        means = exchange(total / len(batches))
        return sum(means) / len(means)

    @contextlib.contextmanager
    def _same_trainer(self) -> Iterator[None]:
        """Put back, after the context, what a trial changes in the trainer and in Accelerate."""
        trainer: Any = self.trainer
        accelerator, gradients = trainer.accelerator, trainer.accelerator.gradient_state
        loaders, synchronised = list(accelerator._dataloaders), gradients.sync_gradients
        try:
            yield
        finally:
            accelerator._dataloaders[:] = loaders
            gradients._set_sync_gradients(synchronised)


@contextlib.contextmanager
def undoing(model: nn.Module, optimizer: Any) -> Iterator[Callable[[], None]]:
    """Return a function that puts back what training changes in `model` and `optimizer`. It also runs at the end.

    Copies are kept of the trained parameters, the buffers and the state of the optimiser.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    changing = (*(p for p in model.parameters() if id(p) in trained), *model.buffers())
    kept = [(tensor, tensor.detach().clone()) for tensor in changing]
    state = copy.deepcopy(optimizer.state_dict())
    scaler = getattr(optimizer, "scaler", None)
    scale = None if scaler is None else copy.deepcopy(scaler.state_dict())

    def undo() -> None:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.copy_(values)
        # The optimiser keeps the tensors that it loads, and its next step would change them.
        optimizer.load_state_dict(copy.deepcopy(state))
        if scaler is not None:
            scaler.load_state_dict(scale)

    try:
        yield undo
    finally:
        model.zero_grad()
        undo()


def own_rate(optimizer: Any) -> float:
    """Return the default `lr` of the optimiser.

    Raises:
        ValueError: it has none, or it is not above 0.
    """
    rate = float(optimizer.defaults.get("lr") or 0.0)
    if not rate > 0:
        raise ValueError(
            f"`find_learning_rate` begins its search at the default `lr` of the optimiser, which is "
            f"{optimizer.defaults.get('lr')}. Set a positive `learning_rate`, or pass an optimiser with a positive "
            "`lr`."
        )
    return rate


def initial_rates(optimizer: Any) -> list[float]:
    """Return the learning rate of each parameter group before the schedule changed it."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def set_rate(trainer: Any, rate: float) -> None:
    """Train at `rate`: in the arguments, in the optimiser and in a new schedule."""
    optimizer = trainer.optimizer
    factor = rate / own_rate(optimizer)
    for group, initial in zip(optimizer.param_groups, initial_rates(optimizer), strict=True):
        group["lr"] = group["initial_lr"] = initial * factor
    optimizer.defaults["lr"] = trainer.args.learning_rate = rate
    trainer.lr_scheduler = None
    trainer.create_scheduler(trainer.state.max_steps)
    trainer.callback_handler.lr_scheduler = trainer.lr_scheduler
