"""What a model is beside the values of its weights: modes, hooks, buffers. It must be as before after every call."""

import hashlib
from typing import Any

import torch
from torch import nn


def disturb(model: nn.Module) -> None:
    """Give every third module the other mode and every fifth parameter another `requires_grad`, as users may."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    for number, parameter in enumerate(model.parameters()):
        if parameter.is_floating_point():
            parameter.requires_grad_(number % 5 != 0)


def digest_of(tensors: Any) -> str:
    """Return a hash of named tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_of(model: nn.Module) -> str:
    """Return a hash of all parameters."""
    return digest_of(model.named_parameters())


class State:
    """A picture of a model, to be compared with a later one."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.named_modules())
        self.parts: dict[str, Any] = {
            "modules": [(name, type(module)) for name, module in modules],
            "training flags": [module.training for _, module in modules],
            "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
            "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
            "dtypes": [(name, p.dtype, p.device.type) for name, p in model.named_parameters()],
            "identity of parameters": [id(p) for p in model.parameters()],
            "hooks": [
                (name, key)
                for name, module in modules
                for key, value in vars(module).items()
                if key.endswith("_hooks") or key.endswith("_hooks_with_kwargs")
                if value
            ],
            "attributes": [(name, sorted(set(vars(module)) - CHANGING)) for name, module in modules],
            "buffers": digest_of(model.named_buffers()),
            "configuration": str(getattr(model, "config", "")),
            "experts": getattr(getattr(model, "config", None), "_experts_implementation", None),
            "gradients are on": torch.is_grad_enabled(),
        }

    def differences(self, later: "State") -> list[str]:
        """Return the names of the parts that differ."""
        return [name for name, value in self.parts.items() if value != later.parts[name]]


# What Transformers itself writes on first use.
CHANGING = {"_is_full_backward_hook", "warnings_issued"}
