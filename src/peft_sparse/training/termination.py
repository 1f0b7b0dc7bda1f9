"""SIGTERM during training: finish the step, save a checkpoint and stop."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.processes import place, total_of


def check_thread() -> None:
    """Check that this thread can handle signals.

    Raises:
        ValueError: it is not the main thread of the process.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            "SIGTERM can be handled in the main thread alone, and this training runs in the thread "
            f"{threading.current_thread().name!r}. Call `train` in the main thread, or leave `save_on_sigterm` out."
        )


class TerminationCallback(TrainerCallback):
    """Saves a checkpoint and stops training after the step in which any process received SIGTERM.

    All processes stop after the same step. For this they add up one number in each step. The event `on_save` of other
    callbacks is called, as for any checkpoint. `enable_jit_checkpoint` of transformers does not make the processes
    agree on the step, and does not call `on_save`.

    While training runs, SIGTERM does not end the process, and a second SIGTERM has no effect. The previous handler is
    restored when training ends, by `SparseTrainer` also if it raises. With another Trainer that has raised, call
    `release`; otherwise the next SIGTERM restores the previous handler and is delivered to it.

    Raises:
        ValueError: when training begins, in another thread than the main one, which cannot handle signals.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._process = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_thread()
        # An earlier run may have raised. Its handler must not be taken for the one before.
        self.release()
        self._asked, self._process = False, os.getpid()
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
        self.release()

    def release(self) -> None:
        """Restore the handler of SIGTERM from before training, unless another one was set since."""
        if signal.getsignal(signal.SIGTERM) == self._ask:
            # None means a handler that was not set by Python, which cannot be set again.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._is_training(frame):
            self._asked = True
        else:
            # Training has raised, and nobody would look at a note.
            self.release()
            signal.raise_signal(number)

    def _is_training(self, frame: FrameType | None) -> bool:
        """Return whether a trainer that has this callback is training in `frame` or in one of its callers."""
        # A process that was forked while training ran has the same frames, and does not train.
        while frame is not None and os.getpid() == self._process:
            if frame.f_code.co_name == "train":
                handler = getattr(frame.f_locals.get("self"), "callback_handler", None)
                if any(callback is self for callback in getattr(handler, "callbacks", ())):
                    return True
            frame = frame.f_back
        return False
