"""Trains one region to reproduce given outputs: its own weights under their masks, or a tuner that keeps zeros."""

import contextlib
import copy
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_linear_schedule_with_warmup

from ..calibration.copies import ahead
from ..model.blocks import is_norm
from ..model.masks import mask_of
from ..model.weights import WeightView
from .observer import Step
from .regions import Region


Loss = Literal["mse", "relative_mse", "cosine"]
Tuner: TypeAlias = Literal["full"] | PeftConfig
# batch, inputs -> outputs of the region.
Run = Callable[[int, Tensor], Tensor]
# batch -> inputs, targets, and which tokens are not padding.
Pair = Callable[[int], tuple[Tensor, Tensor, Tensor | None]]
# Called with a batch of which `Pair` will be asked next.
Expect = Callable[[int], None]


def _expect_nothing(index: int) -> None:
    pass


@dataclass(frozen=True)
class Fit:
    """How `reconstruct` fits a region f with kept weights θ and mask M to its targets t.

        min over θ of loss(f(x; θ, M), t), with x the calibration inputs of the region

    Each region is trained on its own, in float32, with the model's dropout off. A step adds up the gradients of
    `gradient_accumulation_steps` batches. Tokens that `attention_mask` marks as padding are not counted. If the error
    on the held-out batches is higher after training, or not finite, the region gets back the weights that it had
    before training.

    Zimmer et al. 2023, arXiv:2312.15230, section 3.3 (PERP). "A Free Lunch in LLM Compression", 2025,
    arXiv:2510.14444.

    Args:
        tuner: what is trained. "full" trains all parameters of the region and holds its pruned entries at zero. A PEFT
            configuration trains adapters of that kind and merges them into the weights when the region is finished;
            it must be of a tuner that keeps zeros, such as `MaskLoRAConfig` or `ScaledLoRAConfig`. Its `train_norms`
            and `bias` also train the norms and biases of the region in place.
        loss: "mse": mean of (f(x) - t)² over tokens and features. "relative_mse": Σ (f(x) - t)² / Σ t². "cosine":
            mean over tokens of 1 - cos(f(x), t).
        learning_rate: peak learning rate of the default optimiser and schedule. It is not used if `optimizer` is
            given.
        epochs: passes over the training batches for each region, above 0; fractions are allowed. It is not used if
            `max_steps` is given.
        max_steps: optimiser steps for each region; 0 prunes without training.
        gradient_accumulation_steps: batches for each optimiser step.
        max_grad_norm: the norm of the gradients is clipped to this value; None or 0 does not clip.
        optimizer: function parameters -> optimizer. None is AdamW without weight decay.
        scheduler: function (optimizer, steps) -> learning-rate scheduler. None is a linear warm-up over the first 10 %
            of the steps, and then a linear decay to 0.
        autocast: dtype of mixed precision in the forward pass, such as `torch.bfloat16`; None computes in float32.
        holdout: fraction of the batches, in [0, 1), that are held out: the last ones. They are not trained on, and
            errors are measured on them. The number of held-out batches is rounded up, but at least one batch is
            trained on. If none is held out, errors are measured on the training batches.
        seed: decides the order of the batches, the initial values of adapters, dropout of adapters, and the scores of
            the criterion "random". Each region has its own seed, computed from this one and the region's number.

    Raises:
        TypeError: `tuner` is neither "full" nor the configuration of a PEFT tuner.
        ValueError: the loss is unknown; a number is out of its range; `tuner` sets `train_head`, `modules_to_save` or
            `target_parameters`.
    """

    tuner: Tuner = "full"
    loss: Loss = "mse"
    learning_rate: float = 1e-4
    epochs: float = 1
    max_steps: int | None = None
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    scheduler: Callable[[torch.optim.Optimizer, int], LRScheduler] | None = None
    autocast: torch.dtype | None = None
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"`loss` must be one of {', '.join(map(repr, get_args(Loss)))}, got {self.loss!r}.")
        for name, accepted, wanted in (
            ("holdout", 0 <= self.holdout < 1, "in [0, 1)"),
            ("epochs", self.epochs > 0, "above 0"),
            ("max_steps", self.max_steps is None or self.max_steps >= 0, "None or at least 0"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
        ):
            if not accepted:
                raise ValueError(f"`{name}` must be {wanted}, got {getattr(self, name)!r}.")
        _check_tuner(self.tuner)

    def steps(self, batches: int) -> int:
        """Return how many optimiser steps a region takes if it has `batches` training batches."""
        if self.max_steps is not None:
            return self.max_steps
        # Parts of an epoch round up, as in `Trainer`.
        return max(1, math.ceil(self.epochs * -(-batches // self.gradient_accumulation_steps)))

    def split(self, batches: int) -> tuple[list[int], list[int]]:
        """Return the numbers of the batches to train on, and the numbers of the batches to measure errors on."""
        # Rounded first, because 0.14 * 50 is 7.000000000000001 in floating point.
        held = min(math.ceil(round(self.holdout * batches, 6)), batches - 1)
        train, held_out = range(batches - held), range(batches - held, batches)
        return list(train), list(held_out or train)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of `parameters`."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=0.0, fused=True)

    def make_scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """Return the learning-rate scheduler of a run of `steps` steps."""
        if self.scheduler is not None:
            return self.scheduler(optimizer, steps)
        return get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)


@dataclass
class TrainableRegion:
    """A region while it is trained.

    Args:
        region: the region, with the adapters attached.
        parameters: the parameters that are trained.
        masks: the masks of those parameters whose zeros must stay zero.
        merge: merges the adapters into the weights and removes them.
        undo: removes the adapters, and gives the weights the values that they had before training. It can be called
            before or after `merge`.
    """

    region: Region
    parameters: list[nn.Parameter]
    masks: dict[nn.Parameter, Tensor]
    merge: Callable[[], None]
    undo: Callable[[], None]

    def train(
        self,
        run: Run,
        pair: Pair,
        batches: list[int],
        fit: Fit,
        number: int,
        on_step: Callable[[Step], None] | None = None,
        expect: Expect = _expect_nothing,
    ) -> int:
        """Train the parameters so that `run` reproduces the targets, and return the number of optimiser steps.

        Args:
            run: (batch, inputs) -> outputs of the region.
            pair: batch -> (inputs, targets, which tokens are not padding).
            batches: the batches to train on. Their order is drawn for each epoch from the seed and `number`.
            fit: how to train.
            number: number of the region.
            on_step: called after each optimiser step.
            expect: called with each batch before the batch before it is trained on.
        """
        steps = fit.steps(len(batches)) if self.parameters else 0
        if not steps:
            return 0
        optimizer = fit.make_optimizer(self.parameters)
        scheduler = fit.make_scheduler(optimizer, steps)
        generator = torch.Generator("cpu").manual_seed(seed_of(fit.seed, number))
        by_step = list(_by_step(batches, fit.gradient_accumulation_steps, steps, generator))
        in_order = ahead(itertools.chain.from_iterable(by_step), expect)
        with contextlib.ExitStack() as undo:
            for parameter, mask in self.masks.items():
                undo.callback(parameter.register_post_accumulate_grad_hook(_masking(mask)).remove)
            undo.enter_context(torch.enable_grad())
            for done, chosen in enumerate(by_step):
                loss = self._accumulate(run, pair, itertools.islice(in_order, len(chosen)), fit)
                if fit.max_grad_norm:
                    nn.utils.clip_grad_norm_(self.parameters, fit.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                self._put_zeros_back()
                if on_step is not None:
                    rate = float(scheduler.get_last_lr()[0])
                    on_step(Step(self.region.name, done + 1, steps, loss, rate))
        return steps

    def _accumulate(self, run: Run, pair: Pair, batches: Iterable[int], fit: Fit) -> Tensor:
        """Compute the gradients of the loss over all tokens of `batches`, and return the loss."""
        device = self.parameters[0].device
        loss, size = torch.zeros((), device=device), torch.zeros((), device=device)
        for i in batches:
            inputs, target, keep = pair(i)
            with self.region.recording():
                with torch.autocast(device.type, fit.autocast, enabled=fit.autocast is not None):
                    outputs = run(i, inputs)
                part, of = region_loss(outputs.float(), target, keep, fit.loss)
                part.backward()
            loss, size = loss + part.detach(), size + of
        # Divided once at the end, so that every token counts equally, whatever batch it is in.
        scale = size.clamp_min(torch.finfo(size.dtype).tiny).reciprocal()
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        return loss * scale

    @torch.no_grad()
    def _put_zeros_back(self) -> None:
        for parameter, mask in self.masks.items():
            parameter.mul_(mask)


def region_loss(outputs: Tensor, target: Tensor, keep: Tensor | None, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return the numerator and the denominator of the loss of outputs f(x) against targets t.

    The loss of several batches is the sum of the numerators divided by the sum of the denominators.

    Args:
        outputs: f(x), (sequences, tokens, features).
        target: t, of the same shape.
        keep: which tokens count, (sequences, tokens). A mask of another shape belongs to another stack and is not
            used.
        loss: "mse": mean of (f(x) - t)² over tokens and features. "relative_mse": Σ (f(x) - t)² / Σ t². "cosine":
            mean over tokens of 1 - cos(f(x), t).
    """
    tokens = outputs.new_full((), math.prod(outputs.shape[:-1]))
    own = keep if keep is not None and keep.shape == outputs.shape[:-1] else None
    if own is not None:
        # Zeros in place of tokens. If tokens were picked, the host would wait for the device to know how many.
        tokens = own.sum().to(tokens)
        outputs, target = outputs.where(own[..., None], 0), target.where(own[..., None], 0)
    if loss == "cosine":
        apart = 1 - nn.functional.cosine_similarity(outputs, target, dim=-1)
        return (apart if own is None else apart.where(own, 0)).sum(), tokens
    squared = (outputs - target).square().sum()
    return squared, target.square().sum() if loss == "relative_mse" else tokens * target.shape[-1]


@torch.no_grad()
def relative_error_of(run: Run, pair: Pair, batches: list[int], expect: Expect = _expect_nothing) -> float:
    """Return ||f(x) - t|| / ||t|| over the tokens of `batches` that are not padding. It is 0 if t is zero."""
    sums = []
    for i in ahead(batches, expect):
        inputs, target, keep = pair(i)
        sums.append(torch.stack(region_loss(run(i, inputs), target, keep, "relative_mse")))
    error, size = torch.stack(sums).double().sum(0).tolist()
    return math.sqrt(error / size) if size else 0.0


def seed_of(seed: int, number: int) -> int:
    """Return the seed of region `number`. It does not depend on the random numbers of other regions."""
    return seed * 1_000_003 + number


@contextlib.contextmanager
def trainable(region: Region, weights: dict[str, WeightView], tuner: Tuner) -> Iterator[TrainableRegion]:
    """Make the parameters that `tuner` trains trainable within the context.

    If an error leaves the context, the weights get back the values that they had before.

    Args:
        region: the region.
        weights: the pruned weights of the region, by name. Adapters are attached to these.
        tuner: "full", or the configuration of a PEFT tuner.
    """
    adapted = {} if tuner == "full" else {name: weights[name] for name in adapted_weights(tuner, weights)}
    plain = plain_parameters(region, tuner, adapted)
    changed = {id(p): p for p in (*plain, *(weight.storage for weight in adapted.values()))}
    before = [(parameter, parameter.detach().clone()) for parameter in changed.values()]
    inside = {id(p): p for block in region.blocks.values() for p in block.parameters()}.values()
    # Gradients of the caller would be added to those of the first step.
    kept = [(parameter, parameter.grad, parameter.requires_grad) for parameter in inside]
    modules = [_Children.of(module) for block in region.blocks.values() for module in block.modules()]
    adapters: list[BaseTuner] = []

    def merge() -> None:
        while adapters:
            adapters.pop().merge_and_unload()

    def undo() -> None:
        adapters.clear()
        # Not the tuners' `unload`: one that was interrupted while it attached or merged cannot finish the rest.
        for module in modules:
            module.put_back()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)

    try:
        for parameter, _, _ in kept:
            parameter.grad = None
            parameter.requires_grad_(False)
        if tuner != "full":
            adapters.extend(attach(region, list(adapted), tuner))
        for parameter in plain:
            parameter.requires_grad_(True)
        # Blocks of one region may share parameters.
        every = {id(p): p for block in region.blocks.values() for p in block.parameters() if p.requires_grad}
        parameters = list(every.values())
        # All matrices have a mask, because a matrix that is not pruned in this run may have been pruned before.
        masks = {p: mask_of(p.detach()) for p in plain if p.dim() > 1}
        yield TrainableRegion(region, parameters, masks, merge, undo)
    except BaseException:
        undo()
        raise
    finally:
        for parameter, gradient, required in kept:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@dataclass(frozen=True)
class _Children:
    """The children of a module before adapters were attached to it."""

    module: nn.Module
    children: dict[str, nn.Module | None]
    has_config: bool

    @classmethod
    def of(cls, module: nn.Module) -> "_Children":
        return cls(module, dict(module._modules), hasattr(module, "peft_config"))

    def put_back(self) -> None:
        self.module._modules.clear()
        self.module._modules.update(self.children)
        # PEFT keeps the configurations of its adapters there.
        if not self.has_config and hasattr(self.module, "peft_config"):
            del self.module.peft_config


def _check_tuner(tuner: Any) -> None:
    """Raise unless `tuner` is "full" or a PEFT configuration that can be attached to a region."""
    if tuner == "full":
        return
    kind = PEFT_TYPE_TO_TUNER_MAPPING.get(tuner.peft_type) if isinstance(tuner, PeftConfig) else None
    if kind is None or not issubclass(kind, BaseTuner):
        raise TypeError(
            f'`tuner` must be "full" or the configuration of a PEFT tuner such as MaskLoRAConfig, got {tuner!r}.'
        )
    parts = ("modules_to_save", "target_parameters", "trainable_token_indices")
    for name, none in (("train_head", "none"), *((part, None) for part in parts)):
        value = getattr(tuner, name, none)
        if value not in (none, None, []):
            raise ValueError(
                f"`{name}={value!r}` trains parameters that belong to no region. Leave it out of the configuration. "
                "`train_norms` and `bias` can be used."
            )


def adapted_weights(config: PeftConfig, weights: dict[str, WeightView]) -> list[str]:
    """Return the names of the weights that `config` puts adapters on, by its `target_modules`."""
    wanted: Any = copy.copy(config)
    names = [name for name, weight in weights.items() if weight.expert is None]
    if wanted.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        # A set, because PEFT ignores `layers_to_transform` beside a regular expression.
        wanted.target_modules = {name.rpartition(".")[2] for name in names}
    hits = {name: check_target_module_exists(wanted, name) for name in names}
    return [name for name, hit in hits.items() if hit and not isinstance(hit, _ExcludedModule)]


def attach(region: Region, names: list[str], config: PeftConfig) -> Iterator[BaseTuner]:
    """Put adapters on the weights of these names, block by block, and yield the tuners."""
    for block_name, block in region.blocks.items():
        inside = {name.removeprefix(f"{block_name}."): name for name in names if name.startswith(f"{block_name}.")}
        if inside:
            own: Any = copy.copy(config)
            own.target_modules = set(inside)
            # Norms and biases are trained in place, and the layers have been chosen by the names of the whole model.
            for option, off in (("train_norms", False), ("bias", "none"), ("exclude_modules", None),
                                ("layers_to_transform", None), ("layers_pattern", None)):  # fmt: skip
                if hasattr(own, option):
                    setattr(own, option, off)
            for option in ("rank_pattern", "alpha_pattern"):
                values = getattr(config, option, None) or {}
                keys = {local: get_pattern_key(list(values), name) for local, name in inside.items()}
                if values:
                    setattr(own, option, {re.escape(n): values[key] for n, key in keys.items() if key in values})
            # PEFT makes adapters on the default device of the caller, and moves them to that of their layer.
            with torch.device("meta" if next(block.parameters()).is_meta else "cpu"):
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](block, own, "default")
            yield tuner


def plain_parameters(region: Region, tuner: Tuner, adapted: dict[str, WeightView]) -> list[nn.Parameter]:
    """Return the region's parameters that are trained in place: all, or the norms and biases that `tuner` trains."""
    if tuner == "full":
        return [p for p in region.parameters.values() if p.is_floating_point()]
    bias = getattr(tuner, "bias", "none")
    layers = [weight.layer for weight in adapted.values()]
    chosen: set[int] = set()
    for module in (module for block in region.blocks.values() for module in block.modules()):
        if getattr(tuner, "train_norms", False) and is_norm(module):
            chosen |= {id(parameter) for parameter in module.parameters()}
        # As in PEFT: "all" means the biases of all modules, "..._only" those of the layers that have adapters.
        if bias == "all" or (bias != "none" and any(module is layer for layer in layers)):
            chosen.add(id(getattr(module, "bias", None)))
    return [parameter for parameter in region.parameters.values() if id(parameter) in chosen]


def _masking(mask: Tensor) -> Callable[[Tensor], None]:
    def apply(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(mask)

    return apply


def _by_step(batches: list[int], size: int, steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield the batches of each step, at most `size` of them. Every epoch draws a new order."""
    done = 0
    while True:
        order = torch.randperm(len(batches), generator=generator, device="cpu").tolist()
        for start in range(0, len(order), size):
            if done == steps:
                return
            yield [batches[i] for i in order[start : start + size]]
            done += 1
