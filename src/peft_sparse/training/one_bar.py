"""Shows a training run as one progress bar, in the place of the lines that `Trainer` prints."""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


# Where no terminal is, so many lines are printed in a run.
LINES = 10


class OneBar(TrainerCallback):
    """One bar with the loss and the remaining time for a training; ten lines where standard error is no terminal.

    A reconstruction has a bar of its own on a terminal, and the lines elsewhere. `disable_tqdm` shows nothing.

    Args:
        stages: what the trainings are, in their order. The last name is that of all further ones.
    """

    def __init__(self, stages: list[str]) -> None:
        self.stages = stages
        self.bar: Any = None
        self.loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the bar of a stage."""
        self.stage = self.stages.pop(0) if len(self.stages) > 1 else self.stages[0]
        self.begun, self.first, self.loss = time.perf_counter(), state.global_step, ""
        terminal = sys.stderr.isatty() and not args.disable_tqdm
        self.tells = state.is_world_process_zero and not terminal and not args.disable_tqdm
        if state.is_world_process_zero and terminal and self.stage == "retraining":
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        step, steps = state.global_step, max(state.max_steps, 1)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if step >= steps:
                # What is measured at the end has a bar of its own.
                self._close()
        elif self.tells and LINES * step // steps > LINES * (step - 1) // steps:
            left = (time.perf_counter() - self.begun) / max(step - self.first, 1) * (steps - step)
            tqdm.write(f"{self.stage}: step {step} of {steps}{self.loss}, {left:.0f} s left")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the last loss."""
        loss = kwargs.get("logs", {}).get("loss")
        if loss is not None:
            self.loss = f", loss {float(loss):.3g}"
            if self.bar is not None:
                self.bar.set_postfix_str(self.loss[2:], refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the bar."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def show_one_bar(trainer: Trainer) -> None:
    """Show the trainings of a `SparseTrainer` as one bar for each stage. The display of a notebook stays."""
    args: Any = trainer.args
    stages = ["reconstructing"] * args.reconstructs + ["retraining"] * args.retrains
    shown = [trainer.pop_callback(kind) for kind in (ProgressCallback, PrinterCallback)]
    if stages and any(shown):
        trainer.add_callback(OneBar(stages))
