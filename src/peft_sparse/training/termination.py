"""SIGTERM during training: finish the step, save a checkpoint and stop."""

import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.processes import place, total_of


class TerminationCallback(TrainerCallback):
    """Saves a checkpoint and stops training after the step in which any process received SIGTERM.

    All processes stop after the same step. For this they add up one number in each step. The event `on_save` of other
    callbacks is called, as for any checkpoint. `enable_jit_checkpoint` of transformers does not make the processes
    agree on the step, and does not call `on_save`.

    While training runs, SIGTERM does not end the process, and a second SIGTERM has no effect. The previous handler is
    restored when training ends without an error.
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
