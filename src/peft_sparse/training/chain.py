"""Reconstruction and then retraining as one run: where it resumes, and what its second half knows of the first."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..reconstruction.progress import is_progress
from .checkpoints import last_complete_checkpoint
from .reconstruction_run import FOLDER


logger = logging.getLogger(__name__)


def where_to_resume(args: Any, resume: str | bool | None) -> tuple[str | bool | None, str | None]:
    """Return where reconstruction resumes, and the checkpoint from which retraining resumes; None: from its start.

    Args:
        args: the arguments of the trainer.
        resume: the argument of `train`: True, a checkpoint of retraining, or a folder of finished regions.
    """
    if not resume:
        return None, None
    if isinstance(resume, str):
        return (resume, None) if is_progress(Path(resume)) else (str(Path(resume).parent / FOLDER), resume)
    output = Path(str(args.output_dir))
    if not any(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        return True, None
    try:
        return True, str(last_complete_checkpoint(output, only_weights=args.save_only_model))
    except ValueError as error:
        logger.warning("Retraining starts after the reconstruction, because no checkpoint can be used. %s", error)
        return True, None


class AfterReconstruction(TrainerCallback):
    """Writes into the log history of retraining what it started from, and compares it when retraining resumes.

    Args:
        fingerprint: the fingerprint of the reconstructed model, before an adapter is attached.
        seconds: how long the reconstruction took in this process.
        steps: its optimiser steps.
    """

    def __init__(self, fingerprint: str, seconds: float, steps: int) -> None:
        self.fingerprint = fingerprint
        self.entry = {"reconstructed": fingerprint, "reconstruction_runtime": seconds, "reconstruction_steps": steps}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step:
            state.log_history.append(self.entry | {"epoch": 0, "step": 0})
            return
        found = [entry["reconstructed"] for entry in state.log_history if "reconstructed" in entry]
        if found != [self.fingerprint]:
            raise ValueError(
                f"The checkpoint at step {state.global_step} continues the reconstruction "
                f"{found[0] if found else '(none)'}, and the reconstruction of this run gave {self.fingerprint}. "
                "Resume with the `output_dir`, model, data and arguments of the first run; or delete the "
                f"`{PREFIX_CHECKPOINT_DIR}-*` folders of another run to retrain from the reconstructed model."
            )
