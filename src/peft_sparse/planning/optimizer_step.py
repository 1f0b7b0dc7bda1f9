"""Simulates one optimiser step of a model, and tells what it holds in memory beside the parameters."""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import base_model, prunable_weights
from ..training.kept_zeros import keep_gradients_masked, packed_mask, put_zeros_back
from .simulation import LiveBytes, bytes_of


Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class StepBytes:
    """The memory of one simulated optimiser step besides the parameters, in bytes.

    Args:
        gradients: all gradients.
        optimizer: the state of the optimiser, and its copies of the parameters.
        activations: the most that forward and backward pass hold besides gradients.
        backward_peak: the most that they hold with gradients.
        optimizer_peak: the most that the update holds besides the state: gradients and temporaries.
    """

    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    backward_peak: int = 0
    optimizer_peak: int = 0


def loss_of(model: nn.Module, tokens: Tensor, autocast: torch.dtype | None) -> Tensor:
    """Return the loss of a language model on token ids, (sequences, tokens)."""
    # As in `Trainer`: only the loss lives longer than the forward pass, and nothing is cached for generation.
    accepts = inspect.signature(base_model(model).forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepts else {}
    with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        output = model(input_ids=tokens, labels=tokens, **extra)
    loss: Tensor = output.loss
    return loss


def simulated_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    accumulated: int,
    optimizer: Optimizer,
    *,
    gradient_share: int,
    units: list[list[nn.Parameter]],
    masters: bool,
) -> StepBytes:
    """Simulate a training step, with the guard of the zeros of trained weights.

    Args:
        model: the model, with tensors without values.
        loss: runs the forward pass and returns the loss.
        accumulated: number of batches whose gradients are added up.
        optimizer: function parameters -> optimizer.
        gradient_share: number of devices that share the gradients.
        units: groups of parameters whose gradients are reduced together.
        masters: whether the optimiser works on float32 copies of the parameters.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    waiting = [[parameter for parameter in unit if parameter.requires_grad] for unit in units]
    live = LiveBytes([*model.parameters(), *model.buffers()], gradient_share, waiting)
    stored = {id(weight.storage): weight.storage for weight in prunable_weights(model).values()}
    guarded = [parameter for parameter in stored.values() if parameter.requires_grad]
    # The hook of the guard comes first, because it changes a gradient before it is accumulated.
    for parameter in guarded:
        keep_gradients_masked(parameter)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(live.finished)
    with live:
        # Two batches are enough, because further ones take no more memory than the second.
        for _ in range(min(accumulated, 2)):
            loss().backward()
            live.finish()
        step = StepBytes(gradients=live.gradients, activations=live.peak_beside_gradients, backward_peak=live.peak)
        updated = [_master(parameter) for parameter in trained] if masters else trained
        copies = sum(new.nbytes for new, old in zip(updated, trained, strict=True) if new is not old)
        live.peak = live.live
        before = live.live
        remembering = optimizer(updated)
        remembering.step()
        step.optimizer = bytes_of(t for state in remembering.state.values() for t in _tensors(state)) + copies
        temporary = live.peak - before - step.optimizer + copies
        step.optimizer_peak = step.gradients + max(temporary, _guarding(live, guarded))
    return step


def _guarding(live: LiveBytes, guarded: list[Tensor]) -> int:
    """Return the most bytes that `ZeroGuardCallback` holds while it puts zeros back after a step."""
    if not guarded:
        return 0
    largest = max(guarded, key=Tensor.numel)
    kept = packed_mask(largest)
    live.peak = before = live.live
    put_zeros_back(largest, kept)
    return live.peak - before


def _master(parameter: nn.Parameter) -> nn.Parameter:
    copied = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
    copied.grad = torch.zeros_like(copied)
    return copied


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]
