"""A and B that arrive from outside: PEFT's hotswap, and files that lack some layers.

A layer whose A and B do not arrive must have no effect. PEFT's hotswap sets A and B to zero, and Transformers draws
them at random. These functions set B to 0, or BA to 1 for ScaledLoRA with `residual=False`, where 0 would remove the
weight. `model` calls `whole_pairs`, and `lora_extras` puts the other functions into PEFT and Transformers.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import base_model
from ..model.weights import stored_weight
from .config import SparseLoraConfig
from .factors import by_expert, experts_of, factors_of, layers_with, padded, trained_whole, write_ranks
from .layer import SparseLoraLayer
from .proof import check_other_weights, receive


Arriving = dict[str, tuple[SparseLoraLayer, Tensor | None, Tensor | None, Tensor | None]]


@torch.no_grad()
def swap_adapter(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: SparseLoraConfig) -> None:
    """Put the tensors of another adapter into the adapter `adapter_name`, in place.

    A layer that the new adapter lacks gets the identity: B = 0, or BA = 1 for ScaledLoRA with `residual=False`. A
    smaller rank is padded with zeros to the rank that is there, and a larger rank replaces it. The scaling and the
    formula of every layer become those of the new configuration. The model's own configuration is updated, so that
    the adapter can be saved.

    Args:
        model: the model with the adapter. It may be compiled.
        state_dict: the tensors of the new adapter, by their names in the model.
        adapter_name: name of the adapter. It stays the same.
        config: the configuration of the new adapter.

    Raises:
        ValueError: the adapter is merged or trains whole parameters too, the masks of the new adapter are not those
            of the base weights, or the new adapter has other `target_parameters`.
        RuntimeError: a tensor has no place in the model, or has a shape that does not fit.
    """
    model = getattr(model, "_orig_mod", model)
    own = getattr(model, "peft_config", {}).get(adapter_name)
    # The wrappers of several parameters of one module are nested, and the saved names contain the nesting.
    ours, theirs = (set(getattr(one, "target_parameters", None) or ()) for one in (own, config))
    if own is not None and theirs and ours != theirs:
        raise ValueError(
            f"Hotswap needs adapters of the same `target_parameters`. Adapter {adapter_name!r} has {sorted(ours)}, "
            f"and the new adapter has {sorted(theirs)}. Load the new one by `load_adapter` on a model of its own."
        )
    field = None if own is None else trained_whole(own)
    if field is not None:
        raise ValueError(
            f"Hotswap exchanges A and B. Adapter {adapter_name!r} also trains whole parameters, by `{field}`, which "
            "would stay. Delete it and load the new adapter by `load_adapter`."
        )
    arriving = _arriving(model, state_dict, adapter_name, config)
    if any(adapter_name in layer.merged_adapters for layer, *_ in arriving.values()):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged into the base weights, so its A and B cannot be exchanged. Call "
            "`unmerge_adapter()` first."
        )
    check_other_weights(base_model(model), config)
    receive(model, config, adapter_name, state_dict)
    for name, (layer, A, B, mask) in arriving.items():
        _set_formula(layer, adapter_name, name, config)
        if A is None or B is None:
            layer.reset_parameters(adapter_name, True)
        else:
            _write(layer, adapter_name, *padded(A, B, experts_of(layer), layer.r[adapter_name]))
        _set_mask(layer, adapter_name, mask, config)
    if own is not None:
        for field in (
            "use_rslora", "save_mask", "mask_fingerprints", "other_sparsities", "masking", "residual", "init_weights",
            "gradient_dtype",
        ):  # fmt: skip
            if hasattr(own, field):
                setattr(own, field, getattr(config, field))
        _write_config(own, {name: layer for name, (layer, *_) in arriving.items()}, adapter_name)


@torch.no_grad()
def pad_ranks(model: nn.Module, target_rank: int | None, config: Any, check_compiled: str) -> None:
    """Pad every adapter with zeros to the rank `target_rank`, so that a compiled model can receive others in place.

    The outputs stay the same, and so do the scalings. The scaling is a number in the compiled model. Another scaling
    compiles it again, and gives right outputs.

    Args:
        model: the model with adapters, before it is compiled.
        target_rank: the largest rank that will arrive. None changes nothing.
        config: None, a configuration, or configurations by name of the adapter. They get the new ranks, as those of
            the model do.
        check_compiled: what happens if the model is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: the model is compiled already, `check_compiled` has none of its values, or the rank of an adapter
            exceeds `target_rank`.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"`check_compiled` must be 'error', 'warn' or 'ignore', got {check_compiled!r}.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False):
        message = "The model is compiled already. Call `prepare_model_for_compiled_hotswap` before `torch.compile`."
        if check_compiled == "error":
            raise ValueError(message)
        if check_compiled == "warn":
            warnings.warn(message, stacklevel=3)
    if target_rank is None:
        return
    model = getattr(model, "_orig_mod", model)
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLoraLayer)]
    excessive = sorted({r for layer in layers for r in layer.r.values() if r > target_rank})
    if excessive:
        raise ValueError(
            f"`target_rank` must be at least the rank of every adapter, got {target_rank} for rank {excessive[-1]}. "
            "Pass the largest rank of all adapters."
        )
    names = sorted({name for layer in layers for name in layer.A})
    for layer in layers:
        for name in layer.A:
            _write(layer, name, *padded(*factors_of(layer, name), experts_of(layer), target_rank))
    known = getattr(model, "peft_config", {})
    given = config if isinstance(config, dict) else {} if config is None else {_owner(known, config, names): config}
    for name in names:
        for one in (known.get(name), given.get(name)):
            if one is not None:
                _write_config(one, layers_with(model, name), name)


def whole_pairs(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `state_dict`, without an A whose B is missing or has another shape, and the reverse.

    PEFT then reports or refuses the pair, and the layer keeps the pair that it has. Half of a new pair beside half of
    an old one would have an effect that nobody trained. A layer on the meta device that gets no pair is initialised.

    Args:
        model: the model with the adapter.
        adapter_name: name of the adapter.
        state_dict: its tensors by their names in the model.
    """
    state_dict = dict(state_dict)
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLoraLayer) or adapter_name not in layer.A:
            continue
        old = dict(zip(_keys(name, layer, adapter_name), factors_of(layer, adapter_name), strict=True))
        if all(key in state_dict and state_dict[key].shape == factor.shape for key, factor in old.items()):
            continue
        for key, factor in old.items():
            if key in state_dict and state_dict[key].shape == factor.shape:
                del state_dict[key]
        if all(factor.is_meta for factor in old.values()):
            for module in (layer.A[adapter_name], layer.B[adapter_name]):
                module.to_empty(device="cpu")
            layer.reset_parameters(adapter_name, True)
    return state_dict


def reset_missing(model: nn.Module, missing: set[str], loaded_before: set[str]) -> None:
    """Give every layer whose A or B is among the names `missing` an A and a B without an effect.

    Args:
        model: the model with adapters.
        missing: names of parameters that a file lacks.
        loaded_before: names of the adapters that were there before. They stay as they are.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLoraLayer):
            for adapter_name in set(layer.A) - loaded_before:
                if missing.intersection(_keys(name, layer, adapter_name)):
                    layer.reset_parameters(adapter_name, True)


def _keys(name: str, layer: SparseLoraLayer, adapter_name: str) -> tuple[str, str]:
    start = f"{name}.{layer.prefix}" if name else layer.prefix
    return f"{start}A.{adapter_name}.weight", f"{start}B.{adapter_name}.weight"


def _owner(known: dict[str, Any], config: Any, names: list[str]) -> str:
    return next((name for name, own in known.items() if own is config), names[0])


def _arriving(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: SparseLoraConfig
) -> Arriving:
    """Return every layer of the adapter with the A, B and mask that arrive for it, by the names of `layers_with`."""
    left = dict(state_dict)
    names = {id(module): name.replace("_orig_mod.", "") for name, module in model.named_modules()}
    arriving: Arriving = {}
    for key, layer in layers_with(model, adapter_name).items():
        name = names[id(layer)]
        A, B = (left.pop(factor, None) for factor in _keys(name, layer, adapter_name))
        mask = left.pop(f"{name}.{layer.prefix}mask.{adapter_name}", None)
        left.pop(f"{name}.{layer.prefix}proof.{adapter_name}", None)
        if (A is None) != (B is None) or (A is not None and not _fits(layer, adapter_name, A, B)):
            shapes = tuple(None if factor is None else tuple(factor.shape) for factor in (A, B))
            expected = tuple(tuple(factor.shape) for factor in factors_of(layer, adapter_name))
            raise RuntimeError(
                f"The new adapter does not fit {key!r}: A and B have the shapes {expected} there, up to the rank, and "
                f"{shapes} arrived. Swap in an adapter for this base model, whole."
            )
        arriving[key] = layer, A, B, mask
    if left:
        raise RuntimeError(
            f"Hotswap exchanges A and B of layers that adapter {adapter_name!r} adapts. The new "
            f"{config.peft_type.value} adapter brings other tensors, such as {next(iter(left))!r}. Load it by "
            "`load_adapter` under a name of its own."
        )
    return arriving


def _fits(layer: SparseLoraLayer, adapter_name: str, A: Tensor, B: Tensor | None) -> bool:
    old_A, old_B = factors_of(layer, adapter_name)
    return (
        B is not None
        and (A.shape[0], A.shape[1], B.shape[0]) == (B.shape[1], old_A.shape[1], old_B.shape[0])
        and A.shape[0] % experts_of(layer) == 0
    )


def _write(layer: SparseLoraLayer, adapter_name: str, A: Tensor, B: Tensor) -> None:
    for module, factor in ((layer.A[adapter_name], A), (layer.B[adapter_name], B)):
        weight = stored_weight(module)
        if weight.shape == factor.shape:
            # In place, because a compiled model holds the tensor.
            weight.copy_(factor)
        else:
            weight.data = factor.to(weight.device, weight.dtype).contiguous()
            vars(module).update(out_features=factor.shape[0], in_features=factor.shape[1])
    experts = experts_of(layer)
    layer.r[adapter_name] = by_expert(A, B, experts)[0].shape[1]


def _set_formula(layer: SparseLoraLayer, adapter_name: str, name: str, config: SparseLoraConfig) -> None:
    r, alpha = config.rank_and_alpha(name)
    layer.lora_alpha[adapter_name] = alpha
    layer.scaling[adapter_name] = layer.trained_scaling[adapter_name] = alpha / _divisor(config, r)
    layer.masking[adapter_name] = getattr(config, "masking", "always")
    layer.residual[adapter_name] = getattr(config, "residual", True)
    layer.init_weights[adapter_name] = config.init_weights or True
    layer.gradient_dtype[adapter_name] = config.gradient_dtype


def _set_mask(layer: SparseLoraLayer, adapter_name: str, mask: Tensor | None, config: SparseLoraConfig) -> None:
    if mask is not None:
        layer.saved_masks[adapter_name] = mask.clone()
        # `receive` has compared the mask and may know more.
        layer._unsettled.setdefault(adapter_name, config.on_mask_mismatch)
    elif adapter_name in layer.saved_masks:
        del layer.saved_masks[adapter_name]
        layer.forget_mask(adapter_name)


def _write_config(config: SparseLoraConfig, layers: dict[str, SparseLoraLayer], adapter_name: str) -> None:
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    alphas = {
        name: layer.trained_scaling[adapter_name] * _divisor(config, layer.r[adapter_name])
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        layer.lora_alpha[adapter_name] = alphas[name]
    write_ranks(config, ranks, alphas)


def _divisor(config: SparseLoraConfig, r: int) -> float:
    return math.sqrt(r) if config.use_rslora else r
