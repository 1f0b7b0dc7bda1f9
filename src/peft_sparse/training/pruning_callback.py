"""Pruning during training: the callback calls `prune` when training begins, or at the steps of a schedule."""

import dataclasses
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..calibration.activations import Activations
from ..calibration.inputs import Calibration
from ..model.blocks import Targets, base_model, prunable_weights
from ..model.kinds import obstacle
from ..model.masks import count_kept, mask_of
from ..model.sharding import has_shards, uses_deepspeed, whole
from ..model.tree import adapters_off, has_adapters
from ..model.weights import to_host
from ..pruning.allocation import Allocation
from ..pruning.by_name import PatternLike, one_pattern
from ..pruning.criteria import CriterionLike
from ..pruning.least_squares import LeastSquares
from ..pruning.patterns import Group, Pattern, Unstructured, parse_pattern
from ..pruning.prune import prune
from ..pruning.refinement import Refinement
from ..pruning.report import PruningReport
from ..pruning.task import OnUnreached
from ..tuners.layer import SparseLoraLayer
from .base_weights import frozen_names, load_base, proof_of_base, restart_adapters, save_base
from .checkpoints import BASE_NAME
from .learning_rates import RetrainingSchedule, norm_drop
from .protected import stored_matrices
from .pruning_schedules import PruningSchedule
from .zero_guard import note_pruning


logger = logging.getLogger(__name__)

# Counts the prunings of all callbacks, so that the last one of several callbacks is known.
_turns = itertools.count(1)


class PruningCallback(TrainerCallback):
    """Prunes the model when training begins, or step by step by a schedule. Works with any `transformers.Trainer`.

    The callback prunes the base weights: adapters are switched off while `prune` runs. A resumed run with an adapter
    therefore prunes its dense base to the masks of the first run; a base that is pruned already does not change. If
    adapters train copies of a pruned layer (`modules_to_save`), each copy gets the same zeros, also that of an adapter
    which is not active.

    Biases that PEFT trains in place cannot be switched off. In a resumed run they already have their trained values
    when the base is pruned, so that calibration may measure other inputs than in the first run. `SparseTrainer` avoids
    this, because it prunes before it loads the checkpoint. With another Trainer add a `ZeroGuardCallback`, which
    raises if the masks differ. If the weights are trained directly, the checkpoint holds the pruned weights, and a
    resumed run does not prune again.

    With `PruningCycles`, MaskLoRA and ScaledLoRA adapters are merged into the base weights at the end of each cycle
    except the last. The adapters and the optimiser's state are reset, but the parameters stay the same objects. Then
    the merged weights are pruned. With `CubicSchedule`, adapters are not merged, and the criterion scores the base
    weights alone.

    If adapters are trained, a checkpoint also holds the base weights that a schedule changed, adapted or not, in
    `pruned_base.safetensors`. `SparseTrainer` reads them from the checkpoint that it resumes. With another Trainer the
    callback reads them from `output_dir/checkpoint-N`, where N is the step of the resumed checkpoint. It refuses a
    file that does not hold the weights whose hash the resumed run has noted.

    Each pruning during training, also that at its beginning, adds an entry to `state.log_history`: `pruning` is the
    sparsity reached, `norm_drop` is d₁ of the learning rate schedule "allr" (see `retraining_schedule`), `asked` is
    the sparsity that was asked for, if it is one for all layers, and `base` is the hash of the base weights, with a
    schedule and adapters. A call of the method `prune` adds no entry.

    Args:
        pattern: a sparsity in [0, 1); or "n:m", which keeps n of every m entries along the inputs; or an
            `Unstructured` or `SemiStructured`. A dict gives one of these per layer: its keys are names, name endings
            or regular expressions for the whole name, the first key that matches counts, and a layer that no key
            matches is not pruned.
        calibration: token ids (sequences, tokens), what a tokenizer returns, or an iterable of model inputs, such as a
            list, a `DataLoader` or a tokenised `datasets.Dataset`. Padding does not count, that is tokens whose
            `attention_mask` is 0. A batch may also hold a `token_mask` (sequences, tokens), or a `decoder_token_mask`,
            which the model does not see: only tokens where it is 1 count. A criterion that needs no calibration uses
            it to report output errors.
        sparsity: another way to write a `pattern` that is a number.
        criterion: "magnitude", "random", "wanda", "ria", "sparsegpt" or "gblm"; or one of these as a value with its
            numbers, such as `SparseGPT(damping=0.1)`; or a function (weight (out, in), `Statistics`) -> scores
            (out, in), higher = kept; or a `Criterion`, which also says what the function needs.
        group: which entries are compared with each other: "row" (one output), "matrix" or "model". By default the
            group of the criterion's paper. n:m compares within each m entries and SparseGPT within blocks of columns,
            so these take no group. For "model", the inputs are those of the unpruned model.
        allocation: how the sparsity is divided among the layers: "uniform", "uniform+", "global", "erk", "lamp" or
            "owl"; or one of these as a value, such as `OWL(spread=0.1)`; or a dict of sparsities, with keys as in
            `pattern`, that together give the requested total. The total is exact to the entry. n:m works with "owl",
            which mixes several n.
        refinement: "dsnot" or "swap", or a value such as `Swap(max_swaps=100)`: exchange pruned entries for kept ones
            after the criterion has selected.
        update: True, or a `LeastSquares` with its numbers: set the kept weights to the solution of a regularised
            least-squares problem, see `LeastSquares`.
        target_modules: which layers are pruned: a list of names or name endings, or a regular expression for the whole
            name, as in PEFT. By default every linear or convolution layer and fused expert inside the blocks.
        exclude_modules: which layers are not pruned, in the same form.
        prune_tied: allow a target whose weight is also an embedding. The embedding is then pruned with it.
        on_unreached: what happens to an expert that no calibration token reaches. "magnitude" prunes it by magnitude
            to the same pattern, and a warning lists such experts. "error" runs the model on all batches first, and
            refuses before any work.
        batch_size: how many sequences run together, where they do not come in batches. By default as many of one
            length as have up to 256 tokens together, and one where processes share the batches. The statistics do not
            depend on it beyond rounding.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu" or "disk".
        device: where each block is moved while it is processed. None computes where the block is.
        schedule: a `CubicSchedule` or `PruningCycles`. None prunes once, when training begins.

    Raises:
        ValueError: both or neither of `pattern` and `sparsity` are given, or a schedule is given with a pattern that
            is no single sparsity. When training begins: the run is too short for the schedule;
            `load_best_model_at_end` is set with a schedule; `PruningCycles` meets adapters other than MaskLoRA and
            ScaledLoRA, or adapters that are not active; calibration is given and the model is sharded already; `prune`
            refuses its arguments.
            When a run is resumed: it asks for another sparsity, and is not to prune any more; or, with adapters, the
            file of base weights belongs to another run.
        FileNotFoundError: training with adapters is resumed, and the checkpoint has no file of the base weights that
            the schedule changed.
    """

    def __init__(
        self,
        pattern: PatternLike | Mapping[str, PatternLike] | None = None,
        calibration: Calibration | None = None,
        *,
        sparsity: float | None = None,
        criterion: CriterionLike = "magnitude",
        group: Group | None = None,
        allocation: str | Allocation | Mapping[str, float] | None = None,
        refinement: str | Refinement | None = None,
        update: bool | LeastSquares = False,
        target_modules: Targets = None,
        exclude_modules: Targets = None,
        prune_tied: bool = False,
        on_unreached: OnUnreached = "magnitude",
        batch_size: int | None = None,
        activations: Activations = "device",
        device: torch.device | str | None = None,
        schedule: PruningSchedule | None = None,
    ) -> None:
        if isinstance(calibration, Iterator):
            # An iterator can be read only once, and the callback may prune several times.
            calibration = list(calibration)
        self.options: dict[str, Any] = {
            "pattern": one_pattern(pattern, sparsity),
            "calibration": calibration,
            "criterion": criterion,
            "group": group,
            "allocation": allocation,
            "refinement": refinement,
            "update": update,
            "target_modules": target_modules,
            "exclude_modules": exclude_modules,
            "prune_tied": prune_tied,
            "on_unreached": on_unreached,
            "batch_size": batch_size,
            "activations": activations,
            "device": device,
        }
        self.schedule = schedule
        self.report: PruningReport | None = None
        # The number of the last pruning among those of all callbacks, 0 before the first.
        self.turn = 0
        self._pruned: weakref.ref[nn.Module] | None = None
        # (‖W‖², number of nonzero entries) before and after the last pruning.
        self.norms: list[tuple[float, float]] = []
        # Whether the last pruning is not in the log history of a run yet.
        self._unlogged = False
        self._drops: dict[int, float] = {}
        self._due: dict[int, float] = {}
        # Called with the model after each pruning, if the trainer sets it.
        self.after_pruning: Callable[[nn.Module], None] | None = None
        # The checkpoint that is resumed, if the trainer tells it.
        self.resumed_from: Path | None = None
        self._saved_in: tuple[Path, int] | None = None
        self._frozen: set[str] = set()
        if schedule is not None:
            goal = self._single_pattern()
            if not isinstance(goal, Unstructured):
                raise ValueError(
                    f"A schedule raises a single sparsity, and the pattern is {self.options['pattern']!r}. Pass a "
                    "sparsity such as 0.5, or leave `schedule` out."
                )
            self._goal = goal

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, self._saved_in = kwargs["model"], None
        if self.schedule is not None:
            due = self.schedule.sparsities(self._goal.sparsity, state.max_steps)
            # A cubic schedule may begin with sparsity 0, and pruning to it would only cost calibration.
            self._due = {step: wanted for step, wanted in due.items() if wanted}
            if self.schedule.restarts:
                _check_restarts(model)
            if args.load_best_model_at_end:
                raise ValueError(
                    "`load_best_model_at_end` may load a checkpoint of lower sparsity, from before the schedule "
                    "ended. Set it to False."
                )
        elif self.has_pruned(model):
            self._check_resumed(state)
            # The model was pruned before the training began, and the state of the training is new.
            if self._unlogged and not state.global_step:
                self._log(state)
            return
        self._drops = {e["step"]: e["norm_drop"] for e in state.log_history if "norm_drop" in e}
        past = [step for step in self._due if step <= state.global_step]
        self._check_resumed(state)
        if state.global_step and not has_adapters(model) and any("pruning" in e for e in state.log_history):
            return
        adapted = self.schedule is not None and has_adapters(model)
        self._frozen = frozen_names(model, *self._targets()) if adapted else set()
        if state.global_step and past and adapted:
            folder, known = self.resumed_from or _checkpoint(args, state), self.resumed_from is not None
            proof = next((entry["base"] for entry in reversed(state.log_history) if "base" in entry), None)
            load_base(model, folder / BASE_NAME, *self._targets(), frozen=self._frozen, proof=proof, proven=known)
            note_pruning(model)
        elif self.schedule is None or past:
            self._prune_at(past[-1] if past else None, model, args, state)
            _refresh(kwargs.get("lr_scheduler"))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.schedule is None or state.global_step not in self._due:
            return
        if self.schedule.restarts:
            # Every process must draw the same adapters.
            with torch.random.fork_rng():
                torch.manual_seed(args.seed + state.global_step)
                restart_adapters(kwargs["model"])
            _restart(kwargs["optimizer"], in_place=uses_deepspeed(base_model(kwargs["model"])))
        self._prune_at(state.global_step, kwargs["model"], args, state)
        _refresh(kwargs.get("lr_scheduler"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._unlogged = False
        left = [step for step in self._due if step > state.global_step]
        if left:
            logger.warning(
                "Training has stopped after step %d, and the schedule prunes %d more times, to sparsity %.4g. Resume "
                "the run to reach it.",
                state.global_step,
                len(left),
                self._due[max(left)],
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.save_base(_checkpoint(args, state), kwargs["model"], args, state)

    def save_base(self, folder: Path, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        """Save the base weights that a schedule changed into a checkpoint of adapters, unless they are there.

        `SparseTrainer` calls this before it deletes older checkpoints. All processes must call it together.

        Args:
            folder: the folder of the checkpoint.
            model: the model with its adapters.
            args: the training arguments.
            state: the state of the trainer.
        """
        changed = self.schedule is not None and any(step <= state.global_step for step in self._due)
        if changed and has_adapters(model) and self._saved_in != (folder, state.global_step):
            save_base(model, folder / BASE_NAME, *self._targets(), write=args.should_save)
            self._saved_in = (folder, state.global_step)

    def _prune_at(self, step: int | None, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        if step is not None:
            self.options["pattern"] = dataclasses.replace(self._goal, sparsity=self._due[step])
        self.prune(model, args.seed)
        self._log(state)
        if self.schedule is not None and has_adapters(model):
            # By this a resumed run knows the file of the base weights that it needs.
            state.log_history[-1]["base"] = proof_of_base(model, self._frozen, *self._targets())

    def _log(self, state: TrainerState) -> None:
        """Add the last pruning to the log history."""
        assert self.report is not None
        before, after = self.norms
        drop = self._drops[state.global_step] = norm_drop(before, after) if after[1] < before[1] else 0.0
        entry = {"pruning": self.report.sparsity, "norm_drop": drop}
        if (asked := self._single_pattern()) is not None:
            entry["asked"] = asked.sparsity
        state.log_history.append(entry | {"epoch": state.epoch, "step": state.global_step})

    def _check_resumed(self, state: TrainerState) -> None:
        """Check that a resumed run can reach the sparsity that it asks for: not less than it had, and enough steps."""
        asked = [entry["asked"] for entry in state.log_history if "asked" in entry]
        goal = self._single_pattern() if self.schedule is None else self._goal
        if goal is None or not asked or not state.global_step:
            return
        last = max(self._due, default=0)
        if asked[-1] > goal.sparsity or (last <= state.global_step and asked[-1] != goal.sparsity):
            raise ValueError(
                f"The resumed run has pruned to sparsity {asked[-1]:.4g} by step {state.global_step}, and is to "
                f"end at {goal.sparsity:.4g}, with no pruning after step {last}. Resume with the sparsity and the "
                "schedule of the first run, or start a new run with the trained model."
            )

    def _single_pattern(self) -> Pattern | None:
        """Return the pattern that all layers are pruned to now. None if layers have their own."""
        pattern = self.options["pattern"]
        return None if isinstance(pattern, Mapping) else parse_pattern(pattern)

    def norm_drop(self, cycle: int) -> float:
        """Return d₁ of the pruning in one cycle: how much it changed the norm of the weights.

        Args:
            cycle: number of the cycle, counted from 0.

        Returns:
            d₁ of `retraining_schedule`. It is 1 for a cycle that has not begun, and 0 for a cycle whose pruning made
            no further entry zero.
        """
        steps = sorted(self._due)
        return self._drops.get(steps[cycle], 1.0) if cycle < len(steps) else 1.0

    def has_pruned(self, model: nn.Module) -> bool:
        """Return whether `model` is the model that this callback pruned last."""
        return self._pruned is not None and self._pruned() is base_model(model)

    def prune(self, model: nn.Module, seed: int) -> None:
        """Prune `model` now. In place.

        Args:
            model: the model, with or without adapters.
            seed: the seed of random scores.

        Raises:
            TypeError, ValueError: `prune` refuses its arguments.
            ValueError: calibration is given and the model is sharded already.
        """
        # With its own seed, every process draws the same random scores. The generator is restored, so that the order
        # of the training data is the same with and without this pruning.
        self._check_calibration(model)
        with torch.random.fork_rng(), whole(model, write=True):
            torch.manual_seed(seed)
            with adapters_off(model):
                before = self._norm(model)
                self.report = prune(model, **self.options)
                self.norms = [before, self._norm(model)]
            storages = {id(storage) for storage in self._prune_copies(model)}
            names = [name for name, place in stored_matrices(model).items() if id(place.parameter) in storages]
        self._unlogged, self.turn = True, next(_turns)
        # A weak reference, so that a model of an earlier `model_init` can be freed.
        self._pruned = weakref.ref(base_model(model))
        note_pruning(model, names)
        if self.after_pruning is not None:
            self.after_pruning(model)

    def _prune_copies(self, model: nn.Module) -> list[Tensor]:
        """Write the zeros of pruned layers into their copies in `modules_to_save`, also of inactive adapters.

        Returns:
            The parameters that hold the zeros, in the layers and in their copies.
        """
        assert self.report is not None
        copies: dict[int, list[nn.Module]] = {}
        for wrapper in (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)):
            for name, original in wrapper.original_module.named_modules():
                copies[id(original)] = [copy.get_submodule(name) for copy in wrapper.modules_to_save.values()]
        with adapters_off(model):
            originals = prunable_weights(model, *self._targets())
        storages: list[Tensor] = []
        for name in (weight.name for weight in self.report.weights):
            original = originals[name]
            storages.append(original.storage)
            for copy in copies.get(id(original.layer), ()):
                view = dataclasses.replace(original, layer=copy)
                view.write_zeros(mask_of(original.matrix()))
                storages.append(view.storage)
        return storages

    def _check_calibration(self, model: nn.Module) -> None:
        if has_shards(model) and self.options.get("calibration") is not None:
            raise ValueError(
                "Calibration needs whole blocks, and the weights are sharded over processes already. Prune before "
                "they are sharded: call `prune` before training, or use SparseTrainer without a schedule. With "
                "ZeRO-3, load the model before the training arguments are made. Or prune by criterion "
                '"magnitude".'
            )

    def _targets(self) -> tuple[Targets, Targets]:
        return self.options.get("target_modules"), self.options.get("exclude_modules")

    def _norm(self, model: nn.Module) -> tuple[float, float]:
        """Return (‖W‖², number of nonzero entries) of the prunable weights."""
        weights = prunable_weights(model, *self._targets()).values()
        # `prune` refuses the others, and says what to do.
        matrices = [weight.matrix() for weight in weights if obstacle(weight) is None]
        norms = to_host([torch.linalg.vector_norm(matrix, dtype=torch.float32) for matrix in matrices])
        return sum(norm**2 for norm in norms), float(sum(to_host([count_kept(matrix) for matrix in matrices])))


def _refresh(scheduler: Any) -> None:
    # Accelerate wraps the scheduler.
    inner = getattr(scheduler, "scheduler", scheduler)
    if isinstance(inner, RetrainingSchedule):
        inner.refresh()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _restart(optimizer: Optimizer, in_place: bool) -> None:
    """Reset the optimiser's state to that before its first step. In place.

    Args:
        in_place: whether the tensors of the state are set to zero instead of deleted. DeepSpeed needs this, because it
            holds references to them.
    """
    for parameter, state in list(optimizer.state.items()):
        # If a DTensor has no state, torch takes an optimiser step when it saves the state, and Adam counts this step.
        if not in_place and not isinstance(parameter, DTensor):
            del optimizer.state[parameter]
            continue
        for key, value in state.items():
            state[key] = value.zero_() if isinstance(value, Tensor) else type(value)(0)
    for group in optimizer.param_groups if in_place else ():
        # DeepSpeed's own optimisers count their steps here.
        if "step" in group:
            group["step"] = 0


def _check_restarts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, SparseLoraLayer) or module.quantization_backend is not None:
            raise ValueError(
                f"PruningCycles merges and resets the adapters, and {name!r}, a {type(module).__name__}, does not "
                "support this. Use MaskLoRAConfig or ScaledLoRAConfig on a model that is not quantised."
            )
        if others := sorted(set(module.A) - set(module.active_adapters)):
            raise ValueError(
                f"PruningCycles merges the active adapter into the base weights. The adapter {others[0]!r} would then "
                f"compute something else. Call `delete_adapter({others[0]!r})`, or train on a copy of the model."
            )
