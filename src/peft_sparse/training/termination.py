"""Saving when the machine is taken away: SIGTERM ends training after the step, with a checkpoint."""

import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.processes import place, total_of


class TerminationCallback(TrainerCallback):
    """Saves a checkpoint and stops when the step is done in which SIGTERM came, to whichever process.

    Unlike `enable_jit_checkpoint` of transformers, all processes agree on the step, at the price of adding up one
    number per step, and callbacks hear of the save. While training, SIGTERM does nothing else; a second one neither.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._asked = False
        self._before = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        asked = self._asked
        if place()[1] > 1:
            asked = bool(total_of(torch.tensor(int(asked))))
        if asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
