"""Hands what `PruningCallback` writes into the log history on to the loggers of a trainer."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class PruningLog(TrainerCallback):
    """Lets TensorBoard, Weights & Biases, Trackio and other loggers see each pruning: `pruning` and `norm_drop`.

    `PruningCallback` adds an entry to the log history and has no trainer, which would hand it on. The names are those
    of the entry.

    Args:
        handler: the callbacks of the trainer.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        self.handler: Any = handler
        self._seen: set[tuple[int, float]] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand on the pruning before the first step. Those of a resumed run were handed on by the run before it."""
        self._seen = {key for key in _prunings(state) if key[0] < state.global_step}
        self._hand_on(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand on the prunings of a schedule."""
        self._hand_on(args, state, control)

    def _hand_on(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        found = _prunings(state)
        for key in found.keys() - self._seen:
            numbers = {name: value for name, value in found[key].items() if isinstance(value, (int, float))}
            numbers.pop("step")
            # Not `handler.on_log`, which would withdraw what a callback before this one has asked for.
            self.handler.call_event("on_log", args, state, control, logs=numbers)
        self._seen |= found.keys()


def _prunings(state: TrainerState) -> dict[tuple[int, float], dict[str, Any]]:
    return {(entry["step"], entry["pruning"]): entry for entry in state.log_history if "pruning" in entry}
