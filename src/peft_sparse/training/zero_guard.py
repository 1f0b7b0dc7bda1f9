"""The guard that no zero is lost while training, whoever holds the weights: one process or parts of them many."""

import logging
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..model.blocks import Targets, base_layer, base_model, prunable_weights
from ..model.masks import fingerprint, mask_, mask_of, pack, unpack
from ..model.sharding import (
    check_strategy,
    deepspeed_copies,
    has_shards,
    is_sharded,
    own_part,
    reshard,
    totals,
    whole,
    whole_shape,
)
from ..model.weights import WeightView, share
from ..tuners import remember_proof


logger = logging.getLogger(__name__)

# How often a callback pruned each model: what tells guards, whatever the order of callbacks, that there are new zeros.
_prunings: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def note_pruning(model: nn.Module) -> None:
    """Tell the guards of `model` that it has new zeros to keep."""
    _prunings[base_model(model)] = _prunings.get(base_model(model), 0) + 1


class ZeroGuardCallback(TrainerCallback, ExportableState):
    """Remembers the zeros of the model when training begins, at 1/8 byte per weight, and raises if one is lost.

    Weights that are trained themselves keep theirs under any optimiser: full fine-tuning of a pruned model, FullFT in
    Zimmer et al. 2023, arXiv:2312.15230. Their gradient is M ⊙ ∇W before it is clipped, and after each step
    W ← M ⊙ W, which matters to optimisers that mix entries, such as Muon. What the optimiser holds for pruned entries
    when training begins, momentum above all, is cleared; it stays zero. Where a `PruningCallback` prunes on the way,
    the guard takes the new zeros for those to keep.

    Of weights that FSDP2 or ZeRO-3 shard each process remembers its own part. DeepSpeed steps on copies of its own,
    which stay zero where the gradient and the momentum are, so under any optimiser that treats entries one by one.

    LoRA on a pruned weight is told of once: training loses no zero, merging will.

    A fingerprint of each mask travels in `trainer_state.json`, so that a run resumed on other zeros is refused.
    """

    def __init__(self, target_modules: Targets = None, exclude_modules: Targets = None) -> None:
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.weights: dict[str, WeightView] = {}
        # By the first weight that each is the storage of: of fused experts, one parameter holds several weights.
        self.parameters: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.pruned: list[str] = []
        self.trained: dict[str, Tensor] = {}
        self.fingerprints: dict[str, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._model: nn.Module | None = None
        self._followed = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the guard: the fingerprints of the masks that its weights have."""
        targets = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        # One process alone asks for this, and parts of weights are put together by all: then they did so before.
        found = self.fingerprints if self._sharded() else self.fingerprints | self._changed()
        return {"args": targets, "attributes": {"fingerprints": found}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_strategy(kwargs["model"])
        self._model = base_model(kwargs["model"])
        self.weights = prunable_weights(kwargs["model"], self.target_modules, self.exclude_modules)
        self.fingerprints = _fingerprints(self.weights)
        remember_proof(kwargs["model"])
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            _compare(saved["attributes"]["fingerprints"], self.fingerprints)
        self._remember(kwargs.get("optimizer"))
        self._warn_of_dense_adapters()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._behind():
            self.fingerprints = _fingerprints(self.weights)
            remember_proof(kwargs["model"])
            self._remember(kwargs.get("optimizer"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, parameter in self.trained.items():
            put_zeros_back(parameter, self.kept[name])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save and self._sharded():
            self.fingerprints |= self._changed()

    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forget_hooks()
        self.check()

    def check(self) -> None:
        """Compare the weights with the remembered zeros; all processes must do so together.

        Raises:
            RuntimeError: an entry that was zero is not any more; names the first weight.
        """
        lost = [_lost(packed_mask(parameter), self.kept[name]) for name, parameter in self.parameters.items()]
        if not any(flags := totals(lost, list(self.parameters.values()))):
            return
        name = next(name for name, flag in zip(self.parameters, flags, strict=True) if flag)
        raise RuntimeError(
            f"The weight of {self._culprit(name)!r} lost zeros that it had when training began "
            f"({sum(map(bool, flags))} such weights). Nothing was saved. Something wrote to a pruned weight between "
            "optimiser steps, which put zeros back: a dense adapter merged into it, or code of your own. Train with "
            "MaskLoRAConfig, which cannot fill a zero."
        )

    def _culprit(self, name: str) -> str:
        """Return the name of the first weight that lost zeros, of those that share the parameter of `name`."""
        parameter = self.parameters[name]
        if is_sharded(parameter):
            return name
        lost = mask_of(parameter.detach()) & ~unpack(self.kept[name].to(parameter.device), parameter.shape)
        weights = ((key, w) for key, w in self.weights.items() if w.storage is parameter)
        return next((key for key, weight in weights if weight.matrix_of(lost).any()), name)

    def sparsity(self) -> float:
        """Return the fraction of zeros over the guarded weights; all processes must ask for it together."""
        return share(self._counts().values())

    def _remember(self, optimizer: Optimizer | None) -> None:
        """Take the zeros there are for those to keep."""
        self._forget_hooks()
        self._followed = self._pruned()
        if self._model is not None:
            reshard(self._model)
        firsts: dict[int, str] = {}
        for name, weight in self.weights.items():
            firsts.setdefault(id(weight.storage), name)
        self.parameters = {name: self.weights[name].storage for name in firsts.values()}
        self.kept = {name: packed_mask(parameter) for name, parameter in self.parameters.items()}
        # What the optimiser has is trained too while it is frozen: it may thaw.
        groups = [] if optimizer is None else optimizer.param_groups
        optimised = {id(parameter) for group in groups for parameter in group["params"]}
        self.pruned = [name for name, (zeros, _) in self._counts().items() if zeros]
        self.trained = {
            name: self.parameters[name]
            for name in self.pruned
            if self.parameters[name].requires_grad or id(self.parameters[name]) in optimised
        }
        for parameter in self.trained.values():
            frozen = not parameter.requires_grad
            # Only what requires a gradient takes a hook, and keeps it while frozen.
            self._hooks.append(keep_gradients_masked(parameter.requires_grad_(True)))
            parameter.requires_grad_(not frozen)
            _clear_state(optimizer, parameter)

    def _warn_of_dense_adapters(self) -> None:
        pruned = {id(self.weights[name].layer): name for name in self.pruned}
        adapted = [m for m in self._model.modules() if isinstance(m, LoraLayer)] if self._model is not None else []
        dense = [pruned[id(base_layer(layer))] for layer in adapted if id(base_layer(layer)) in pruned]
        if dense:
            logger.warning(
                "LoRA trains %d pruned weights (first %r): their zeros are kept below it, and filled when it is "
                "merged. Train MaskLoRAConfig instead, or never merge.",
                len(dense),
                dense[0],
            )

    def _counts(self) -> dict[str, tuple[int, int]]:
        """Return (zeros, entries) of each parameter."""
        parameters, parts = list(self.parameters.values()), [own_part(p) for p in self.parameters.values()]
        kept = totals([mask_of(part).sum() for part in parts], parameters)
        sizes = [whole_shape(parameter).numel() for parameter in parameters]
        return {name: (size - k, size) for name, k, size in zip(self.parameters, kept, sizes, strict=True)}

    def _changed(self) -> dict[str, str]:
        """Return the fingerprints that are not what they were when training began."""
        if self._behind():
            return _fingerprints(self.weights)
        # Trained weights are in the checkpoint with what training itself brought to zero, in half precision above all.
        storages = {id(parameter) for parameter in self.trained.values()}
        return _fingerprints({name: w for name, w in self.weights.items() if id(w.storage) in storages})

    def _sharded(self) -> bool:
        return self._model is not None and has_shards(self._model)

    def _pruned(self) -> int:
        return 0 if self._model is None else _prunings.get(self._model, 0)

    def _behind(self) -> bool:
        return self._pruned() != self._followed

    def _forget_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _lost(mask: Tensor, kept: Tensor) -> Tensor:
    # A block may have moved to another device since, for its turn.
    return (mask & ~kept.to(mask.device)).any()


def packed_mask(parameter: Tensor) -> Tensor:
    """Return the mask of this process's part of `parameter`, at 1/8 byte per entry."""
    return pack(mask_of(own_part(parameter)))


def _fingerprints(weights: dict[str, WeightView]) -> dict[str, str]:
    by_layer: dict[nn.Module, list[str]] = {}
    for name, weight in weights.items():
        by_layer.setdefault(weight.layer, []).append(name)
    found: dict[str, str] = {}
    for layer, names in by_layer.items():
        with whole(layer):
            found |= {name: fingerprint(mask_of(weights[name].matrix())) for name in names}
    return {name: found[name] for name in weights}


def keep_gradients_masked(parameter: Tensor) -> RemovableHandle:
    """Write zeros into every gradient of `parameter` from now on where it is zero itself."""
    if isinstance(parameter, DTensor):
        # Autograd sees what FSDP gathers; the gradient of the part is set, and its hooks called, by FSDP.
        return parameter.register_post_accumulate_grad_hook(_mask_gradient)
    return parameter.register_hook(partial(_masked, parameter))


@torch.no_grad()
def put_zeros_back(parameter: Tensor, kept: Tensor) -> None:
    """Set this process's part of `parameter` to zero wherever the packed mask `kept` says so. In place."""
    part = own_part(parameter)
    # Half the time of filling where a mask says so, on CPUs.
    mask_(part, unpack(kept.to(part.device), part.shape).to(part.dtype))


def _mask_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        mask_(own_part(parameter.grad), own_part(parameter))


def _masked(parameter: Tensor, gradient: Tensor) -> Tensor:
    # A hook on the tensor, unlike one after accumulation, runs before DDP averages. It must not change its argument.
    return mask_(gradient.clone(), parameter.detach())


def _clear_state(optimizer: Optimizer | None, parameter: Tensor) -> None:
    """Zero what `optimizer` holds for the entries of `parameter` that are zero."""
    if optimizer is not None:
        for part, value in deepspeed_copies(parameter, optimizer):
            mask_(value, part.to(value.dtype))
    for value in {} if optimizer is None else optimizer.state.get(parameter, {}).values():
        # Factored and quantised state has no entry per weight, or zero is not its code of zero.
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            own_part(value).masked_fill_(~mask_of(own_part(parameter)), 0)


def _compare(saved: dict[str, str], found: dict[str, str]) -> None:
    differing = [name for name in saved | found if saved.get(name) != found.get(name)]
    if differing:
        raise ValueError(
            f"The checkpoint was written with other zeros than the model has, in {len(differing)} layers, first "
            f"{differing[0]!r}. Resume on the same base model, with the same pruning arguments and calibration data."
        )
