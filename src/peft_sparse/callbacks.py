"""When to prune during training, and the guard that no zero is lost. How to prune stays in `prune`."""

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .blocks import Targets, base_model, prunable_weights
from .masks import Pattern, Unstructured, fingerprint, mask_, mask_of, pack, parse_pattern, unpack
from .prune import prune
from .report import PruningReport
from .schedules import PruningSchedule
from .tasks import to_host, zero_counts
from .tuners.layer import SparseLoraLayer
from .weights import WeightView


# How often a callback pruned each model: what tells guards, whatever the order of callbacks, that there are new zeros.
_prunings: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class PruningCallback(TrainerCallback):
    """Prunes the model when training begins, or step by step by a schedule. Works with any `transformers.Trainer`.

    Adapters are switched off meanwhile, so that a resumed run, whose adapter is trained already, prunes its dense base
    as the first run did; on a base that is pruned already nothing changes. Biases that PEFT trains in place are beyond
    that: `SparseTrainer` prunes before it loads a checkpoint, elsewhere add a `ZeroGuardCallback`, which notices. Of
    weights that are trained themselves the checkpoint holds the pruned ones, and nothing is pruned again.

    With `PruningCycles` the MaskLoRA or ScaledLoRA adapters are merged into the base when a cycle ends, the merged
    weights are pruned, and the adapters start anew, as does the state of the optimiser; its parameters stay the same
    objects. With `CubicSchedule` adapters stay, and weights of the base alone are scored.

    Every pruning is noted in `state.log_history`, as `pruning`: the sparsity reached.

    Args:
        schedule: when to prune to what; by default once, when training begins.
        pattern, and every other argument: as in `prune`.

    Raises:
        TypeError: `prune` has no such argument.
        ValueError: a schedule for what is no single sparsity. When training begins: a run too short for the schedule
            or with `load_best_model_at_end`, cycles with other adapters, or cycles resumed after the first, whose
            merged base no checkpoint of an adapter holds.
    """

    def __init__(
        self,
        pattern: float | str | Pattern | Mapping[str, float | str | Pattern],
        *,
        schedule: PruningSchedule | None = None,
        **options: Any,
    ) -> None:
        inspect.signature(prune).bind(None, pattern, **options)
        self.options: dict[str, Any] = {"pattern": pattern, **options}
        self.schedule = schedule
        self.report: PruningReport | None = None
        # ||W||² and nonzero entries, before and after pruning.
        self.norms: list[tuple[float, float]] = []
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
        elif self.report is not None:
            return
        past = [step for step in self._due if step <= state.global_step]
        if state.global_step and not isinstance(model, PeftModel) and any("pruning" in e for e in state.log_history):
            return
        if len(past) > 1 and self.schedule is not None and self.schedule.restarts:
            raise ValueError(
                f"The checkpoint is of cycle {len(past)}, on a base that the cycles before it changed, and it holds "
                "the adapter alone. Start over, or train the weights themselves, without an adapter."
            )
        if self.schedule is None or past:
            self._prune_at(past[-1] if past else None, model, args, state)

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
            kwargs["optimizer"].state.clear()
        self._prune_at(state.global_step, kwargs["model"], args, state)

    def _prune_at(self, step: int | None, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        if step is not None:
            self.options["pattern"] = dataclasses.replace(self._goal, sparsity=self._due[step])
        self.prune(model, args.seed)
        assert self.report is not None
        state.log_history.append({"pruning": self.report.sparsity, "epoch": state.epoch, "step": state.global_step})

    def prune(self, model: nn.Module, seed: int) -> None:
        """Prune now instead of when training begins."""
        # The seed is set aside and put back: every process draws the same random scores, and the order of the data
        # does not depend on whether the model was pruned here.
        with torch.random.fork_rng(), _adapters_off(model):
            torch.manual_seed(seed)
            before = self._norm(model)
            self.report = prune(model, **self.options)
            self.norms = [before, self._norm(model)]
        _prunings[base_model(model)] = _prunings.get(base_model(model), 0) + 1

    def _norm(self, model: nn.Module) -> tuple[float, float]:
        targets = self.options.get("target_modules"), self.options.get("exclude_modules")
        matrices = [weight.matrix() for weight in prunable_weights(model, *targets).values()]
        norms = to_host([torch.linalg.vector_norm(matrix, dtype=torch.float32) for matrix in matrices])
        return sum(norm**2 for norm in norms), float(sum(to_host([mask_of(matrix).sum() for matrix in matrices])))


class ZeroGuardCallback(TrainerCallback, ExportableState):
    """Remembers the zeros of the model when training begins, at 1/8 byte per weight, and raises if one is lost.

    Weights that are trained themselves keep theirs under any optimiser: full fine-tuning of a pruned model, FullFT in
    Zimmer et al. 2023, arXiv:2312.15230. Their gradient is M ⊙ ∇W before it is accumulated, clipped or averaged, and
    after each step W ← M ⊙ W, which matters to optimisers that mix entries, such as Muon. What the optimiser holds for
    pruned entries when training begins, momentum above all, is cleared; it stays zero. Where a `PruningCallback`
    prunes on the way, the guard takes the new zeros for those to keep.

    A fingerprint of each mask travels in `trainer_state.json`, so that a run resumed on other zeros is refused.
    """

    def __init__(self, target_modules: Targets = None, exclude_modules: Targets = None) -> None:
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.weights: dict[str, WeightView] = {}
        self.kept: dict[str, Tensor] = {}
        self.trained: dict[str, WeightView] = {}
        self.fingerprints: dict[str, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._model: nn.Module | None = None
        self._followed = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the guard: the fingerprints of the masks that its weights have."""
        # Trained weights are in the checkpoint with what training itself brought to zero, in half precision above all.
        changed = self.weights if self._behind() else self.trained
        found = self.fingerprints | {name: _fingerprint(weight) for name, weight in changed.items()}
        targets = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        return {"args": targets, "attributes": {"fingerprints": found}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._model = base_model(kwargs["model"])
        self.weights = prunable_weights(kwargs["model"], self.target_modules, self.exclude_modules)
        self.fingerprints = {name: _fingerprint(weight) for name, weight in self.weights.items()}
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            _compare(saved["attributes"]["fingerprints"], self.fingerprints)
        self._remember(kwargs.get("optimizer"))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._behind():
            self.fingerprints = {name: _fingerprint(weight) for name, weight in self.weights.items()}
            self._remember(kwargs.get("optimizer"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, weight in self.trained.items():
            matrix = weight.matrix()
            # Half the time of filling where a mask says so, on CPUs.
            kept = unpack(self.kept[name].to(matrix.device), matrix.shape).to(matrix.dtype)
            weight.write(mask_(matrix.clone(), kept))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forget_hooks()
        self.check()

    def check(self) -> None:
        """Compare the weights with the remembered zeros.

        Raises:
            RuntimeError: an entry that was zero is not any more; names the first weight.
        """
        lost = [_lost(_packed_mask(self.weights[name]), kept) for name, kept in self.kept.items()]
        if not lost or not any(flags := torch.stack([flag.to(lost[0].device) for flag in lost]).tolist()):
            return
        name = list(self.kept)[flags.index(True)]
        raise RuntimeError(
            f"The weight of {name!r} lost zeros that it had when training began ({sum(flags)} such weights). Nothing "
            "was saved. Something wrote to a pruned weight between optimiser steps, which put zeros back: a dense "
            "adapter merged into it, or code of your own. Train with MaskLoRAConfig, which cannot fill a zero."
        )

    def sparsity(self) -> float:
        """Return the fraction of zeros over the guarded weights."""
        counts = self._counts().values()
        return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts)

    def _remember(self, optimizer: Optimizer | None) -> None:
        """Take the zeros there are for those to keep."""
        self._forget_hooks()
        self._followed = self._pruned()
        self.kept = {name: _packed_mask(weight) for name, weight in self.weights.items()}
        self.trained = {
            name: self.weights[name]
            for name, (zeros, _) in self._counts().items()
            if zeros and _is_trained(self.weights[name].storage, optimizer)
        }
        # Of fused experts, one parameter is the storage of several weights.
        for parameter in {id(weight.storage): weight.storage for weight in self.trained.values()}.values():
            frozen = not parameter.requires_grad
            # Only what requires a gradient takes a hook, and keeps it while frozen.
            self._hooks.append(parameter.requires_grad_(True).register_hook(partial(_masked, parameter)))
            parameter.requires_grad_(not frozen)
            _clear_state(optimizer, parameter)

    def _pruned(self) -> int:
        return 0 if self._model is None else _prunings.get(self._model, 0)

    def _behind(self) -> bool:
        return self._pruned() != self._followed

    def _forget_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _counts(self) -> dict[str, tuple[int, int]]:
        return zero_counts(self.weights) if self.weights else {}


def _lost(mask: Tensor, kept: Tensor) -> Tensor:
    # A block may have moved to another device since, for its turn.
    return (mask & ~kept.to(mask.device)).any()


def _packed_mask(weight: WeightView) -> Tensor:
    return pack(mask_of(weight.matrix()))


def _fingerprint(weight: WeightView) -> str:
    return fingerprint(mask_of(weight.matrix()))


def _masked(parameter: Tensor, gradient: Tensor) -> Tensor:
    # A hook on the tensor, unlike one after accumulation, runs before DDP averages. It must not change its argument.
    return mask_(gradient.clone(), parameter.detach())


def _is_trained(parameter: Tensor, optimizer: Optimizer | None) -> bool:
    # The optimiser's too while it is frozen: it may be trained again.
    groups = [] if optimizer is None else optimizer.param_groups
    return parameter.requires_grad or any(parameter is other for group in groups for other in group["params"])


def _clear_state(optimizer: Optimizer | None, parameter: Tensor) -> None:
    """Zero what `optimizer` holds for the entries of `parameter` that are zero."""
    for value in {} if optimizer is None else optimizer.state.get(parameter, {}).values():
        # Factored and quantised state has no entry per weight, or zero is not its code of zero.
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            value.masked_fill_(~mask_of(parameter.detach()), 0)


@torch.no_grad()
def restart_adapters(model: nn.Module) -> None:
    """Make what the adapters learned part of the base weights, for good, and start them anew. In place."""
    for layer in model.modules():
        if isinstance(layer, SparseLoraLayer):
            layer.restart()


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


def _compare(saved: dict[str, str], found: dict[str, str]) -> None:
    differing = [name for name in saved | found if saved.get(name) != found.get(name)]
    if differing:
        raise ValueError(
            f"The checkpoint was written with other zeros than the model has, in {len(differing)} layers, first "
            f"{differing[0]!r}. Resume on the same base model, with the same pruning arguments and calibration data."
        )
