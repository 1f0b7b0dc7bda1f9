"""The zero guard: it keeps every zero of the model during training, in one process or in several processes."""

import logging
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..model.blocks import Targets, base_model, prunable_weights
from ..model.kinds import count_zeros
from ..model.masks import mask_of, unpack
from ..model.sharding import check_strategy, has_shards, is_sharded, reshard, totals
from ..model.weights import WeightView, share
from ..tuners import remember_proof
from ..tuners.merge_trial import warn_of_filling_merges
from .kept_zeros import clear_state, has_lost, keep_gradients_masked, packed_mask, put_zeros_back
from .protected import Place, check_fingerprints, fingerprints_of, protected_names, stored_matrices


logger = logging.getLogger(__name__)

# How many times each model was pruned, and the names of the weights that were. A guard compares the count, because it
# may be called before or after the callback that prunes.
_prunings: WeakKeyDictionary[nn.Module, tuple[int, frozenset[str]]] = WeakKeyDictionary()


def note_pruning(model: nn.Module, names: Iterable[str] = ()) -> None:
    """Record that `model` has new zeros, for its zero guards, in the parameters that `stored_matrices` calls so."""
    count, before = _prunings.get(base_model(model), (0, frozenset()))
    _prunings[base_model(model)] = count + 1, before.union(names)


class ZeroGuardCallback(TrainerCallback, ExportableState):
    """Keeps every zero of the model during training, and raises if a zero is lost. Works with any Trainer.

    When training begins, the callback stores the mask M of each floating-point parameter of two or more dimensions of
    which at least 0.2 % is zero, or which a `PruningCallback` has pruned, at 1/8 byte per entry. It does not matter
    which weights are pruned or adapted in this run: base weights, copies in `modules_to_save`, the output head,
    embeddings, convolutions and experts are protected alike. The parameters of adapters are not. A trained parameter
    that is all zeros is an initial value and may learn, unless it is a linear layer, convolution or fused expert
    inside a block: a warning names such weights, which stay zero. Quantised parameters do not change in training.

    The callback compares the weights with the masks at the end of training. `SparseTrainer` also compares them before
    each save. At each log it compares those that are trained, so that adapters on a frozen base cost nothing. With
    another Trainer call `check`.

    Weights that are trained directly, without an adapter, keep their zeros under any optimiser: this is full
    fine-tuning of a pruned model, "FullFT" in Zimmer et al. 2023, arXiv:2312.15230. The gradient becomes M ⊙ ∇W before
    it is clipped. After each optimiser step, W becomes M ⊙ W. Optimisers that combine several entries, such as Muon,
    need this. The optimiser's state for pruned entries, such as the momentum, is set to zero when training begins, and
    stays zero. If a `PruningCallback` prunes during training, the guard stores the new masks.

    If FSDP2 or ZeRO-3 shard the weights, each process stores the mask of its own part. DeepSpeed's optimisers update
    copies of the weights. The callback does not write zeros into these copies after a step: they stay zero because
    gradients and momenta are zero there. With DeepSpeed the optimiser must therefore update each entry on its own.

    If an adapter whose merge fills zeros, such as LoRA, is attached to a pruned weight, the callback logs a warning:
    training keeps the zeros of the base weight, and merging fills them. This is tried for each kind of adapter, by
    merging a copy of its smallest layer with random values.

    The checkpoint's `trainer_state.json` holds a fingerprint of each mask. A run that is resumed compares them before
    its first step.

    If training does not reach its end, hooks stay on the gradients. `SparseTrainer` removes them in any case. With
    another Trainer call `release`, or train again with the same callback.

    Args:
        target_modules: the layers whose sparsity is logged, as names, name endings or a regular expression, as in
            PEFT. The default is every linear or convolution layer and fused expert inside the blocks. Zeros are kept
            in all layers.
        exclude_modules: the layers that do not count in the logged sparsity, in the same form.

    Raises:
        ValueError: when training begins, if the model is sharded by FSDP1; before the first step, if the run is
            resumed from a checkpoint whose masks differ from the model's. A trained weight may have further zeros.
        RuntimeError: when training ends, if a weight lost a zero.
    """

    def __init__(self, target_modules: Targets = None, exclude_modules: Targets = None) -> None:
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        # The weights whose sparsity is logged.
        self.weights: dict[str, WeightView] = {}
        # The parameters whose zeros are kept, and their masks.
        self.protected: dict[str, Place] = {}
        self.kept: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}
        self.fingerprints: dict[str, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._model: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._followed = 0
        # While training runs: (zeros, entries) of the logged weights that cannot change, and the others.
        self._fixed: tuple[int, int] | None = None
        self._changing: dict[str, WeightView] = {}
        # The fingerprints of the checkpoint until they are compared, and the names of what it protects.
        self._saved: dict[str, str] | None = None
        self._known: frozenset[str] = frozenset()
        self._stepped = False
        # Whether the optimiser has begun a step, and its zeros are not put back yet.
        self._in_step = False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores of this callback: its arguments and the fingerprints of the masks."""
        targets = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        # Only one process calls this, but gathering shards needs all. `on_step_end` has computed their fingerprints.
        changed = {} if self._sharded() else self._changed()
        return {"args": targets, "attributes": {"fingerprints": self.fingerprints | changed}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # An earlier run may have raised.
        self.release()
        check_strategy(kwargs["model"])
        self._model, self._optimizer = kwargs["model"], kwargs.get("optimizer")
        self.weights = prunable_weights(kwargs["model"], self.target_modules, self.exclude_modules)
        saved = state.stateful_callbacks.get(type(self).__name__)
        # Several guards of one trainer save a list. They know the same masks.
        saved = saved[0] if isinstance(saved, list) and saved else saved
        self._saved = saved["attributes"]["fingerprints"] if state.global_step and isinstance(saved, dict) else None
        self._known = frozenset(self._saved or ())
        self._remember()
        stored = {name: place.parameter for name, place in self.protected.items()}
        warn_of_filling_merges(kwargs["model"], stored)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._follow()
        self._compare()
        self._stepped = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._in_step = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._put_zeros_back()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save and self._sharded():
            changed = self._changed()
            self.fingerprints |= changed

    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        try:
            self._compare()
            self.check()
        finally:
            self.release()

    def release(self) -> None:
        """Remove the hooks on the gradients. The masks stay, so that `check` still compares with them.

        If the optimiser was interrupted in the middle of its step, the zeros of the trained weights are put back.
        `SparseTrainer` calls this however training ends. With another Trainer, call it after training has raised.
        """
        if self._in_step:
            self._put_zeros_back()
        while self._hooks:
            self._hooks.pop().remove()
        self._optimizer = self._fixed = self._saved = None
        self._stepped = False

    def _put_zeros_back(self) -> None:
        for name, parameter in self.trained.items():
            put_zeros_back(parameter, self.kept[name])
        self._in_step = False

    def check(self, *, trained_only: bool = False) -> None:
        """Compare the weights with the stored masks. All processes must call this together.

        Args:
            trained_only: compare only the weights that are trained, because training does not change the others.

        Raises:
            RuntimeError: an entry that was zero when its mask was stored is not zero now. The message names the first
                such weight.
        """
        self._follow()
        self._check(self.trained if trained_only else self.kept)

    def _check(self, names: Iterable[str]) -> None:
        found = {name: self.protected[name].found() for name in names}
        parameters = {name: parameter for name, parameter in found.items() if parameter is not None}
        lost = [has_lost(parameter, self.kept[name]) for name, parameter in parameters.items()]
        if not lost or not any(flags := totals(lost, list(parameters.values()))):
            return
        name = next(name for name, flag in zip(parameters, flags, strict=True) if flag)
        raise RuntimeError(
            f"The weight of {self._culprit(name)!r} lost zeros during training. The number of such weights is "
            f"{sum(map(bool, flags))}. The model was not saved. The zeros were changed between two optimiser steps, "
            "for example by merging a dense adapter, or by code of your own. Train with MaskLoRAConfig, whose merge "
            "fills no zero."
        )

    def _culprit(self, name: str) -> str:
        """Return the name of the expert that lost zeros, if the parameter of this name stores several."""
        parameter = self.protected[name].parameter
        experts = {n: w for n, w in self.weights.items() if w.expert is not None and w.storage is parameter}
        if not experts or is_sharded(parameter):
            return name
        lost = mask_of(parameter.detach()) & ~unpack(self.kept[name].to(parameter.device), parameter.shape)
        return next(key for key, expert in experts.items() if expert.matrix_of(lost).any())

    def sparsity(self) -> float:
        """Return the fraction of zeros in the weights of `target_modules`. All processes must call this together."""
        self._follow()
        if self._fixed is None:
            return share([count_zeros(self.weights)])
        return share([self._fixed, count_zeros(self._changing)])

    def _remember(self) -> None:
        """Store the masks that the parameters have now, and register the hooks that keep them."""
        assert self._model is not None
        while self._hooks:
            self._hooks.pop().remove()
        self._followed, pruned = self._pruned()
        reshard(self._model)
        places = stored_matrices(self._model)
        # A parameter that is frozen now may be unfrozen later, if the optimiser holds it.
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        optimised = {id(parameter) for group in groups for parameter in group["params"]}
        learning = {n: p.parameter for n, p in places.items() if _learns(p.parameter, optimised)}
        # The run that is resumed has protected what it pruned, however few zeros that gave.
        names, all_zero = protected_names(places, learning, self._model, pruned | self._known)
        self.protected = {name: places[name] for name in names}
        self.kept = {name: packed_mask(place.parameter) for name, place in self.protected.items()}
        self.trained = {name: learning[name] for name in names if name in learning}
        self.fingerprints = fingerprints_of(self.protected)
        remember_proof(self._model)
        self._changing = {n: w for n, w in self.weights.items() if _may_change(w, optimised)}
        self._fixed = count_zeros({n: w for n, w in self.weights.items() if n not in self._changing})
        for parameter in self.trained.values():
            frozen = not parameter.requires_grad
            # PyTorch refuses a hook on a frozen parameter, but keeps it if the parameter is frozen afterwards.
            self._hooks.append(keep_gradients_masked(parameter.requires_grad_(True)))
            parameter.requires_grad_(not frozen)
            clear_state(self._optimizer, parameter)
        if all_zero:
            logger.warning(
                "%d trained weights consist of zeros, the first of which is %r. They stay zero, because zeros inside "
                "the blocks are a mask. To train such a weight, give it other initial values.",
                len(all_zero),
                all_zero[0],
            )

    def _follow(self) -> None:
        """Store the masks anew, if the model was pruned since they were stored."""
        if self._fixed is not None and self._pruned()[0] != self._followed:
            if self._stepped:
                # Nothing that changes the base weights in training may fill a zero.
                self._check(self.kept)
            self._remember()

    def _compare(self) -> None:
        """Compare the masks with those of the checkpoint, once all callbacks have prepared the model."""
        if self._saved is not None:
            check_fingerprints(self._saved, self.fingerprints, self.trained)
            self._saved = None

    def _changed(self) -> dict[str, str]:
        """Return the fingerprints that may have changed since the masks were stored."""
        self._follow()
        # Training can bring further entries of trained weights to exactly zero, above all in half precision.
        return fingerprints_of({name: self.protected[name] for name in self.trained})

    def _sharded(self) -> bool:
        return self._model is not None and has_shards(self._model)

    def _pruned(self) -> tuple[int, frozenset[str]]:
        nothing: tuple[int, frozenset[str]] = (0, frozenset())
        return nothing if self._model is None else _prunings.get(base_model(self._model), nothing)


def _learns(parameter: Tensor, optimised: set[int]) -> bool:
    return parameter.requires_grad or id(parameter) in optimised


def _may_change(weight: WeightView, optimised: set[int]) -> bool:
    """Return whether training may change the weight: one of the parameters that it is stored in or computed from."""
    stored = weight.layer._parameters.get(weight.parameter)
    parameters = weight.layer.parameters() if stored is None else (stored,)
    return any(_learns(parameter, optimised) for parameter in parameters)
