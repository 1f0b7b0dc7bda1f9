"""Which checkpoints of a `Trainer` are complete. A process may be killed while it writes one."""

import json
import logging
import re
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

# The file in an adapter's checkpoint that holds the base weights which a schedule changed.
BASE_NAME = "pruned_base.safetensors"
# The files that `torch.save` writes into a checkpoint. Other files with such endings may be the user's.
TORCH_FILES = ("*model*.bin", "training_args.bin", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth")
WEIGHTS = (
    "*model*.safetensors",
    "*model*.bin",
    "*/*model*.safetensors",
    "*/*model*.bin",
    "*model_fsdp*",
    "global_step*",
)
RESUMED = (("*optimizer*", "global_step*"), ("scheduler.pt", "global_step*"), ("rng_state*.pth",))


def last_complete_checkpoint(folder: str | Path, *, only_weights: bool = False) -> Path:
    """Return the checkpoint in `folder` with the most steps that is complete. A warning names those that are not.

    Args:
        folder: the `output_dir` of a run.
        only_weights: whether checkpoints hold no state of the optimiser (`save_only_model`).

    Raises:
        ValueError: no checkpoint is complete.
    """
    skipped: list[str] = []
    for checkpoint in _latest_first(Path(folder)):
        reason = missing_part(checkpoint, only_weights=only_weights)
        if reason is None:
            if skipped:
                logger.warning(
                    "Training resumes from %s. Later checkpoints are not complete, because a process was stopped "
                    "while it wrote them: %s.",
                    checkpoint.name,
                    "; ".join(skipped),
                )
            return checkpoint
        skipped.append(f"{checkpoint.name} ({reason})")
    raise ValueError(
        f"Expected a complete checkpoint in {str(folder)!r}, found {'none' if not skipped else '; '.join(skipped)}. "
        "Give the path of a checkpoint, or leave `resume_from_checkpoint` out to start again."
    )


def checkpoint_to_resume(args: Any, resume: str | Path | bool | None) -> str | None:
    """Return the checkpoint that the argument `resume_from_checkpoint` of `train` means. None if training is new.

    Args:
        args: the training arguments.
        resume: True for the last complete checkpoint in `output_dir`, or the path of a checkpoint.

    Raises:
        ValueError: no checkpoint is complete, or that of the path is not.
    """
    if not resume:
        return None
    if resume is True:
        return str(last_complete_checkpoint(str(args.output_dir), only_weights=args.save_only_model))
    # What it lacks of the optimiser's state begins anew, as with any `Trainer`.
    if (reason := missing_part(Path(resume), only_weights=True)) is not None:
        raise ValueError(
            f"Expected a complete checkpoint in {str(resume)!r}, and {reason}. Give the path of a folder "
            f"`{PREFIX_CHECKPOINT_DIR}-N` of a run, or leave `resume_from_checkpoint` out to start again."
        )
    return str(resume)


def missing_part(checkpoint: Path, *, only_weights: bool = False) -> str | None:
    """Return what a checkpoint lacks, None if it is complete.

    `Trainer` writes the state of the trainer after all other files. Files may still be cut off if the machine stopped,
    and an old checkpoint may have been half deleted. So it is also checked that safetensors have the length that their
    header says, that files of `torch.save` are whole archives, and that files which resuming reads are there.

    Args:
        checkpoint: the folder.
        only_weights: whether it holds no state of the optimiser (`save_only_model`).
    """
    state = _read_json(checkpoint / TRAINER_STATE_NAME)
    if state is None or "global_step" not in state:
        return f"{TRAINER_STATE_NAME} is missing or cut off"
    if any("base" in entry for entry in state.get("log_history", ())) and not (checkpoint / BASE_NAME).is_file():
        return f"{BASE_NAME} is missing"
    for kinds in (WEIGHTS, *(() if only_weights else RESUMED)):
        if not any(found for kind in kinds for found in checkpoint.glob(kind)):
            return f"{kinds[0]} is missing"
    for index in checkpoint.glob("*.index.json"):
        parts = _read_json(index)
        if parts is None or not all((checkpoint / part).is_file() for part in set(parts["weight_map"].values())):
            return f"parts of {index.name} are missing"
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint).as_posix()
        if path.suffix == ".safetensors" and not _is_whole(path):
            return f"{name} is cut off"
        of_torch = "/" not in name and path.is_file() and any(fnmatch(name, kind) for kind in TORCH_FILES)
        if of_torch and not zipfile.is_zipfile(path):
            return f"{name} is cut off"
    return None


def _latest_first(folder: Path) -> Iterator[Path]:
    found = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        steps = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if steps and path.is_dir():
            found[int(steps[1])] = path
    return (found[steps] for steps in sorted(found, reverse=True))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_whole(path: Path) -> bool:
    """Return whether a file of safetensors is as long as its header says: 8 bytes, the header, and the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    return bool(size == 8 + length + max(ends, default=0))
