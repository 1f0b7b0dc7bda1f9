"""Trains the parameters of one region so that it reproduces given outputs, and measures how far it is from them."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.copies import ahead
from .fit import Fit, Loss
from .observer import Step
from .regions import Region


# batch, inputs -> outputs of the region.
Run = Callable[[int, Tensor], Tensor]
# batch -> inputs, targets, and which tokens are not padding.
Pair = Callable[[int], tuple[Tensor, Tensor, Tensor | None]]
# Called with a batch of which `Pair` will be asked next.
Expect = Callable[[int], None]


def _expect_nothing(index: int) -> None:
    pass


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
        generator = torch.Generator("cpu").manual_seed(fit.seed_of(number))
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
