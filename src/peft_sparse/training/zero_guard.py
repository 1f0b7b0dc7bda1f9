"""The zero guard: it keeps the zeros of the weights during training, in one process or in several processes."""

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
from ..model.kinds import count_zeros, is_quantised
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

# How many times each model was pruned. A guard compares the count, because it may be called before or after the
# callback that prunes.
_prunings: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def note_pruning(model: nn.Module) -> None:
    """Record that `model` has new zeros, for its zero guards."""
    _prunings[base_model(model)] = _prunings.get(base_model(model), 0) + 1


class ZeroGuardCallback(TrainerCallback, ExportableState):
    """Keeps the zeros of the weights during training, and raises if a zero is lost. Works with any Trainer.

    When training begins, the callback stores the mask M of each prunable weight, at 1/8 byte per entry. It compares
    the weights with the masks at the end of training. `SparseTrainer` also compares them at each log and before each
    save; with another Trainer call `check`.

    Weights that are trained directly, without an adapter, keep their zeros under any optimiser: this is full
    fine-tuning of a pruned model, "FullFT" in Zimmer et al. 2023, arXiv:2312.15230. The gradient becomes M ⊙ ∇W before
    it is clipped. After each optimiser step, W becomes M ⊙ W. Optimisers that combine several entries, such as Muon,
    need this. The optimiser's state for pruned entries, such as the momentum, is set to zero when training begins, and
    stays zero. If a `PruningCallback` prunes during training, the guard stores the new masks.

    If FSDP2 or ZeRO-3 shard the weights, each process stores the mask of its own part. DeepSpeed's optimisers update
    copies of the weights. The callback does not write zeros into these copies after a step: they stay zero because
    gradients and momenta are zero there. With DeepSpeed the optimiser must therefore update each entry on its own.

    If LoRA is attached to a pruned weight, the callback logs a warning: training keeps the zeros of the base weight,
    and merging fills them.

    The checkpoint's `trainer_state.json` holds a fingerprint of each mask.

    Args:
        target_modules: the layers to guard, as names, name endings or a regular expression, as in PEFT. The default is
            every linear or convolution layer and fused expert inside the blocks.
        exclude_modules: the layers not to guard, in the same form.

    Raises:
        ValueError: when training begins, if the run is resumed from a checkpoint whose masks differ from the model's,
            or if the model is sharded by FSDP1.
        RuntimeError: when training ends, if a weight lost a zero.
    """

    def __init__(self, target_modules: Targets = None, exclude_modules: Targets = None) -> None:
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.weights: dict[str, WeightView] = {}
        # One parameter may store several weights, those of fused experts. The key is the name of the first of them.
        self.parameters: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.pruned: list[str] = []
        self.trained: dict[str, Tensor] = {}
        self.fingerprints: dict[str, str] = {}
        self._hooks: list[RemovableHandle] = []
        # (zeros, entries) of the weights that are quantised.
        self._of_quantised: list[tuple[int, int]] = []
        self._model: nn.Module | None = None
        self._followed = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores of this callback: its arguments and the fingerprints of the masks."""
        targets = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        # Only one process calls this, but gathering shards needs all. `on_step_end` has computed their fingerprints.
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
        """Compare the weights with the stored masks. All processes must call this together.

        Raises:
            RuntimeError: an entry that was zero when its mask was stored is not zero now. The message names the first
                such weight.
        """
        lost = [_lost(packed_mask(parameter), self.kept[name]) for name, parameter in self.parameters.items()]
        if not any(flags := totals(lost, list(self.parameters.values()))):
            return
        name = next(name for name, flag in zip(self.parameters, flags, strict=True) if flag)
        raise RuntimeError(
            f"The weight of {self._culprit(name)!r} lost zeros during training. The number of such weights is "
            f"{sum(map(bool, flags))}. The model was not saved. The zeros were changed between two optimiser steps, "
            "for example by merging a dense adapter, or by code of your own. Train with MaskLoRAConfig, whose merge "
            "fills no zero."
        )

    def _culprit(self, name: str) -> str:
        """Return the name of the first weight that lost zeros, among those stored in the parameter of `name`."""
        parameter = self.parameters[name]
        if is_sharded(parameter):
            return name
        lost = mask_of(parameter.detach()) & ~unpack(self.kept[name].to(parameter.device), parameter.shape)
        weights = ((key, w) for key, w in self.weights.items() if w.storage is parameter)
        return next((key for key, weight in weights if weight.matrix_of(lost).any()), name)

    def sparsity(self) -> float:
        """Return the fraction of zeros in the guarded weights. All processes must call this together."""
        plain = {n: c for n, c in self._counts().items() if not is_quantised(self.parameters[n])}
        return share([*plain.values(), *self._of_quantised])

    def _remember(self, optimizer: Optimizer | None) -> None:
        """Store the masks that the weights have now, and register the hooks that keep them."""
        self._forget_hooks()
        self._followed = self._pruned()
        if self._model is not None:
            reshard(self._model)
        firsts: dict[int, str] = {}
        for name, weight in self.weights.items():
            firsts.setdefault(id(weight.storage), name)
        self.parameters = {name: self.weights[name].storage for name in firsts.values()}
        # Training does not change these, and reading them takes long.
        quantised = {n: w for n, w in self.weights.items() if is_quantised(w.storage)}
        self._of_quantised = [count_zeros(quantised)] if quantised else []
        self.kept = {name: packed_mask(parameter) for name, parameter in self.parameters.items()}
        # A parameter that is frozen now may be unfrozen later, if the optimiser holds it.
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
            # PyTorch refuses a hook on a frozen parameter, but keeps it if the parameter is frozen afterwards.
            self._hooks.append(keep_gradients_masked(parameter.requires_grad_(True)))
            parameter.requires_grad_(not frozen)
            _clear_state(optimizer, parameter)

    def _warn_of_dense_adapters(self) -> None:
        pruned = {id(self.weights[name].layer): name for name in self.pruned}
        adapted = [m for m in self._model.modules() if isinstance(m, LoraLayer)] if self._model is not None else []
        dense = [pruned[id(base_layer(layer))] for layer in adapted if id(base_layer(layer)) in pruned]
        if dense:
            logger.warning(
                "LoRA is attached to %d pruned weights, the first of which is %r. Training keeps the zeros of the "
                "base weights, and merging fills them. Use MaskLoRAConfig, or do not merge.",
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
        """Return the fingerprints that may have changed since the masks were stored."""
        if self._behind():
            return _fingerprints(self.weights)
        # Training can bring further entries of trained weights to exactly zero, above all in half precision.
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
    # The weight may have moved to another device after its mask was stored.
    return (mask & ~kept.to(mask.device)).any()


def packed_mask(parameter: Tensor) -> Tensor:
    """Return the packed mask of this process's part of `parameter`."""
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
    """Set each later gradient of `parameter` to zero where the parameter is zero, by a hook that is returned."""
    if isinstance(parameter, DTensor):
        # Autograd computes the gradient of the gathered weight. FSDP sets the shard's gradient, then calls the hook.
        return parameter.register_post_accumulate_grad_hook(_mask_gradient)
    return parameter.register_hook(partial(_masked, parameter))


@torch.no_grad()
def put_zeros_back(parameter: Tensor, kept: Tensor) -> None:
    """Set the pruned entries of this process's part of `parameter` to zero. In place.

    Args:
        parameter: the parameter, which may be sharded.
        kept: the packed mask of this process's part.
    """
    part = own_part(parameter)
    # On CPUs this takes half the time of `masked_fill_`.
    mask_(part, unpack(kept.to(part.device), part.shape).to(part.dtype))


def _mask_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        mask_(own_part(parameter.grad), own_part(parameter))


def _masked(parameter: Tensor, gradient: Tensor) -> Tensor:
    # Unlike a hook after accumulation, a tensor's hook runs before DDP averages. It must not change its argument.
    return mask_(gradient.clone(), parameter.detach())


def _clear_state(optimizer: Optimizer | None, parameter: Tensor) -> None:
    """Set the optimiser's state to zero for the entries of `parameter` that are zero."""
    if optimizer is not None:
        for part, value in deepspeed_copies(parameter, optimizer):
            mask_(value, part.to(value.dtype))
    for value in {} if optimizer is None else optimizer.state.get(parameter, {}).values():
        # Only states with one number per entry are changed: factored states have fewer, and quantised states may not
        # store zero as 0.
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            own_part(value).masked_fill_(~mask_of(own_part(parameter)), 0)


def _compare(saved: dict[str, str], found: dict[str, str]) -> None:
    differing = [name for name in saved | found if saved.get(name) != found.get(name)]
    if differing:
        raise ValueError(
            f"The masks of the checkpoint and of the model differ in {len(differing)} weights, the first of which is "
            f"{differing[0]!r}. Resume with the same base model, pruning arguments and calibration data."
        )
