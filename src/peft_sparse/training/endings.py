"""What holds however a training run ends: the model's settings are as they were before it."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer
from transformers.integrations.neftune import deactivate_neftune

from ..model.tree import adapter_switches


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Put back, after the context, what a training run changes in `model` besides its weights.

    These are the gradients and the mode of each module, training or evaluation. If an error leaves the context, also
    `requires_grad` of each parameter, and which adapters are active and which are off. Without an error these stay as
    the run left them: a callback may have changed them for good.
    """
    modes = [(module, module.training) for module in model.modules()]
    put_adapters_back = adapter_switches(model)
    # By name and without the parameters: FSDP replaces them, and those of before must not stay in memory.
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gradients = {name: (p, p.grad) for name, p in model.named_parameters() if p.grad is not None}
    try:
        yield
    except BaseException:
        put_adapters_back()
        for name, parameter in model.named_parameters():
            if trained.get(name, parameter.requires_grad) != parameter.requires_grad:
                parameter.requires_grad_(trained[name])
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for name, parameter in model.named_parameters():
            former, gradient = gradients.get(name, (parameter, None))
            parameter.grad = gradient if former is parameter else None


@contextlib.contextmanager
def without_noise(trainer: Trainer) -> Iterator[None]:
    """Take the hook of `neftune_noise_alpha` off the embedding if an error leaves the context.

    `Trainer` does this only where training reaches its end. The embedding would add noise in each later training.
    """
    own: Any = trainer
    own.neftune_hook_handle = None
    try:
        yield
    except BaseException:
        if own.neftune_hook_handle is not None:
            deactivate_neftune(own.model, own.neftune_hook_handle, own.accelerator)
        raise


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Put back, after the context, the states of the random number generators of Python, NumPy and PyTorch."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
