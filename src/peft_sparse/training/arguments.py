"""The arguments of training: those of transformers, what to prune, and how to recover."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from ..calibration.activations import check_activations
from ..pruning.allocation import ALLOCATIONS
from ..pruning.criteria import CRITERIA, find_criterion
from ..pruning.patterns import GROUPS, Pattern, parse_pattern
from ..pruning.refinement import REFINEMENTS, find_refinement
from ..reconstruction.checks import check_choices
from ..reconstruction.regions import RegionSize
from .distillation import DISTILLATIONS
from .learning_rates import RETRAINING, check_method
from .pruning_schedules import CubicSchedule, PruningCycles, PruningSchedule


RECOVERIES = ("retrain", "reconstruct")
PRUNING_SCHEDULES = ("cubic", "cycles")


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
    criterion: str = field(default="magnitude", metadata={"help": f"Pruning criterion: {', '.join(CRITERIA)}."})
    group: str | None = field(
        default=None, metadata={"help": 'What is compared: "row", "matrix", "model"; default: as in the paper.'}
    )
    allocation: str | None = field(
        default=None,
        metadata={"help": f"How layers share the sparsity: {', '.join(ALLOCATIONS)}; default: all the same."},
    )
    refinement: str | None = field(
        default=None, metadata={"help": f"Exchange pruned for kept weights once selected: {', '.join(REFINEMENTS)}."}
    )
    update_kept: bool = field(
        default=False, metadata={"help": "Set kept weights to the exact solution of the masked least squares."}
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
    pruning_schedule: str | None = field(
        default=None,
        metadata={
            "help": '"cubic": raise the sparsity `pruning_rounds` times, every `pruning_interval` steps. "cycles": '
            "`pruning_rounds` cycles of pruning and retraining. Default: prune once, before training."
        },
    )
    pruning_rounds: int = field(default=1, metadata={"help": "Updates or cycles of `pruning_schedule`."})
    pruning_interval: int = field(default=1, metadata={"help": 'Steps between updates of the "cubic" schedule.'})
    retraining_schedule: str | None = field(
        default=None,
        metadata={
            "help": f"Learning rates of retraining: {', '.join(RETRAINING)}. `learning_rate`, `lr_scheduler_type` and "
            "the warm-up then describe the original training."
        },
    )
    original_steps: int | None = field(
        default=None, metadata={"help": "Steps of the original training; default: as many as retraining takes."}
    )
    distillation: str | None = field(
        default=None,
        metadata={
            "help": "What retraining learns from the dense model besides the task: "
            f"{', '.join(DISTILLATIONS)}. Its teacher: SparseTrainer's `teacher`, else a copy made before pruning."
        },
    )
    distillation_weight: float = field(
        default=0.5, metadata={"help": "Weight of distillation, in (0, 1]; the task loss has the rest."}
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": 'Both models\' logits are divided by it, with distillation="logits".'}
    )
    recovery: str = field(
        default="retrain",
        metadata={"help": '"retrain": train with the task loss. "reconstruct": fit regions to their dense outputs.'},
    )
    reconstruction_region: str = field(
        default="submodule", metadata={"help": '"matrix", "submodule", "block", or a number of blocks.'}
    )
    reconstruction_mode: str = field(
        default="SS",
        metadata={"help": 'Inputs and targets of the dense (D) or sparse (S) model: "DD", "SS", "SD".'},
    )
    reconstruction_loss: str = field(default="mse", metadata={"help": '"mse", "relative_mse" or "cosine".'})
    reconstruction_holdout: float = field(
        default=0.1, metadata={"help": "Fraction of the calibration batches that only measure errors."}
    )
    activations: str = field(
        default="device", metadata={"help": 'Where hidden states wait while reconstructing: "device", "cpu", "disk".'}
    )

    save_on_sigterm: bool = field(
        default=False,
        metadata={"help": "When SIGTERM comes, finish the step, save a checkpoint and stop, in all processes alike."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_on_sigterm and self.enable_jit_checkpoint:
            raise ValueError(
                "`save_on_sigterm` and `enable_jit_checkpoint` both wait for SIGTERM. Set one: the second for one "
                "process only, as processes may save at different steps."
            )
        if self.save_on_sigterm and self.recovery == "reconstruct":
            raise ValueError(
                "Reconstruction keeps every region it finishes and goes on after any kill, SIGTERM too, with "
                "`resume_from_checkpoint=True`. Drop `save_on_sigterm`."
            )
        find_criterion(self.criterion)
        if self.group is not None and self.group not in GROUPS:
            raise ValueError(f"`group` must be one of {', '.join(map(repr, GROUPS))}, got {self.group!r}.")
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise ValueError(
                f"`allocation` must be one of {', '.join(map(repr, ALLOCATIONS))}, got {self.allocation!r}."
            )
        if self.refinement is not None:
            find_refinement(self.refinement)
        beside = self.allocation or self.refinement or self.update_kept
        if self.recovery == "reconstruct" and beside:
            raise ValueError(
                "Reconstruction prunes region by region, by the criterion alone. Drop `allocation`, `refinement` and "
                "`update_kept`, or call `prune` first and `reconstruct` with `dense`."
            )
        if self.recovery not in RECOVERIES:
            raise ValueError(f"`recovery` must be one of {', '.join(map(repr, RECOVERIES))}, got {self.recovery!r}.")
        if self.calibration_samples < 1:
            raise ValueError(f"`calibration_samples` must be at least 1, got {self.calibration_samples}.")
        if self.recovery == "reconstruct":
            check_choices(
                self.region_size(), self.reconstruction_mode, self.reconstruction_loss, "full",
                no_pattern=self.pruning_pattern() is None, no_dense=True,
            )  # fmt: skip
            check_activations(self.activations)
            if self.fp16:
                raise ValueError("Reconstruction does not scale losses, which `fp16` needs. Use `bf16=True`.")
        self._check_retraining()
        self._check_distillation()
        self.pruning_pattern()
        self.pruning_times()

    def pruning_times(self) -> PruningSchedule | None:
        """Return the schedule that `pruning_schedule` names, None for pruning once.

        Raises:
            ValueError: an unknown name, no sparsity to reach, or beside what knows one pruning only.
        """
        name = self.pruning_schedule
        if name is None:
            return None
        if name not in PRUNING_SCHEDULES:
            known = ", ".join(map(repr, PRUNING_SCHEDULES))
            raise ValueError(f"`pruning_schedule` must be one of {known}, got {name!r}. Leave it out to prune once.")
        begins_once = self.retraining_schedule and name != "cycles"
        if self.recovery == "reconstruct" or begins_once or self.pruning_pattern() is None:
            raise ValueError(
                f"`pruning_schedule={name!r}` raises `sparsity` while training with `lr_scheduler_type`. Set "
                '`sparsity`, no reconstruction, and `retraining_schedule`, which begins after a pruning, for "cycles" '
                "only."
            )
        if name == "cubic":
            return CubicSchedule(self.pruning_rounds, self.pruning_interval)
        return PruningCycles(self.pruning_rounds)

    def _check_retraining(self) -> None:
        if self.retraining_schedule is None:
            return
        check_method(self.retraining_schedule)
        if self.recovery == "reconstruct":
            raise ValueError(
                f"`retraining_schedule={self.retraining_schedule!r}` is of training with the task loss. Drop it, or "
                '`recovery="reconstruct"`.'
            )
        if self.retraining_schedule in ("lrw", "allr") and not self.original_steps:
            raise ValueError(
                f"`retraining_schedule={self.retraining_schedule!r}` depends on how long the original training was. "
                "Set `original_steps`."
            )

    def _check_distillation(self) -> None:
        if self.distillation is None:
            return
        if self.distillation not in DISTILLATIONS:
            known = ", ".join(map(repr, DISTILLATIONS))
            raise ValueError(f"`distillation` must be one of {known}, got {self.distillation!r}.")
        if not 0 < self.distillation_weight <= 1 or self.distillation_temperature <= 0:
            raise ValueError(
                "`distillation_weight` must be in (0, 1] and `distillation_temperature` positive, got "
                f"{self.distillation_weight} and {self.distillation_temperature}. For the task loss alone leave "
                "`distillation` out."
            )
        if self.recovery == "reconstruct":
            raise ValueError(
                "Reconstruction fits the dense model's outputs already, region by region. Drop `distillation`, or "
                '`recovery="reconstruct"`.'
            )
        if self.use_liger_kernel and self.distillation == "logits":
            raise ValueError(
                "With `use_liger_kernel` the model returns no logits while training, which are distilled. Set it to "
                'False, or distil "hidden_states".'
            )

    def original_rates(self, steps: int) -> list[float]:
        """Return the learning rates of the original training, as the arguments describe it.

        Args:
            steps: how many, if `original_steps` does not say.

        Raises:
            ValueError: the rates depend on more than the step.
        """
        steps = self.original_steps or steps
        probe = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        warmup, options = self.get_warmup_steps(steps), self.lr_scheduler_kwargs
        schedule = get_scheduler(self.lr_scheduler_type, probe, warmup, steps, options)
        if not isinstance(schedule, LambdaLR):
            raise ValueError(
                "`retraining_schedule` reads the original rates off `lr_scheduler_type`, and "
                f"{type(schedule).__name__} tells none before it is run. Name the one of the original training, such "
                'as "linear" or "cosine".'
            )
        return [self.learning_rate * schedule.lr_lambdas[0](step) for step in range(steps)]

    def region_size(self) -> RegionSize:
        """Return `reconstruction_region` as `reconstruct` takes it."""
        region: Any = self.reconstruction_region
        return int(region) if str(region).isdigit() else region

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
