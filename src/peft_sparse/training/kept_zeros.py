"""Keeps the zeros of a parameter through a training step: in its gradient, its optimiser state and its values."""

from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..model.masks import mask_, mask_of, pack, unpack
from ..model.sharding import deepspeed_copies, own_part


def packed_mask(parameter: Tensor) -> Tensor:
    """Return the packed mask of this process's part of `parameter`."""
    return pack(mask_of(own_part(parameter)))


def has_lost(parameter: Tensor, kept: Tensor) -> Tensor:
    """Return whether an entry of this process's part of `parameter` is not zero, and was zero in the mask `kept`."""
    mask = packed_mask(parameter)
    # The weight may have moved to another device after its mask was stored.
    return (mask & ~kept.to(mask.device)).any()


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


def clear_state(optimizer: Optimizer | None, parameter: Tensor) -> None:
    """Set the optimiser's state to zero for the entries of `parameter` that are zero. In place."""
    if optimizer is not None:
        for part, value in deepspeed_copies(parameter, optimizer):
            mask_(value, part.to(value.dtype))
    for value in {} if optimizer is None else optimizer.state.get(parameter, {}).values():
        # Only states with one number per entry are changed: factored states have fewer, and quantised states may not
        # store zero as 0.
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            own_part(value).masked_fill_(~mask_of(own_part(parameter)), 0)


def _mask_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        mask_(own_part(parameter.grad), own_part(parameter))


def _masked(parameter: Tensor, gradient: Tensor) -> Tensor:
    # Embeddings may have sparse gradients. Their zeros are put back after the step.
    if gradient.layout is not torch.strided:
        return gradient
    # Unlike a hook after accumulation, a tensor's hook runs before DDP averages. It must not change its argument.
    return mask_(gradient.clone(), parameter.detach())
