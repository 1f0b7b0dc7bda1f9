"""Trains one region to reproduce given outputs, by masked full weights or by any PEFT tuner that keeps zeros."""

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..model.blocks import is_norm
from ..model.masks import mask_of
from ..model.weights import WeightView
from .regions import Region


Loss = Literal["mse", "relative_mse", "cosine"]
Pair = Callable[[int], tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class Step:
    """One optimiser step, as it is told to whoever logs: `loss` is on the device still, and waits to be read."""

    region: str
    number: int
    of: int
    loss: Tensor
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """How every region is trained; the arguments of `reconstruct` of the same names."""

    tuner: Literal["full"] | PeftConfig
    loss: Loss
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer, int], LRScheduler]
    epochs: float
    max_steps: int | None
    gradient_accumulation_steps: int
    max_grad_norm: float | None
    autocast: torch.dtype | None
    seed: int
    on_step: Callable[[Step], None] | None

    def steps(self, batches: int) -> int:
        """Return how many optimiser steps a region takes on so many batches."""
        if self.max_steps is not None:
            return self.max_steps
        # Parts of an epoch round up, as in `Trainer`.
        return max(1, math.ceil(self.epochs * -(-batches // self.gradient_accumulation_steps)))


def fit(
    region: Region,
    run: Callable[[int, Tensor], Tensor],
    pair: Pair,
    batches: list[int],
    parameters: list[nn.Parameter],
    masks: dict[nn.Parameter, Tensor],
    recipe: Recipe,
    number: int,
) -> int:
    """Train `parameters` until `run` reproduces the targets; return the number of optimiser steps.

    Args:
        run: (batch, inputs) -> outputs of the region.
        pair: batch -> (inputs, targets, which tokens are not padding).
        batches: those to train on; their order is drawn anew each epoch from the seed and `number`.
        masks: of parameters whose zeros stay zero.
    """
    steps = recipe.steps(len(batches))
    optimizer = recipe.optimizer(parameters)
    scheduler = recipe.scheduler(optimizer, steps)
    generator = torch.Generator().manual_seed(seed_of(recipe.seed, number))
    device = parameters[0].device
    half = recipe.autocast is not None
    with contextlib.ExitStack() as undo:
        for parameter, mask in masks.items():
            undo.callback(parameter.register_post_accumulate_grad_hook(_masking(mask)).remove)
        undo.enter_context(torch.enable_grad())
        for done, window in enumerate(_windows(batches, recipe.gradient_accumulation_steps, steps, generator)):
            loss, size = torch.zeros((), device=device), torch.zeros((), device=device)
            for i in window:
                inputs, target, keep = pair(i)
                with torch.autocast(device.type, recipe.autocast, enabled=half):
                    outputs = run(i, inputs)
                part, of = region_loss(outputs.float(), target, keep, recipe.loss)
                part.backward()
                loss, size = loss + part.detach(), size + of
            # Batches count by their tokens, so that a step does not depend on how sequences are batched.
            scale = size.clamp_min(torch.finfo(size.dtype).tiny).reciprocal()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
            if recipe.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for parameter, mask in masks.items():
                    parameter.mul_(mask)
            if recipe.on_step is not None:
                rate = float(scheduler.get_last_lr()[0])
                recipe.on_step(Step(region.name, done + 1, steps, loss * scale, rate))
    return steps


def region_loss(outputs: Tensor, target: Tensor, keep: Tensor | None, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return numerator and denominator of the loss of outputs f(x) against targets t.

    All tokens that `keep` (sequences, tokens) marks count. mse: mean of (f(x) - t)² over tokens and features.
    relative_mse: Σ (f(x) - t)² / Σ t². cosine: mean over tokens of 1 - cos(f(x), t). Of several batches, each is the
    sum of the numerators by that of the denominators.
    """
    if keep is not None and keep.shape == outputs.shape[:-1]:
        outputs, target = outputs[keep], target[keep]
    if loss == "cosine":
        apart = 1 - nn.functional.cosine_similarity(outputs, target, dim=-1)
        return apart.sum(), apart.new_tensor(apart.numel())
    squared = (outputs - target).square().sum()
    return squared, target.square().sum() if loss == "relative_mse" else squared.new_tensor(target.numel())


@torch.no_grad()
def relative_error_of(run: Callable[[int, Tensor], Tensor], pair: Pair, batches: list[int]) -> float:
    """Return ||f(x) - t|| / ||t|| over the tokens of `batches` that are not padding; 0 where t is."""
    sums = []
    for i in batches:
        inputs, target, keep = pair(i)
        sums.append(torch.stack(region_loss(run(i, inputs), target, keep, "relative_mse")))
    error, size = torch.stack(sums).double().sum(0).tolist()
    return math.sqrt(error / size) if size else 0.0


def held_out_batches(holdout: float, batches: int) -> int:
    """Return how many of so many batches measure errors and are not trained on; one at least is left to train."""
    # Rounded first: 0.14 * 50 is 7.000000000000001.
    return min(math.ceil(round(holdout * batches, 6)), batches - 1)


def seed_of(seed: int, number: int) -> int:
    """Return the seed of region `number`, the same whatever was drawn before it."""
    return seed * 1_000_003 + number


@contextlib.contextmanager
def trainable(
    region: Region, weights: dict[str, WeightView], tuner: Literal["full"] | PeftConfig
) -> Iterator[tuple[list[nn.Parameter], dict[nn.Parameter, Tensor], Callable[[], None], Callable[[], None]]]:
    """Make what `tuner` trains of the region trainable within the context.

    Yields the parameters; the masks of those that must keep zeros; a function that makes what was learned part of the
    plain weights; and one that undoes it, before or after that, which an error does as well.
    """
    adapted = {} if tuner == "full" else {name: weights[name] for name in adapted_weights(tuner, weights)}
    plain = _plain_parameters(region, tuner, adapted)
    changed = {id(p): p for p in (*plain, *(weight.storage for weight in adapted.values()))}
    before = [(parameter, parameter.detach().clone()) for parameter in changed.values()]
    adapters: list[BaseTuner] = []

    def keep() -> None:
        while adapters:
            adapters.pop().merge_and_unload()

    def undo() -> None:
        while adapters:
            adapters.pop().unload()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)

    try:
        if tuner != "full":
            adapters.extend(_attach(region, list(adapted), tuner))
        for parameter in plain:
            parameter.requires_grad_(True)
        inside = [p for block in region.blocks.values() for p in block.parameters() if p.requires_grad]
        # Of matrices that are not pruned now too: they may have been before.
        masks = {p: mask_of(p.detach()) for p in plain if p.dim() > 1}
        yield inside, masks, keep, undo
    except BaseException:
        undo()
        raise
    finally:
        for parameter in plain:
            parameter.requires_grad_(False)
            parameter.grad = None


def check_tuner(tuner: Any) -> None:
    """Raise unless `tuner` is "full" or a PEFT configuration that regions can take."""
    if tuner == "full":
        return
    kind = PEFT_TYPE_TO_TUNER_MAPPING.get(tuner.peft_type) if isinstance(tuner, PeftConfig) else None
    if kind is None or not issubclass(kind, BaseTuner):
        raise TypeError(
            f'`tuner` must be "full" or the configuration of a PEFT tuner such as MaskLoRAConfig, got {tuner!r}.'
        )
    for name, none in (("train_head", "none"), ("modules_to_save", None), ("target_parameters", None)):
        value = getattr(tuner, name, none)
        if value not in (none, None, []):
            raise ValueError(
                f"`{name}={value!r}` reaches beyond what a region holds. Leave it out of the configuration; "
                "`train_norms` and `bias` work."
            )


def adapted_weights(config: PeftConfig, weights: dict[str, WeightView]) -> list[str]:
    """Return the names of those of `weights` that `config` puts adapters on, by its `target_modules`."""
    wanted: Any = copy.copy(config)
    names = [name for name, weight in weights.items() if weight.expert is None]
    if wanted.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        # Not a regular expression, beside which PEFT heeds no choice of layers.
        wanted.target_modules = {name.rpartition(".")[2] for name in names}
    hits = {name: check_target_module_exists(wanted, name) for name in names}
    return [name for name, hit in hits.items() if hit and not isinstance(hit, _ExcludedModule)]


def _attach(region: Region, names: list[str], config: PeftConfig) -> Iterator[BaseTuner]:
    """Put adapters on the weights called so, block by block, and yield the tuners."""
    for block_name, block in region.blocks.items():
        inside = {name.removeprefix(f"{block_name}."): name for name in names if name.startswith(f"{block_name}.")}
        if inside:
            own: Any = copy.copy(config)
            own.target_modules = set(inside)
            # PERP's groups are trained in place, region by region; the rest has been chosen by the model's names.
            for option, off in (("train_norms", False), ("bias", "none"), ("exclude_modules", None),
                                ("layers_to_transform", None), ("layers_pattern", None)):  # fmt: skip
                if hasattr(own, option):
                    setattr(own, option, off)
            for option in ("rank_pattern", "alpha_pattern"):
                values = getattr(config, option, None) or {}
                keys = {local: get_pattern_key(list(values), name) for local, name in inside.items()}
                if values:
                    setattr(own, option, {re.escape(n): values[key] for n, key in keys.items() if key in values})
            yield PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](block, own, "default")


def _plain_parameters(
    region: Region, tuner: Literal["full"] | PeftConfig, adapted: dict[str, WeightView]
) -> list[nn.Parameter]:
    """Return the region's own parameters that are trained in place: all, or those of PERP's groups."""
    if tuner == "full":
        return [p for p in region.parameters.values() if p.is_floating_point()]
    bias = getattr(tuner, "bias", "none")
    layers = [weight.layer for weight in adapted.values()]
    chosen: set[int] = set()
    for module in (module for block in region.blocks.values() for module in block.modules()):
        if getattr(tuner, "train_norms", False) and is_norm(module):
            chosen |= {id(parameter) for parameter in module.parameters()}
        # As in PEFT: those of all modules, or, if the choice is called "..._only", those of adapted layers.
        if bias == "all" or (bias != "none" and any(module is layer for layer in layers)):
            chosen.add(id(getattr(module, "bias", None)))
    return [parameter for parameter in region.parameters.values() if id(parameter) in chosen]


def _masking(mask: Tensor) -> Callable[[Tensor], None]:
    def apply(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(mask)

    return apply


def _windows(batches: list[int], size: int, steps: int, generator: torch.Generator) -> Iterable[list[int]]:
    """Yield, for each of so many steps, the batches whose gradients it adds up."""
    done = 0
    while True:
        order = torch.randperm(len(batches), generator=generator).tolist()
        for start in range(0, len(order), size):
            if done == steps:
                return
            yield [batches[i] for i in order[start : start + size]]
            done += 1
