"""A and B outside of their layer: one pair for each expert, ranks padded, and ranks written into a configuration.

`combining` and `hotswap` exchange the factors of adapters with these functions.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..model.blocks import base_model
from ..model.weights import stored_weight
from .config import SparseLoraConfig
from .layer import SparseLoraLayer


def check_adapter_name(name: str) -> None:
    """Check that an adapter can be called `name`, in the dicts of modules that hold A and B, and in a mixed batch.

    Raises:
        ValueError: it cannot.
    """
    if not name or "." in name or name == "__base__" or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"Expected a name that a module can have, got {name!r}. Names with a dot, names of attributes of "
            "`torch.nn.ModuleDict` and '__base__', which means no adapter, cannot be used. Choose another name."
        )


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, SparseLoraLayer]:
    """Return every layer that has the adapter, by the name that `rank_pattern` and `alpha_pattern` are matched with.

    This is the name of the layer in the base model, or for a bare parameter the name of the parameter.
    """
    found = {}
    for name, module in base_model(model).named_modules():
        if isinstance(module, SparseLoraLayer) and adapter_name in module.A:
            parameter = getattr(module, "parameter_name", None)
            name = name.replace(".base_layer", "").replace("_orig_mod.", "")
            found[name if parameter is None else f"{name}.{parameter}"] = module
    return found


def trained_whole(config: SparseLoraConfig) -> str | None:
    """Return the name of a field that lets the adapter train more than A and B. None if it trains only A and B.

    The adapter then also trains biases, whole modules or embeddings of tokens.
    """
    if config.bias != "none":
        return "bias"
    return next((field for field in ("modules_to_save", "trainable_token_indices") if getattr(config, field)), None)


def factors_of(layer: SparseLoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return the stored A and B of one adapter, detached."""
    return stored_weight(layer.A[adapter_name]).detach(), stored_weight(layer.B[adapter_name]).detach()


def experts_of(layer: SparseLoraLayer) -> int:
    """Return how many pairs of A and B an adapter of the layer has: one for each expert, or one."""
    (_, rank_of_A), _ = layer._factor_features(1)
    return rank_of_A


def by_expert(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A (experts, r, in) and B (experts, out, r) for stored A (experts · r, in) and B (out, r · experts)."""
    r = A.shape[0] // experts
    return A.reshape(experts, r, -1), B.reshape(-1, r, experts).permute(2, 0, 1)


def stored(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (experts · r, in) and B (out, r · experts) as a layer stores them. It undoes `by_expert`."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def padded(A: Tensor, B: Tensor, experts: int, r: int) -> tuple[Tensor, Tensor]:
    """Return stored A and B with zeros up to the rank `r` of each expert, which leaves BA as it is."""
    A, B = by_expert(A, B, experts)
    missing = max(r - A.shape[1], 0)
    return stored(F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)))


def write_ranks(config: SparseLoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
    """Write the ranks and alphas of all layers into the configuration, which changes in place.

    The most frequent values become `r` and `lora_alpha`. Other values get an entry in the patterns.

    Args:
        config: the configuration.
        ranks: the rank of every layer, by the names of `layers_with`.
        alphas: the `lora_alpha` of every layer, by the same names.
    """
    config.r, config.rank_pattern = _common(ranks)
    config.lora_alpha, config.alpha_pattern = _common(alphas)


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    most, _ = Counter(values.values()).most_common(1)[0]
    # PEFT takes the keys for regular expressions of the last parts of a name. These match one layer.
    return most, {f"^{re.escape(name)}": value for name, value in values.items() if value != most}
