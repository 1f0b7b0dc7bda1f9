"""What a command tells while it runs: lines of one process, which leave progress bars whole."""

import os
import warnings

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging


def say(text: str) -> None:
    """Print `text` in the first process, also while a progress bar is shown."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


def prepare() -> None:
    """Choose the threads of this process, and leave out what others print that says nothing about the run."""
    state = PartialState()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and state.num_processes == 1 and state.device.type == "cpu" and hasattr(os, "sched_getaffinity"):
        # `accelerate launch` gives a single process one thread.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Bars of the seconds in which a file is read or written. The stages of a run have bars of their own.
    logging.disable_progress_bar()
    # PEFT 0.21 reads a property that Transformers 5.23 renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
