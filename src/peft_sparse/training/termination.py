"""SIGTERM during training: finish the step, save a checkpoint and stop."""

import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.processes import place, total_of


class TerminationCallback(TrainerCallback):
    """Saves a checkpoint and stops training after the step in which any process received SIGTERM.

    All processes stop after the same step. For this they add up one number in each step. Callbacks are notified of the
    save as of any other. The `enable_jit_checkpoint` of transformers does neither.

    While training runs, SIGTERM has no other effect, and a second SIGTERM has none either. The previous handler is
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
