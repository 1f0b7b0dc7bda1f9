"""SparseTrainer: the Trainer of transformers, pruning when asked, logging sparsity, losing no zero silently."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainingArguments

from .callbacks import PruningCallback, ZeroGuardCallback
from .criteria import find_criterion
from .masks import GROUPS, Pattern, SemiStructured, parse_pattern
from .prune import PruningReport


RECOVERIES = ("retrain",)


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus what to prune before training, and how to recover.

    Raises:
        ValueError: a bad or contradictory choice, before anything is loaded.
    """

    sparsity: float | None = field(
        default=None, metadata={"help": "Prune to this fraction of zeros, in [0, 1), before training."}
    )
    pattern: str | None = field(
        default=None, metadata={"help": 'Prune to "n:m" (n kept of every m inputs), e.g. "2:4", before training.'}
    )
    criterion: str = field(
        default="magnitude", metadata={"help": 'Pruning criterion: "magnitude", "random", "wanda".'}
    )
    group: str | None = field(
        default=None, metadata={"help": 'What is compared: "row", "matrix", "model"; default: as in the paper.'}
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names or name endings of the layers to prune; default: all in the blocks."}
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Names or name endings of layers not to prune."}
    )
    calibration_samples: int = field(
        default=128, metadata={"help": "Training samples, from the first on, that a criterion such as wanda measures."}
    )
    recovery: str = field(default="retrain", metadata={"help": '"retrain": train with the task loss.'})

    def __post_init__(self) -> None:
        super().__post_init__()
        find_criterion(self.criterion)
        if self.group is not None and self.group not in GROUPS:
            raise ValueError(f"`group` must be one of {', '.join(map(repr, GROUPS))}, got {self.group!r}.")
        if self.recovery not in RECOVERIES:
            raise ValueError(f"`recovery` must be one of {', '.join(map(repr, RECOVERIES))}, got {self.recovery!r}.")
        if self.calibration_samples < 1:
            raise ValueError(f"`calibration_samples` must be at least 1, got {self.calibration_samples}.")
        self.pruning_pattern()

    def pruning_pattern(self) -> Pattern | None:
        """Return the pattern that `sparsity` and `pattern` ask for together, None if neither is set.

        Raises:
            ValueError: they contradict each other.
        """
        if self.pattern is None:
            return None if self.sparsity is None else parse_pattern(self.sparsity)
        parsed = parse_pattern(self.pattern)
        if self.sparsity is not None and abs(self.sparsity - parsed.sparsity) > 1e-9:
            raise ValueError(
                f'`sparsity={self.sparsity}` contradicts `pattern="{self.pattern}"`, which is a sparsity of '
                f"{parsed.sparsity:g}. Give one of them."
            )
        return parsed


class SparseTrainer(Trainer):
    """`Trainer` for pruned models.

    With `sparsity` or `pattern` in the arguments the model is pruned when training begins (`PruningCallback`). The
    zeros it has from then on are checked at every log, before every save and at the end; every log holds `sparsity`.

    Args:
        args: a `SparseTrainingArguments`.
        everything else: as in `Trainer`.

    Raises:
        TypeError: `args` is another kind of arguments.
        ValueError: calibration is needed and the training set is shorter than `calibration_samples`.
        RuntimeError: while training, a pruned weight lost a zero.
    """

    args: SparseTrainingArguments

    def __init__(self, model: Any = None, args: SparseTrainingArguments | None = None, **kwargs: Any) -> None:
        args = SparseTrainingArguments() if args is None else args
        if not isinstance(args, SparseTrainingArguments):
            raise TypeError(f"Expected `args` as SparseTrainingArguments, got {type(args).__name__}.")
        super().__init__(model, args, **kwargs)
        pattern = args.pruning_pattern()
        targets: dict[str, Any] = {"target_modules": args.target_modules, "exclude_modules": args.exclude_modules}
        self._pruning: PruningCallback | None = None
        if pattern is not None:
            # A pattern of the arguments' "n:m" has its own group.
            group: Any = None if isinstance(pattern, SemiStructured) else args.group
            calibration = self._calibration() if find_criterion(args.criterion).needs_inputs else None
            self._pruning = PruningCallback(
                pattern, criterion=args.criterion, group=group, calibration=calibration, **targets
            )
            self.add_callback(self._pruning)
        self.add_callback(ZeroGuardCallback(**targets))

    @property
    def pruning_report(self) -> PruningReport | None:
        """The report of what was pruned when training began, None before or without pruning."""
        return self._pruning.report if self._pruning else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Prune if asked and not done yet, then train as `Trainer.train` does."""
        if self._pruning and self._pruning.report is None:
            # Before a checkpoint is loaded: on the weights that the first run pruned, trained biases included.
            self._pruning.prune(self.model, self.args.seed)
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        guard = self._guard()
        if guard.layers:
            guard.check()
            logs["sparsity"] = round(guard.sparsity(), 6)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._guard().check()
        super().save_model(output_dir, _internal_call)

    def _guard(self) -> ZeroGuardCallback:
        # Looked up, not kept: resuming may replace the callback by one restored from the checkpoint.
        return next(c for c in self.callback_handler.callbacks if isinstance(c, ZeroGuardCallback))

    def _calibration(self) -> "_FirstSamples":
        if self.train_dataset is None:
            raise ValueError(f"Criterion {self.args.criterion!r} is calibrated on `train_dataset`, which is missing.")
        if len(self.train_dataset) < self.args.calibration_samples:
            raise ValueError(
                f"`calibration_samples={self.args.calibration_samples}`, but the training set has only "
                f"{len(self.train_dataset)} samples. Ask for fewer, or bring more text."
            )
        collator = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        return _FirstSamples(self.train_dataset, collator, self.args.calibration_samples)


class _FirstSamples:
    """The first samples of a dataset, collated one by one; every process sees the same, in the same order."""

    def __init__(self, dataset: Any, collator: Any, count: int) -> None:
        self.dataset, self.collator, self.count = dataset, collator, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(self.count):
            yield self.collator([self.dataset[index]])
