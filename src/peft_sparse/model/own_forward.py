"""What layers make of their weight whose class has a forward of its own: found out by running it on random numbers.

Such a layer may change its inputs first, by a norm or by padding. It may also change its weight, by standardising it
for example, so that zeros of the weight are no zeros of the product.
"""

import copy
from collections.abc import Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .weights import PRUNABLE_LAYERS, stored_weight


# The weight times the inputs of the layer; times other inputs, or unknown; a product in which its zeros are lost.
Use = Literal["plain", "other", "lost"]

_aten = torch.ops.aten
PRODUCTS: dict[Any, int] = {
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.addmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten.linear.default: 0,
    _aten.convolution.default: 0,
}
"""Products, with the place of their first factor among the arguments. That of the second is the next."""

_known: dict[Hashable, Use] = {}


def use_of_weight(layer: nn.Module) -> Use:
    """Return what a layer of `PRUNABLE_LAYERS` makes of its weight. The layer itself does not run."""
    kind = next(kind for kind in PRUNABLE_LAYERS if isinstance(layer, kind))
    if all(getattr(type(layer), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward")):
        return "plain"
    settings = (
        (key, value) for key, value in vars(layer).items() if isinstance(value, (bool, int, float, str, tuple))
    )
    key = (type(layer), stored_weight(layer).shape, *settings)
    if key not in _known:
        _known[key] = _tried(layer)
    return _known[key]


@torch.no_grad()
def _tried(layer: nn.Module) -> Use:
    trial = copy.copy(layer)
    device = next((buffer.device for buffer in layer.buffers() if not buffer.is_meta), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trial._parameters = {
            name: None if parameter is None else nn.Parameter(torch.randn(parameter.shape).to(device))
            for name, parameter in layer._parameters.items()
        }
        weight = stored_weight(trial)
        weight.masked_fill_((torch.rand(weight.shape) < 0.5).to(device), 0)
        inputs = torch.randn(_shape_of_inputs(layer)).to(device)
        products = _Products()
        try:
            with products:
                type(layer).forward(trial, inputs)
        except Exception:
            # A layer may want other arguments. What it does is then seen while the model runs.
            return "other"
    zeros = int((weight == 0).sum())
    own = [
        (left, args) for left, right, args in products.seen for found in (right, left) if _is_of(found, weight, zeros)
    ]
    if products.seen and not own:
        return "lost"
    plain = (left.numel() == inputs.numel() and torch.equal(left.flatten(), inputs.flatten()) for left, _ in own)
    return "plain" if any(plain) and all(_is_as_said(layer, args) for _, args in own) else "other"


@torch.no_grad()
def multiplies_inputs(module: nn.Module, layer: nn.Module) -> bool:
    """Return whether `module`, an adapter that does not call its base `layer`, multiplies the weight with its inputs.

    Column j of the weight must have no effect if input j is zero. Found out for linear layers whose weight is in
    memory as a plain tensor; of others it is taken for granted.
    """
    stored = layer._parameters.get("weight")
    if stored is None or stored.is_meta or stored.dim() != 2 or type(stored) is not nn.Parameter:
        return True
    transposed = not isinstance(layer, nn.Linear)
    other = stored.detach().clone()
    matrix = other.T if transposed else other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        columns = (torch.rand(matrix.shape[1]) < 0.5).to(matrix.device)
        inputs = torch.randn(1, matrix.shape[1]).to(matrix).masked_fill(columns, 0)
        matrix += torch.randn(matrix.shape).to(matrix).masked_fill(~columns, 0)
    try:
        before = module(inputs)
        layer._parameters["weight"] = nn.Parameter(other, requires_grad=stored.requires_grad)
        after = module(inputs)
    except Exception:
        # It wants other arguments.
        return True
    finally:
        layer._parameters["weight"] = stored
    return torch.allclose(before, after, rtol=1e-3, atol=float(before.abs().max()) * 1e-3)


def _shape_of_inputs(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Conv2d):
        sizes = (2 * d * k for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        return 1, layer.in_channels, *sizes
    matrix_in = layer.in_features if isinstance(layer, nn.Linear) else stored_weight(layer).shape[0]
    return 1, matrix_in


def _is_of(operand: Tensor, weight: Tensor, zeros: int) -> bool:
    """Return whether `operand` is `weight`, or was computed from it and has its zeros."""
    if operand.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        return True
    return operand.numel() == weight.numel() and int((operand == 0).sum()) >= zeros


def _is_as_said(layer: nn.Module, args: tuple[Any, ...]) -> bool:
    """Return whether a product is that which the settings of `layer` say."""
    if not isinstance(layer, nn.Conv2d):
        return True
    return layer.padding_mode == "zeros" and [list(args[3]), list(args[4]), list(args[5]), args[8]] == [
        list(layer.stride),
        list(layer.padding),
        list(layer.dilation),
        layer.groups,
    ]


class _Products(TorchDispatchMode):
    """Notes the two factors of each product, and its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.seen.append((args[PRODUCTS[func]], args[PRODUCTS[func] + 1], args))
        return func(*args, **(kwargs or {}))
