"""The arguments of `SparseTrainer`: those of transformers, what to prune, and how to recover from pruning."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from ..pruning.allocation import ALLOCATIONS
from ..pruning.choices import chosen
from ..pruning.criteria import CRITERIA
from ..pruning.least_squares import LeastSquares
from ..pruning.patterns import GROUPS, Pattern, parse_pattern
from ..pruning.refinement import REFINEMENTS
from ..reconstruction.regions import RegionSize
from .argument_checks import check_arguments
from .distillation import DISTILLATIONS
from .learning_rates import RETRAINING
from .pruning_schedules import CubicSchedule, PruningCycles, PruningSchedule


# What `recovery` may be. Regions are fitted to dense outputs before adapters are trained, never after.
RECOVERIES = ("retrain", "reconstruct", "reconstruct,retrain", "none")
# The learning rate of regions before retraining: the best of three in docs/numbers/reconstruction.md.
REGION_RATE = 1e-3
PRUNING_SCHEDULES = ("cubic", "cycles")
# The choices that have options, and the table of each.
CHOICES: dict[str, dict[str, type]] = {
    "criterion": CRITERIA,
    "allocation": ALLOCATIONS,
    "refinement": REFINEMENTS,
    "update": {"least_squares": LeastSquares},
}


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """The arguments of `SparseTrainer`: those of `transformers.TrainingArguments`, and the following.

    Every argument can be given on the command line with `transformers.HfArgumentParser`. Arguments that take a dict
    then take it as JSON: `--criterion_options '{"damping": 0.1}'`.

    Args:
        > What to prune, and how

        sparsity: the fraction of zeros to prune to, in [0, 1). Default None: do not prune.
        pattern: the pattern to prune to: "n:m" keeps n of every m consecutive inputs, such as "2:4". It can be given
            beside `sparsity` if both ask for the same sparsity. Default None.
        criterion: the pruning criterion: "magnitude", "random", "wanda", "ria", "sparsegpt" or "gblm". Default
            "magnitude".
        criterion_options: the criterion's own numbers, as a dict or JSON, such as `{"damping": 0.1}` for "sparsegpt".
            Their names are the fields of the criterion's class, here `SparseGPT`. Default None: the defaults of its
            class.
        group: the entries that are compared with each other: "row" (one output), "matrix" or "model". n:m compares
            within each m entries and takes no group. Default None: the group of the criterion's paper.
        allocation: how the sparsity is divided among the layers: "uniform", "uniform+", "global", "erk", "lamp" or
            "owl". Default None: each layer gets the requested sparsity.
        allocation_options: the allocation's own numbers, as a dict or JSON, such as `{"outlier_factor": 5}` for "owl".
            Default None: the defaults of its class.
        refinement: exchange pruned entries for kept ones after the criterion has selected: "dsnot" or "swap". Default
            None: no exchange.
        refinement_options: the refinement's own numbers, as a dict or JSON, such as `{"max_swaps": 100}` for "swap".
            Default None: the defaults of its class.
        update: fit the kept weights to the dense outputs by regularised least squares, after the criterion has
            selected. Default False.
        update_options: the numbers of the least squares, as a dict or JSON, such as `{"damping": 0.1}`: the fields of
            `LeastSquares`. Default None: the defaults of `LeastSquares`.
        target_modules: names or name endings of the layers to prune and to guard. Default None: every linear or
            convolution layer and fused expert inside the blocks.
        exclude_modules: names or name endings of layers not to prune and not to guard. Default None.
        calibration_samples: how many samples of the training set, from the first on, calibration uses. It is needed by
            criteria, allocations, refinements and updates that measure the model, and by reconstruction. Default 128.
        recalibrate_norms: measure the running statistics of BatchNorms anew by the function `recalibrate_norms`: after
            each pruning, after reconstruction, and after retraining, with the adapters merged. The data are
            `calibration_samples` samples, evenly spaced over the calibration set or training set. Default False.

        > When to prune

        pruning_schedule: "cubic" raises the sparsity step by step during training (`CubicSchedule`); "cycles"
            alternates pruning and retraining (`PruningCycles`). Default None: prune once, before training.
        pruning_rounds: how many times the "cubic" schedule raises the sparsity, or the number of cycles of "cycles".
            Default 1.
        pruning_interval: the number of optimiser steps between two prunings of the "cubic" schedule. Default 1.

        > The learning rates of retraining

        retraining_schedule: the learning rate schedule of retraining: "ft", "lrw", "slr", "clr", "llr" or "allr" (see
            the function `retraining_schedule`). `learning_rate`, `lr_scheduler_type` and the warm-up then describe the
            original training. Default None: `lr_scheduler_type` is the schedule of retraining.
        original_steps: the number of optimiser steps of the original training. "lrw" and "allr" need it. Default None:
            as many steps as retraining has.
        find_learning_rate: find the learning rate by short trials when training begins, and undo them. A trial takes 5
            optimiser steps. The first is at `learning_rate`, and there are about 5 to 10. The rate that is found
            replaces `learning_rate`. A resumed run uses the rate of the first run. Default False.

        > Distillation

        distillation: what retraining learns from a dense teacher besides the task: "logits" or "hidden_states".
            Default None: only the task.
        distillation_weight: α in (1 - α) · L_task + α · L_distillation, in (0, 1]. Default 0.5.
        distillation_temperature: T in softmax(logits / T), above 0. Only "logits" uses it. Default 1.

        > Reconstruction

        recovery: "retrain" trains with the task loss. "reconstruct" fits the regions of the model one after another to
            the outputs of the dense model: of the model before it is pruned to `sparsity` or `pattern`, or of the
            `teacher` of SparseTrainer. "reconstruct,retrain", or a list of the two names, does one after the other.
            "none" only prunes. Default "retrain".
        reconstruction_learning_rate: the learning rate of each region. Default None: `learning_rate` if nothing else
            is trained; 1e-3 before retraining, whose rate is `learning_rate`.
        reconstruction_epochs: passes over the calibration samples for each region. Default None: `num_train_epochs` or
            `max_steps` if nothing else is trained; 1 before retraining, whose length these two give.
        reconstruction_batch_size: calibration samples in a batch. Default None: `per_device_train_batch_size`.
        reconstruction_region: what is fitted at a time: "matrix" (one weight matrix), "submodule" (the attention or
            the MLP of a block), "block", or a number of consecutive blocks. Default "submodule".
        reconstruction_mode: which model the inputs and the targets of a region come from, the dense (D) or the sparse
            (S) one: "DD", "SS" or "SD". Default "SS".
        reconstruction_loss: the loss between outputs and targets: "mse", "relative_mse" or "cosine" (see `Fit`).
            Default "mse".
        reconstruction_holdout: the fraction of the calibration batches, in [0, 1), on which errors are measured and
            which are not trained on. Default 0.1.
        activations: where reconstruction keeps hidden states between blocks: "device", "cpu" or "disk". Default
            "device".

        > Interruptions

        save_on_sigterm: after SIGTERM, finish the step, save a checkpoint and stop, in all processes. Default False.

    Raises:
        ValueError: a value is unknown or out of its range, or two arguments contradict each other.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *(f"{choice}_options" for choice in CHOICES)]

    sparsity: float | None = field(
        default=None, metadata={"help": "Prune to this fraction of zeros, in [0, 1). Default: do not prune."}
    )
    pattern: str | None = field(
        default=None, metadata={"help": 'Prune to "n:m", which keeps n of every m inputs, such as "2:4".'}
    )
    criterion: str = field(default="magnitude", metadata={"help": f"Pruning criterion: {', '.join(CRITERIA)}."})
    criterion_options: dict | str | None = field(
        default=None, metadata={"help": "The criterion's own numbers as JSON, such as '{\"damping\": 0.1}'."}
    )
    group: str | None = field(
        default=None,
        metadata={"help": f"Entries that are compared: {', '.join(GROUPS)}. Default: that of the criterion's paper."},
    )
    allocation: str | None = field(
        default=None,
        metadata={
            "help": f"How layers share the sparsity: {', '.join(ALLOCATIONS)}. Default: each gets the requested one."
        },
    )
    allocation_options: dict | str | None = field(
        default=None, metadata={"help": "The allocation's own numbers as JSON, such as '{\"outlier_factor\": 5}'."}
    )
    refinement: str | None = field(
        default=None,
        metadata={"help": f"Exchange pruned for kept entries after the selection: {', '.join(REFINEMENTS)}."},
    )
    refinement_options: dict | str | None = field(
        default=None, metadata={"help": "The refinement's own numbers as JSON, such as '{\"max_swaps\": 100}'."}
    )
    update: bool = field(
        default=False, metadata={"help": "Fit the kept weights to the dense outputs by least squares."}
    )
    update_options: dict | str | None = field(
        default=None, metadata={"help": "The numbers of the least squares as JSON, such as '{\"damping\": 0.1}'."}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names or name endings of the layers to prune. Default: all linear layers in the blocks."},
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Names or name endings of layers not to prune."}
    )
    calibration_samples: int = field(
        default=128, metadata={"help": "How many samples of the training set, from the first on, calibration uses."}
    )
    recalibrate_norms: bool = field(
        default=False,
        metadata={"help": "Measure the statistics of BatchNorms anew, after pruning and after the recovery."},
    )

    pruning_schedule: str | None = field(
        default=None,
        metadata={
            "help": '"cubic": raise the sparsity `pruning_rounds` times, every `pruning_interval` steps. "cycles": '
            "`pruning_rounds` cycles of pruning and retraining. Default: prune once, before training."
        },
    )
    pruning_rounds: int = field(
        default=1, metadata={"help": "How often `pruning_schedule` raises the sparsity, or its number of cycles."}
    )
    pruning_interval: int = field(
        default=1, metadata={"help": 'Optimiser steps between two prunings of the "cubic" schedule.'}
    )

    retraining_schedule: str | None = field(
        default=None,
        metadata={
            "help": f"Learning rate schedule of retraining: {', '.join(RETRAINING)}. `learning_rate`, "
            "`lr_scheduler_type` and the warm-up then describe the original training."
        },
    )
    original_steps: int | None = field(
        default=None,
        metadata={"help": "Optimiser steps of the original training. Default: as many as retraining has."},
    )

    find_learning_rate: bool = field(
        default=False, metadata={"help": "Find the learning rate by short trials when training begins."}
    )

    distillation: str | None = field(
        default=None,
        metadata={
            "help": f"What retraining learns from a dense teacher besides the task: {', '.join(DISTILLATIONS)}."
        },
    )
    distillation_weight: float = field(
        default=0.5, metadata={"help": "Weight of the distillation loss, in (0, 1]. The task loss has the rest."}
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": 'With distillation="logits", the logits of both models are divided by it.'}
    )

    recovery: str = field(
        default="retrain",
        metadata={
            "help": '"retrain": train with the task loss. "reconstruct": fit regions to their dense outputs. '
            '"reconstruct,retrain": one after the other. "none": prune only.'
        },
    )
    reconstruction_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of each region. Default: `learning_rate`, or 1e-3 before retraining."},
    )
    reconstruction_epochs: float | None = field(
        default=None,
        metadata={"help": "Passes for each region. Default: as in training, or 1 before retraining."},
    )
    reconstruction_batch_size: int | None = field(
        default=None, metadata={"help": "Samples in a batch. Default: `per_device_train_batch_size`."}
    )
    reconstruction_region: str = field(
        default="submodule", metadata={"help": '"matrix", "submodule", "block", or a number of blocks.'}
    )
    reconstruction_mode: str = field(
        default="SS",
        metadata={"help": 'Whether inputs and targets come from the dense (D) or sparse (S) model: "DD", "SS", "SD".'},
    )
    reconstruction_loss: str = field(default="mse", metadata={"help": '"mse", "relative_mse" or "cosine".'})
    reconstruction_holdout: float = field(
        default=0.1, metadata={"help": "Fraction of the calibration batches that only measures errors."}
    )
    activations: str = field(
        default="device",
        metadata={"help": 'Where reconstruction keeps hidden states between blocks: "device", "cpu", "disk".'},
    )

    save_on_sigterm: bool = field(
        default=False,
        metadata={"help": "After SIGTERM, finish the step, save a checkpoint and stop, in all processes."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.recovery
        if isinstance(given, (list, tuple)):
            self.recovery = ",".join(map(str, given)) or "none"
        if self.recovery not in RECOVERIES:
            raise ValueError(f"`recovery` must be one of {', '.join(map(repr, RECOVERIES))}, got {given!r}.")
        check_arguments(self)
        self.pruning_times()

    @property
    def reconstructs(self) -> bool:
        """Whether `recovery` contains reconstruction."""
        return self.recovery.startswith("reconstruct")

    @property
    def retrains(self) -> bool:
        """Whether `recovery` contains retraining."""
        return self.recovery.endswith("retrain")

    def pruning_options(self) -> dict[str, Any]:
        """Return the arguments of `prune` that these arguments describe, without the calibration data.

        Raises:
            ValueError: `sparsity` and `pattern` contradict each other; a choice or an option is unknown; options are
                given without the choice that they belong to.
        """
        return {
            "pattern": self.pruning_pattern(),
            "criterion": self._choice("criterion"),
            "group": self.group,
            "allocation": self._choice("allocation"),
            "refinement": self._choice("refinement"),
            "update": self._choice("update") or False,
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules,
        }

    def _choice(self, name: str) -> Any:
        """Return the value that the argument `name` and its options describe. None if the argument is not set."""
        choice, options = getattr(self, name), getattr(self, f"{name}_options")
        is_set = choice not in (None, False)
        if options is not None and not (is_set and isinstance(options, dict)):
            raise ValueError(
                f"`{name}_options` must be a dict, or JSON such as '{{\"name\": 1}}', and `{name}` must be set. Got "
                f"`{name}_options={options!r}` and `{name}={choice!r}`."
            )
        if not is_set:
            return None
        return chosen(name, CHOICES[name], "least_squares" if choice is True else choice, options)

    def pruning_times(self) -> PruningSchedule | None:
        """Return the schedule that `pruning_schedule` names. None if the model is pruned once.

        Raises:
            ValueError: the name is unknown, no sparsity is set, or another argument allows only one pruning.
        """
        name = self.pruning_schedule
        if name is None:
            return None
        if name not in PRUNING_SCHEDULES:
            known = ", ".join(map(repr, PRUNING_SCHEDULES))
            raise ValueError(f"`pruning_schedule` must be one of {known}, got {name!r}. Leave it out to prune once.")
        begins_once = self.retraining_schedule and name != "cycles"
        if self.recovery != "retrain" or begins_once or self.pruning_pattern() is None:
            raise ValueError(
                f"`pruning_schedule={name!r}` prunes to `sparsity` during training. It needs `sparsity` and "
                '`recovery="retrain"`. Beside `retraining_schedule`, which begins after a pruning, only "cycles" is '
                "possible."
            )
        if name == "cubic":
            return CubicSchedule(self.pruning_rounds, self.pruning_interval)
        return PruningCycles(self.pruning_rounds)

    def original_rates(self, steps: int) -> list[float]:
        """Return the learning rates of the original training that the arguments describe, one for each step.

        Args:
            steps: the number of optimiser steps of the original training if `original_steps` is not set.

        Raises:
            ValueError: `lr_scheduler_type` is not a function of the step alone, such as "reduce_lr_on_plateau".
        """
        steps = self.original_steps or steps
        probe = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        warmup, options = self.get_warmup_steps(steps), self.lr_scheduler_kwargs
        schedule = get_scheduler(self.lr_scheduler_type, probe, warmup, steps, options)
        if not isinstance(schedule, LambdaLR):
            raise ValueError(
                "`retraining_schedule` computes the learning rates of the original training from `lr_scheduler_type`, "
                f"and those of {type(schedule).__name__} are not known before it runs. Set the `lr_scheduler_type` of "
                'the original training, such as "linear" or "cosine".'
            )
        return [self.learning_rate * schedule.lr_lambdas[0](step) for step in range(steps)]

    def rate_of_regions(self) -> float:
        """Return the learning rate of each region."""
        if self.reconstruction_learning_rate is not None:
            return self.reconstruction_learning_rate
        return REGION_RATE if self.retrains else self.learning_rate

    def length_of_regions(self) -> dict[str, Any]:
        """Return `epochs` and `max_steps` of `Fit` for each region."""
        if self.reconstruction_epochs is not None or self.retrains:
            return {"epochs": 1 if self.reconstruction_epochs is None else self.reconstruction_epochs}
        return {"epochs": self.num_train_epochs, "max_steps": self.max_steps if self.max_steps > 0 else None}

    def batch_of_regions(self) -> int:
        """Return the number of calibration samples in a batch of reconstruction."""
        return self.reconstruction_batch_size or self.per_device_train_batch_size

    def region_size(self) -> RegionSize:
        """Return `reconstruction_region` as `reconstruct` takes it: a name, or an int."""
        region: Any = self.reconstruction_region
        return int(region) if str(region).isdigit() else region

    def pruning_pattern(self) -> Pattern | None:
        """Return the pattern that `sparsity` and `pattern` ask for. None if neither is set.

        Raises:
            ValueError: `sparsity` and `pattern` ask for different sparsities.
        """
        if self.pattern is None:
            return None if self.sparsity is None else parse_pattern(self.sparsity)
        parsed = parse_pattern(self.pattern)
        if self.sparsity is not None and abs(self.sparsity - parsed.sparsity) > 1e-9:
            raise ValueError(
                f'`sparsity={self.sparsity}` contradicts `pattern="{self.pattern}"`, whose sparsity is '
                f"{parsed.sparsity:g}. Give one of them."
            )
        return parsed
