"""How a run holds parameters: in float32 while their blocks are at work, and without gradients except in training."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def held_in_float32(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the parameters of `blocks` in float32 within the context, and in their own dtype afterwards."""
    changed = [
        (parameter, parameter.dtype)
        for block in blocks
        for parameter in block.parameters()
        if parameter.dtype in (torch.float16, torch.bfloat16)
    ]
    try:
        for parameter, _ in changed:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in changed:
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def without_gradients(*modules: nn.Module) -> Iterator[None]:
    """Let no parameter of `modules` need or have a gradient within the context, except what is set there."""

    def named() -> Iterator[tuple[tuple[int, str], nn.Parameter]]:
        for number, module in enumerate(modules):
            for name, parameter in module.named_parameters():
                yield (number, name), parameter

    before = {key: (parameter, parameter.requires_grad, parameter.grad) for key, parameter in named()}
    try:
        for parameter, _, _ in before.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, required, gradient in before.values():
            parameter.requires_grad_(required)
            parameter.grad = gradient
        # The parameters of offloaded layers are others whenever they are loaded.
        for key, parameter in named():
            if key in before and parameter is not before[key][0]:
                parameter.requires_grad_(before[key][1])
