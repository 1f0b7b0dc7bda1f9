"""Reads the widths of convolutions, linear layers and normalisations of a model, and gives them to a new one."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .channel_trace import TRACED_LAYERS
from .cutting import Cuts


# The names that families of convolutional networks use for the widths of their stages.
_WIDTHS = ("embedding_size", "hidden_sizes")
_SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features")


def widths_beside(model: nn.Module, built: nn.Module) -> dict[str, dict[str, int]]:
    """Return the sizes of the layers of `model` that are smaller than those of `built`, by name of the layer.

    Args:
        model: the model.
        built: a model of the same class, which may be on the meta device.
    """
    found: dict[str, dict[str, int]] = {}
    others = dict(built.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, TRACED_LAYERS) and name in others:
            pairs: dict[str, tuple[Any, Any]] = {
                size: (getattr(layer, size, None), getattr(others[name], size, None)) for size in _SIZES
            }
            if own := {size: one for size, (one, other) in pairs.items() if one != other}:
                found[name] = own
    return found


def narrow_layers(model: nn.Module, widths: dict[str, dict[str, int]]) -> None:
    """Give the layers of a newly built model the sizes of `widths_beside`. Loading writes the values."""
    cuts = Cuts()
    for name, sizes in widths.items():
        layer: Any = model.get_submodule(name)
        rows = next((sizes[size] for size in ("out_channels", "out_features", "num_features") if size in sizes), None)
        columns = sizes.get("in_features", sizes.get("in_channels"))
        if columns is not None:
            columns //= sizes.get("groups", getattr(layer, "groups", 1))
        tensors = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        # A tensor that has been cut has lost its shape.
        for key, shape in {key: tensor.shape for key, tensor in tensors.items()}.items():
            for dim, width in ((0, rows), (1, columns)):
                if width is not None and len(shape) > dim and width < shape[dim]:
                    # On the CPU: while a checkpoint is loaded the weights are on the meta device.
                    cuts.cut_tensor(layer, key, dim, torch.arange(shape[dim], device="cpu") < width)
        cuts.set_existing(layer, sizes)


def width_changes(config: PreTrainedConfig, model: nn.Module, built: nn.Module) -> dict[str, Any]:
    """Return changes of the widths of the stages in a configuration that may describe `model`; {} if there are none.

    There are some if all convolutions that have the same width in `built` have the same width in `model`.

    Args:
        config: the configuration.
        model: the model.
        built: what its class builds from `config`.
    """
    new: dict[int, set[int]] = {}
    others = dict(built.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and isinstance(other := others.get(name), nn.Conv2d):
            new.setdefault(other.out_channels, set()).add(layer.out_channels)
    if any(len(widths) > 1 for widths in new.values()):
        return {}
    only = {old: widths.pop() for old, widths in new.items()}

    def changed(value: Any) -> Any:
        return [changed(each) for each in value] if isinstance(value, (list, tuple)) else only.get(value, value)

    given = {name: value for name in _WIDTHS if (value := getattr(config, name, None)) is not None}
    return {name: changed(value) for name, value in given.items() if changed(value) != value}
