"""The report that `SparseTrainer` writes at the end of a run."""

import dataclasses
import json
import logging
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..model.environment import peak_memory
from ..reporting import RunReport, SavedModel, Stage, describe_model, describe_saved, write_report
from ..reporting.names import without_folders


logger = logging.getLogger(__name__)

# Arguments that `TrainingArguments` fills with objects of its own.
_FILLED = ("accelerator_config",)
# A checkpoint is a folder of one machine.
_PLACES = ("resume_from_checkpoint",)


class RunReportCallback(TrainerCallback):
    """Writes `report.json` and `report.html` into `output_dir` at the end of each `SparseTrainer.train`.

    `SparseTrainer` adds it. After `trainer.remove_callback(RunReportCallback)` no report is written. A trial of a
    hyperparameter search writes none. With several processes, those write that save the model. Files of these names
    that are no report stay: then a warning says so, and no report is written.
    """

    def __init__(self) -> None:
        self.resumed = False
        self._histories: dict[str, list[dict[str, Any]]] = {}
        self._peaks: list[int] = []
        self._checkpoint: str | None = None

    def begin(self, resumed: bool) -> None:
        """Forget an earlier run. `resumed` says whether the new one continues a run that was stopped."""
        self.resumed = resumed
        self._histories, self._peaks, self._checkpoint = {}, [], None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the log history, which retraining after a reconstruction would begin anew, and the peak memory."""
        asked: Any = args
        is_first = asked.reconstructs and not self._histories
        # The list itself, to which entries are still added.
        self._histories["reconstruction" if is_first else "training"] = state.log_history
        self._peaks.append(peak_memory())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the last checkpoint."""
        self._checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def report(self, trainer: Any) -> RunReport:
        """Return the report of the run that `trainer` has finished.

        Args:
            trainer: the `SparseTrainer`.
        """
        args = trainer.args
        return RunReport(
            "train",
            arguments=changed_arguments(args),
            seed=args.seed,
            model=describe_model(trainer.model),
            stages=tuple(self._stages(trainer)),
            peak_memory_bytes=peak_memory(),
            pruning=trainer.pruning_report,
            reconstruction=trainer.reconstruction_report,
            logs={name: tuple(history) for name, history in self._histories.items()},
            texts=_described_sets(trainer),
            saved=self._saved(trainer),
            resumed=self.resumed,
        )

    def write(self, trainer: Any) -> None:
        """Write the report of the run that `trainer` has finished, if this process writes.

        Args:
            trainer: the `SparseTrainer`.
        """
        if not trainer.args.should_save:
            return
        folder = Path(str(trainer.args.output_dir))
        if foreign := _foreign_files(folder):
            logger.warning(
                "The report of the run is not written, because %s in %r is no report of this package. Move the file, "
                "and call `write_report(trainer.run_report(), folder)`.",
                foreign[0],
                str(folder),
            )
            return
        try:
            write_report(self.report(trainer), folder)
        except Exception:
            # The trained model is not saved yet, and an error here would lose it.
            logger.warning("The run is finished, and its report could not be written.", exc_info=True)

    def _saved(self, trainer: Any) -> tuple[SavedModel, ...]:
        """Return the last checkpoint, if it is a whole model. That of an adapter needs the base pruned here."""
        output = str(trainer.args.output_dir)
        if self._checkpoint is None or not (Path(output) / self._checkpoint / CONFIG_NAME).exists():
            return ()
        return (describe_saved(output, self._checkpoint, trainer.model),)

    def _stages(self, trainer: Any) -> list[Stage]:
        found, pruning, rebuilt = [], trainer.pruning_report, trainer.reconstruction_report
        if rebuilt is not None:
            share = None if pruning is None else pruning.sparsity
            found.append(Stage("reconstructed", {}, share, rebuilt.seconds, peak_memory_bytes=rebuilt.peak_memory))
        elif pruning is not None and all(each.schedule is None for each in trainer._prunes()):
            found.append(Stage("pruned", {}, pruning.sparsity, pruning.seconds, peak_memory_bytes=pruning.peak_memory))
        history = self._histories.get("training")
        if history is not None:
            last: dict[str, Any] = {}
            for entry in history:
                last |= entry
            tokens = int(trainer.state.num_input_tokens_seen)
            seconds = float(last.get("train_runtime", 0.0))
            found.append(
                Stage("retrained", {}, last.get("sparsity"), seconds, 0.0, tokens, peak_memory_bytes=self._peaks[-1])
            )
        return found


def _foreign_files(folder: Path) -> list[str]:
    """Return the files of the user that have the names of a report, and would be lost."""
    data, page = folder / "report.json", folder / "report.html"
    try:
        # Not `read_report`, which refuses the reports of other versions.
        found = json.loads(data.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    is_report = isinstance(found, dict) and found.keys() >= {"schema", "stages"}
    return [] if is_report else [path.name for path in (data, page) if path.is_file()]


def changed_arguments(*parts: Any) -> dict[str, Any]:
    """Return the arguments that differ from their defaults, without the folders and tokens of a machine.

    Args:
        parts: dataclasses of arguments.
    """
    found: dict[str, Any] = {}
    for own in parts:
        for each in dataclasses.fields(own):
            # No object of defaults is made: to make `TrainingArguments` sets up devices and DeepSpeed.
            default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            value = getattr(own, each.name)
            hidden = each.name.endswith(("_dir", "_token")) or each.name in _FILLED + _PLACES or not each.init
            # An empty list or dict stands for "none", and False for None, after the arguments were read.
            unset = value in ([], {}) or (value is False and default is None)
            if not hidden and not unset and value != default:
                plain = isinstance(value, (int, float, bool, list, dict)) and not isinstance(value, Enum)
                found[each.name] = value if plain else without_folders(str(getattr(value, "value", value)))
    return found


def _described_sets(trainer: Any) -> dict[str, dict[str, Any]]:
    """Return what is known of the data sets without reading them: lengths, and the fingerprints of `datasets`."""
    sets = {"train": trainer.train_dataset, "calibration": trainer.calibration_dataset}
    evaluated = trainer.eval_dataset
    several = isinstance(evaluated, dict)
    sets |= {f"evaluation, {n}": each for n, each in evaluated.items()} if several else {"evaluation": evaluated}
    found: dict[str, dict[str, Any]] = {}
    for name, each in sets.items():
        facts = {"sequences": len(each)} if hasattr(each, "__len__") else {}
        facts |= {"digest": each._fingerprint} if isinstance(getattr(each, "_fingerprint", None), str) else {}
        if facts:
            found[name] = facts
    return found
