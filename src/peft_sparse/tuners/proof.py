"""Fingerprints of the masks: saved with an adapter, and compared with the model that the adapter is loaded onto.

`model` calls these functions when PEFT attaches, saves or loads an adapter.
"""

import logging
import warnings
from collections.abc import Iterator

from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..model.blocks import base_layer, base_model
from ..model.cpu_packing import undo_cpu_packing
from ..model.masks import fingerprint, mask_of, sparsity_of_fingerprint
from ..model.sharding import has_shards, whole
from ..model.weights import PRUNABLE_LAYERS, as_matrix
from .base_weight import STRAY_ZEROS
from .config import SparseLoraConfig
from .layer import SparseLoraLayer


logger = logging.getLogger(__name__)


def fingerprints(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the fingerprint of the mask of every weight that the adapter adapts, by name of the layer or parameter.

    The masks that are saved with the adapter are updated too. Sharded weights are gathered, so all processes must call
    the function together.
    """
    found = {}
    for name, module in _layers(model, adapter_name):
        key = name.replace(".base_layer", "")
        key = f"{key}.{module.parameter_name}" if hasattr(module, "parameter_name") else key
        with whole(module):
            if _is_loaded(module.read_weight()):
                module.refresh_saved_mask(adapter_name)
                found[key] = _fingerprint(module.pruned_weight())
    return found


def remember_proof(model: nn.Module) -> None:
    """Compute the fingerprints of sharded weights now, for a later save.

    One process saves alone and cannot gather sharded weights then. All processes must call this function together. It
    does nothing for a model without shards.

    Args:
        model: the model with adapters.
    """
    if has_shards(model):
        for name, config in getattr(model, "peft_config", {}).items():
            if isinstance(config, SparseLoraConfig):
                config._proof = fingerprints(model, name)


def proof_at_hand(model: nn.Module, config: SparseLoraConfig, adapter_name: str) -> dict[str, str]:
    """Return the fingerprints to save with the adapter. A sharded model gives those that `remember_proof` computed."""
    if not has_shards(model):
        return fingerprints(model, adapter_name)
    if not config._proof:
        warnings.warn(
            f"Adapter {adapter_name!r} is saved without fingerprints of its masks. The base weights are sharded over "
            "processes, and the process that saves cannot read them. Train with SparseTrainer or add "
            "ZeroGuardCallback, which compute the fingerprints before saving.",
            stacklevel=2,
        )
    return config._proof


def report_oddities(model: nn.Module, config: SparseLoraConfig, adapter_name: str) -> None:
    """Log one warning if weights with a MaskLoRA adapter are not pruned, and one if `r` exceeds their full rank."""
    dense, excessive, count = [], [], 0
    for name, module, weight in _adapted(model, adapter_name):
        count += 1
        if mask_of(weight).sum() > (1 - STRAY_ZEROS) * weight.numel():
            dense.append(name)
        if module.r[adapter_name] > min(module._matrix(weight).shape[-2:]):
            excessive.append(name)
    if dense and config.name == "mask_lora":
        logger.warning(
            "%d of %d adapted weights are not pruned (first %r). MaskLoRA is plain LoRA there until they are pruned.",
            len(dense),
            count,
            dense[0],
        )
    if excessive:
        logger.warning(
            "`r` exceeds the full rank of %d adapted weights (first %r): a smaller rank can express every update of "
            "them. Lower `r`, or set `rank_pattern` for these layers.",
            len(excessive),
            excessive[0],
        )


def check_masks(model: nn.Module, config: SparseLoraConfig) -> None:
    """Compare the zeros of `model` with the fingerprints in `config`.

    An adapter with `save_mask` is not compared here. Its mask is compared when it is first used.

    Args:
        model: the base model.
        config: configuration of the adapter, with `on_mask_mismatch`.

    Raises:
        ValueError: the zeros differ and `on_mask_mismatch` is "error". With "warn" the function warns.
    """
    if config.on_mask_mismatch == "ignore" or config.save_mask:
        return
    differing = []
    modules = dict(model.named_modules())
    for name, expected in config.mask_fingerprints.items():
        weight = _weight_called(model, modules, name)
        if weight is not None and (found := _fingerprint(weight)) != expected:
            differing.append((name, expected, found))
    if not differing:
        return
    examples = "; ".join(
        f"{name}: adapter {sparsity_of_fingerprint(expected):.4f}, model {sparsity_of_fingerprint(found):.4f}"
        for name, expected, found in differing[:3]
    )
    message = (
        f"The adapter was trained on other zeros than this base model has, in {len(differing)} of "
        f"{len(config.mask_fingerprints)} layers (sparsities: {examples}). Load the pruned base model the adapter was "
        'trained on, or pass a configuration with `on_mask_mismatch="warn"` to use the zeros of this base model.'
    )
    if config.on_mask_mismatch == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def _adapted(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SparseLoraLayer, Tensor]]:
    """Yield name, layer and stored weight of every layer that has the adapter and whose weight can be read."""
    for name, module in _layers(model, adapter_name):
        weight = module.read_weight()
        if _is_loaded(weight):
            yield name, module, weight


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SparseLoraLayer]]:
    for name, module in base_model(model).named_modules():
        if isinstance(module, SparseLoraLayer) and adapter_name in module.A and module._readable():
            yield name, module


def _weight_called(model: nn.Module, modules: dict[str, nn.Module], name: str) -> Tensor | None:
    """Return the weight of the layer or parameter `name` as a matrix. None if it is missing or cannot be read."""
    module = modules.get(name)
    if module is None:
        owner, _, parameter = name.rpartition(".")
        weight = getattr(base_layer(modules[owner]), parameter, None) if owner in modules else None
        return weight.detach() if isinstance(weight, Tensor) and _is_loaded(weight) else None
    if isinstance(module, SparseLoraLayer):
        return module.pruned_weight() if module._readable() and _is_loaded(module.read_weight()) else None
    layer = base_layer(module)
    backend = resolve_quantization_backend(layer, **get_quantization_kwargs(model))
    if backend is not None:
        undo_cpu_packing(layer)
        return backend.get_base_weight(layer) if backend.supports_merge else None
    if not isinstance(layer, PRUNABLE_LAYERS) or not _is_loaded(layer.weight):
        return None
    return as_matrix(layer, layer.weight.detach())


def _fingerprint(weight: Tensor) -> str:
    return fingerprint(mask_of(weight.reshape(-1, weight.shape[-1])))


def _is_loaded(weight: Tensor) -> bool:
    # ZeRO-3 empties the parameters it shards, a DTensor holds one process's part, and a meta weight has no values.
    return weight.numel() > 0 and not weight.is_meta and not isinstance(weight, DTensor)
