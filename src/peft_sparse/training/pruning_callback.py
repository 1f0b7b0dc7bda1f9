"""When to prune during training. How to prune stays in `prune`."""

import contextlib
import dataclasses
import inspect
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..model.blocks import Targets, base_model, prunable_weights
from ..model.masks import mask_of
from ..model.sharding import has_shards, uses_deepspeed, whole
from ..model.weights import to_host
from ..pruning.patterns import Pattern, Unstructured, parse_pattern
from ..pruning.prune import prune
from ..pruning.report import PruningReport
from ..tuners.layer import SparseLoraLayer
from .learning_rates import RetrainingSchedule, norm_drop
from .pruning_schedules import PruningSchedule
from .zero_guard import note_pruning


# In checkpoints of adapters, the base weights that a schedule changed.
BASE_NAME = "pruned_base.safetensors"


class PruningCallback(TrainerCallback):
    """Prunes the model when training begins, or step by step by a schedule. Works with any `transformers.Trainer`.

    Adapters are switched off meanwhile, so that a resumed run, whose adapter is trained already, prunes its dense base
    as the first run did; on a base that is pruned already nothing changes. A copy that an adapter trains of a pruned
    layer, by `modules_to_save`, gets the same zeros. Biases that PEFT trains in place are beyond that: `SparseTrainer`
    prunes before it loads a checkpoint, elsewhere add a `ZeroGuardCallback`, which notices. Of weights that are
    trained themselves the checkpoint holds the pruned ones, and nothing is pruned again.

    With `PruningCycles` the MaskLoRA or ScaledLoRA adapters are merged into the base when a cycle ends, the merged
    weights are pruned, and the adapters start anew, as does the state of the optimiser; its parameters stay the same
    objects. With `CubicSchedule` adapters stay, and weights of the base alone are scored.

    Every pruning is noted in `state.log_history`: `pruning`, the sparsity reached, and `norm_drop`, d₁ of "allr"
    (`learning_rates.allr`), which the rates of a `retraining_schedule` follow.

    Args:
        schedule: when to prune to what; by default once, when training begins.
        pattern, and every other argument: as in `prune`.

    Raises:
        TypeError: `prune` has no such argument.
        ValueError: a schedule for what is no single sparsity. When training begins: a run too short for the schedule
            or with `load_best_model_at_end`, cycles with other adapters, or calibrated on a model that is sharded
            already.
        FileNotFoundError: training with adapters is resumed, and the base that the schedule changed is not there.
    """

    def __init__(
        self,
        pattern: float | str | Pattern | Mapping[str, float | str | Pattern],
        *,
        schedule: PruningSchedule | None = None,
        **options: Any,
    ) -> None:
        inspect.signature(prune).bind(None, pattern, **options)
        if isinstance(options.get("calibration"), Iterator):
            # A second pruning, or a second model, is measured on it too.
            options["calibration"] = list(options["calibration"])
        self.options: dict[str, Any] = {"pattern": pattern, **options}
        self.schedule = schedule
        self.report: PruningReport | None = None
        self._pruned: weakref.ref[nn.Module] | None = None
        # ||W||² and nonzero entries, before and after the last pruning.
        self.norms: list[tuple[float, float]] = []
        self._drops: dict[int, float] = {}
        self._due: dict[int, float] = {}
        if schedule is not None:
            goal = None if isinstance(pattern, Mapping) else parse_pattern(pattern)
            if not isinstance(goal, Unstructured):
                raise ValueError(
                    f"A schedule raises one sparsity, and the pattern is {pattern!r}. Pass a sparsity such as 0.5, or "
                    "drop `schedule`."
                )
            self._goal = goal

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if self.schedule is not None:
            due = self.schedule.sparsities(self._goal.sparsity, state.max_steps)
            # A cubic schedule starts at none, which needs no calibration.
            self._due = {step: wanted for step, wanted in due.items() if wanted}
            if self.schedule.restarts:
                _check_restarts(model)
            if args.load_best_model_at_end:
                raise ValueError(
                    "`load_best_model_at_end` may go back to a checkpoint of a lower sparsity, which the schedule "
                    "left behind. Set it to False."
                )
        elif self.has_pruned(model):
            return
        self._drops = {e["step"]: e["norm_drop"] for e in state.log_history if "norm_drop" in e}
        past = [step for step in self._due if step <= state.global_step]
        if state.global_step and not isinstance(model, PeftModel) and any("pruning" in e for e in state.log_history):
            return
        if self._base_changed(state) and isinstance(model, PeftModel):
            load_base(model, _checkpoint(args, state) / BASE_NAME)
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
            # In every process the same, as for random scores.
            with torch.random.fork_rng():
                torch.manual_seed(args.seed + state.global_step)
                restart_adapters(kwargs["model"])
            _restart(kwargs["optimizer"], in_place=uses_deepspeed(base_model(kwargs["model"])))
        self._prune_at(state.global_step, kwargs["model"], args, state)
        _refresh(kwargs.get("lr_scheduler"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._base_changed(state) and isinstance(kwargs["model"], PeftModel):
            save_base(kwargs["model"], _checkpoint(args, state) / BASE_NAME, write=args.should_save)

    def _base_changed(self, state: TrainerState) -> bool:
        """Whether the base is no longer what pruning the first one again gives: merged, or measured on the way."""
        again = self.schedule is not None and (self.schedule.restarts or self.options.get("calibration") is not None)
        return again and sum(step <= state.global_step for step in self._due) > 1

    def _prune_at(self, step: int | None, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        if step is not None:
            self.options["pattern"] = dataclasses.replace(self._goal, sparsity=self._due[step])
        self.prune(model, args.seed)
        assert self.report is not None
        before, after = self.norms
        drop = self._drops[state.global_step] = norm_drop(before, after) if after[1] < before[1] else 0.0
        entry = {"pruning": self.report.sparsity, "norm_drop": drop}
        state.log_history.append(entry | {"epoch": state.epoch, "step": state.global_step})

    def norm_drop(self, cycle: int) -> float:
        """Return d₁ of pruning in the `cycle`, counted from 0; 1 until it is pruned, and 0 where nothing was lost."""
        steps = sorted(self._due)
        return self._drops.get(steps[cycle], 1.0) if cycle < len(steps) else 1.0

    def has_pruned(self, model: nn.Module) -> bool:
        """Tell whether `model` is the one that this callback pruned last."""
        return self._pruned is not None and self._pruned() is base_model(model)

    def prune(self, model: nn.Module, seed: int) -> None:
        """Prune now instead of when training begins."""
        # The seed is set aside and put back: every process draws the same random scores, and the order of the data
        # does not depend on whether the model was pruned here.
        self._check_calibration(model)
        with torch.random.fork_rng(), whole(model, write=True):
            torch.manual_seed(seed)
            with _adapters_off(model):
                before = self._norm(model)
                self.report = prune(model, **self.options)
                self.norms = [before, self._norm(model)]
            self._prune_copies(model)
        # Only referred to: a `model_init` makes others.
        self._pruned = weakref.ref(base_model(model))
        note_pruning(model)

    def _prune_copies(self, model: nn.Module) -> None:
        """Give the copies that adapters have of pruned layers, by `modules_to_save`, the zeros of these."""
        assert self.report is not None
        with _adapters_off(model):
            originals = prunable_weights(model, *self._targets())
        active = prunable_weights(model, *self._targets())
        for name in (weight.name for weight in self.report.weights):
            if active[name].storage is not originals[name].storage:
                active[name].write_zeros(mask_of(originals[name].matrix()))

    def _check_calibration(self, model: nn.Module) -> None:
        if has_shards(model) and self.options.get("calibration") is not None:
            raise ValueError(
                "The weights are sharded over processes, and their inputs are measured on whole blocks. Prune before "
                "they are sharded: with `prune` before training, or SparseTrainer without a schedule, for ZeRO-3 on a "
                'model loaded before the training arguments were made. Or prune by "magnitude".'
            )

    def _targets(self) -> tuple[Targets, Targets]:
        return self.options.get("target_modules"), self.options.get("exclude_modules")

    def _norm(self, model: nn.Module) -> tuple[float, float]:
        """Return (‖W‖², nonzero entries)."""
        matrices = [weight.matrix() for weight in prunable_weights(model, *self._targets()).values()]
        norms = to_host([torch.linalg.vector_norm(matrix, dtype=torch.float32) for matrix in matrices])
        return sum(norm**2 for norm in norms), float(sum(to_host([mask_of(matrix).sum() for matrix in matrices])))


def _refresh(scheduler: Any) -> None:
    # Accelerate wraps it.
    inner = getattr(scheduler, "scheduler", scheduler)
    if isinstance(inner, RetrainingSchedule):
        inner.refresh()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def save_base(model: nn.Module, path: Path, *, write: bool) -> None:
    """Write the adapted base weights, which a schedule changed, beside the adapter that goes with them.

    Args:
        write: whether this process does, or only takes part in gathering.
    """
    state: dict[str, Tensor] = {}
    for name, layer in _adapted(model):
        with whole(layer):
            if write:
                state[name] = layer.read_weight().detach().cpu().contiguous()
    if write:
        save_file(state, path)


def load_base(model: nn.Module, path: Path) -> None:
    """Read what `save_base` wrote. In place.

    Raises:
        FileNotFoundError: there is nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"The adapter was trained on a base that was pruned several times on the way, and {str(path)!r}, which "
            "has it, is not there. Resume with the `output_dir` that the run had, and all that is in its checkpoints."
        )
    with safe_open(path, framework="pt") as file:
        for name, layer in _adapted(model):
            with whole(layer, write=True):
                layer.write_weight(file.get_tensor(name))


def _adapted(model: nn.Module) -> Iterator[tuple[str, SparseLoraLayer]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, SparseLoraLayer))


@torch.no_grad()
def restart_adapters(model: nn.Module) -> None:
    """Make what the adapters learned part of the base weights, for good, and start them anew. In place."""
    for _, layer in _adapted(model):
        with whole(layer, write=True):
            layer.restart()


def _restart(optimizer: Optimizer, in_place: bool) -> None:
    """Make the optimiser's state what it was before its first step. In place.

    Args:
        in_place: by zeros, because somebody else refers to the tensors.
    """
    for parameter, state in list(optimizer.state.items()):
        # Where there is none, torch makes one to save a DTensor's by a step of its own, which Adam counts.
        if not in_place and not isinstance(parameter, DTensor):
            del optimizer.state[parameter]
            continue
        for key, value in state.items():
            state[key] = value.zero_() if isinstance(value, Tensor) else type(value)(0)
    for group in optimizer.param_groups if in_place else ():
        # Where DeepSpeed's own optimisers count.
        if "step" in group:
            group["step"] = 0


def _check_restarts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, SparseLoraLayer) or module.quantization_backend is not None:
            raise ValueError(
                f"When a cycle ends adapters are merged and start anew, which {name!r}, a {type(module).__name__}, "
                "cannot. Use MaskLoRAConfig or ScaledLoRAConfig on a base that is not quantised."
            )


@contextlib.contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    if not isinstance(model, PeftModel):
        yield
        return
    with warnings.catch_warnings():
        # Trained biases stay, as the class documents.
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        with model.disable_adapter():
            yield
