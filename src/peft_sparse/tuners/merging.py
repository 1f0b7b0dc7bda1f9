"""The base model of a model with adapters as a plain model: with the adapters merged, or as it was before them.

The model with adapters stays as it is. `merged_state_dict` returns tensors, also of a model whose weights are sharded
over processes. `plain_model` returns a model, which `SparseTrainer` saves.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.utils import is_compiled_module
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..model.blocks import active_copy, base_model
from ..model.offload import is_offloaded, loaded_layer, resident_through_hooks
from ..model.sharding import is_sharded, whole, whole_shape
from .base_weight import adapted_parameter, check_stored, wrappers_around
from .layer import SparseLoraLayer
from .saved_masks import STRAY_ZEROS


# The classes of PEFT around a model, and those around one layer of it.
MODELS = (PeftModel, PeftMixedModel, BaseTuner)
WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@torch.no_grad()
def merged_state_dict(model: nn.Module, *, merge: bool = True, keep: bool = True) -> dict[str, Tensor]:
    """Return the state dict of the base model with the active adapters merged. The model stays as it is.

    Sharded weights are gathered one layer at a time, so all processes must call the function together. Every zero of
    the base weights stays zero.

    Args:
        model: the model with adapters, attached in any of PEFT's or Transformers' ways.
        merge: True merges the active adapters, and takes the active copies of `modules_to_save`. False returns the
            base model without its adapters: the weights from before a merge, and the original modules.
        keep: whether this process receives the tensors. Every process must call the function. A process that passes
            False takes part in the gathering and receives an empty dictionary.

    Returns:
        The tensors on the CPU, by the names they have in the base model. Tied weights are one tensor.

    Raises:
        TypeError: an adapter cannot be merged: it does not consist of layers, the base weight cannot be dequantised or
            is quantised and sharded, or several methods adapt one weight and one of them does not add to it.
        ValueError: merging an adapter of another method would fill zeros, a saved mask contradicts the zeros of the
            base weight, or a base weight is computed from other parameters.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    tokens: dict[int, nn.Parameter] = {}
    _check_attached(model, merge)
    for name, module in _layers(base_model(model), merge):
        layer = _innermost(module)
        stored = {key: id(tensor) for key, tensor in _tensors(layer)}
        _check_mergeable(name, module, merge)
        with whole(module, recurse=layer is not module), _in_memory(module):
            if not keep:
                continue
            plain = _without_adapters(name, module, merge, tokens)
            shared = {id(tensor): stored[key] for key, tensor in _tensors(layer)}
            shared |= {id(parameter): id(parameter) for parameter in tokens.values()}
            found: dict[str, Any] = {}
            plain._save_to_state_dict(found, f"{name}." if name else "", True)
            for key, value in found.items():
                # One copy for tied weights, because `save_pretrained` recognises ties by their memory.
                known = shared.get(id(value))
                if known is None or known not in copies:
                    copied = value.detach().cpu().clone() if isinstance(value, Tensor) else value
                    copies[-1 - len(copies) if known is None else known] = copied
                    state[key] = copied
                else:
                    state[key] = copies[known]
    return state


@torch.no_grad()
def plain_model(model: nn.Module, *, merge: bool = True, values: bool = True) -> nn.Module:
    """Return the base model in a tree of modules without PEFT's layers, to be saved. The model stays as it is.

    The modules are new, and the weights that no adapter changes are those of `model`. Changed weights are new ones on
    the CPU, or quantised ones on their device. The hooks of the modules belong to `model`, so the plain model must not
    be run.

    Args:
        model: the model with adapters, attached in any of PEFT's or Transformers' ways.
        merge: as in `merged_state_dict`.
        values: False leaves the changed weights on the meta device, where no process has to gather or merge them.

    Raises:
        TypeError: an adapter cannot be merged, as in `merged_state_dict`.
        ValueError: merging an adapter would fill zeros, as in `merged_state_dict`.
    """
    known: dict[int, tuple[nn.Module, nn.Module]] = {}
    tokens: dict[int, nn.Parameter] = {}
    _check_attached(model, merge)
    base = base_model(model)
    # `save_pretrained` of such a model loads what accelerate has offloaded, piece by piece.
    loads_itself = hasattr(base, "hf_device_map")

    def plain(name: str, module: nn.Module) -> nn.Module:
        if id(module) not in known:
            _check_mergeable(name, module, merge)
            chosen = _chosen(module, merge)
            loading = values and is_offloaded(_innermost(chosen)) and (_is_wrapper(chosen) or not loads_itself)
            with _in_memory(chosen) if loading else contextlib.nullcontext():
                copied = _without_adapters(name, module, merge, tokens, values)
            if loading:
                _move_to_cpu(copied)
            # The original is kept with it, because Python gives the id of a freed object to a new one.
            known[id(module)] = (module, copied)
            for key, child in copied._modules.items():
                if child is not None:
                    copied._modules[key] = plain(f"{name}.{key}" if name else key, child)
        return known[id(module)][1]

    return plain("", base)


def _layers(module: nn.Module, merge: bool, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that holds weights, with its name in the base model. Tuner layers are not unwrapped."""
    module = _chosen(module, merge)
    yield name, module
    for key, child in _innermost(module).named_children():
        yield from _layers(child, merge, f"{name}.{key}" if name else key)


def _chosen(module: nn.Module, merge: bool) -> nn.Module:
    """Return the module that stands at the place of `module` in the plain model, with its adapters."""
    # Also within a model: a value head of TRL holds a whole model of PEFT.
    module = base_model(module) if isinstance(module, MODELS) or is_compiled_module(module) else module
    if isinstance(module, ModulesToSaveWrapper):
        return active_copy(module) if merge and not module.disable_adapters else module.original_module
    return module


def _innermost(module: nn.Module) -> nn.Module:
    """Return the layer within all wrappers of PEFT around it."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _in_memory(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the weights of one layer, and of wrappers around it, are not offloaded."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = cast(Any, module).token_adapter
    return resident_through_hooks(module) if isinstance(module, BaseTunerLayer) else loaded_layer(module)


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, WRAPPERS)


def _move_to_cpu(plain: nn.Module) -> None:
    """Move the weights of one layer, which was loaded to the device on which it computes."""
    for key, parameter in plain._parameters.items():
        if parameter is not None and parameter.device.type != "cpu":
            plain._parameters[key] = nn.Parameter(parameter.detach().cpu(), requires_grad=False)
    plain._buffers = {key: None if value is None else value.cpu() for key, value in plain._buffers.items()}


def _tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in [*layer._parameters.items(), *layer._buffers.items()] if value is not None]


def _adapts(wrapper: BaseTunerLayer, merge: bool) -> list[str]:
    """Return the names of the adapters that are to be merged into the weight that the layer holds now."""
    if not merge or wrapper.disable_adapters or wrapper.merged:
        return []
    present = {name for kind in wrapper.adapter_layer_names for name in getattr(wrapper, kind, ())}
    return [name for name in wrapper.active_adapters if name in present]


def _is_simple(wrappers: list[BaseTunerLayer]) -> bool:
    """Return whether each wrapper adapts a parameter of its own, and its merged weight can be computed directly."""
    keys = [adapted_parameter(wrapper) for wrapper in wrappers]
    return len(set(keys)) == len(keys) and all(
        isinstance(wrapper, SparseLoraLayer) and wrapper.quantization_backend is None for wrapper in wrappers
    )


def _check_attached(model: nn.Module, merge: bool) -> None:
    """Check that all adapters of `model` are layers, which can be taken out of it."""
    found = list(base_model(model).modules())
    for holder in (model, *found):
        configs = getattr(holder, "peft_config", {}) if isinstance(holder, PeftModel) else {}
        prompts = [name for name, config in configs.items() if config.is_prompt_learning]
        if merge and prompts:
            raise TypeError(
                f"Adapter {prompts[0]!r} consists of trained prompts, which cannot be merged into weights. Save the "
                "adapter instead."
            )
    inside = {id(below) for module in found if isinstance(module, WRAPPERS) for below in module.modules()}
    for module in found:
        of_peft = type(module).__module__.startswith("peft.") and not isinstance(module, MODELS)
        if of_peft and id(module) not in inside:
            raise TypeError(
                f"{type(module).__name__} belongs to an adapter that cannot be taken out of the model. Save the "
                "adapter instead."
            )


def _check_mergeable(name: str, module: nn.Module, merge: bool) -> None:
    """Check, without reading a weight, that the adapters around one layer can be merged."""
    wrappers, layer = wrappers_around(module), _innermost(module)
    for wrapper in wrappers:
        if _adapts(wrapper, merge):
            check_stored(name, layer, adapted_parameter(wrapper))
    sharded = any(parameter is not None and is_sharded(parameter) for parameter in layer._parameters.values())
    if _is_simple(wrappers) and not sharded:
        return
    backend = getattr(module, "quantization_backend", None) or _backend(layer)
    if sharded and backend is not None:
        raise TypeError(
            f"The weight of {name!r} is quantised and sharded over processes, so that it cannot be saved as a plain "
            "weight. Save the adapter, load it onto the base model in one process, and merge it there."
        )
    active = [wrapper for wrapper in wrappers if _adapts(wrapper, merge)]
    if active and backend is not None and not backend.supports_merge:
        raise TypeError(
            f"The weight of {name!r} cannot be dequantised ({backend.backend_name}), so that no adapter can be merged "
            "into it. Save the adapter, or merge it into a base model that is not quantised."
        )
    if len(active) > 1 and not _is_simple(wrappers) and not all(map(_adds, active)):
        raise TypeError(
            f"Several methods adapt the weight of {name!r}, and one of {[type(one).__name__ for one in active]} does "
            "not add to the weight, so that the merged weight depends on the order. Activate one of the adapters."
        )


def _adds(wrapper: BaseTunerLayer) -> bool:
    """Return whether the adapters of `wrapper` add to what the wrapped layer computes."""
    if isinstance(wrapper, SparseLoraLayer):
        return True
    return all(wrapper.supports_lora_conversion(name) for name in wrapper.active_adapters)


def _backend(layer: nn.Module) -> Any:
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=lambda: None)


def _without_adapters(
    name: str, module: nn.Module, merge: bool, tokens: dict[int, nn.Parameter], values: bool = True
) -> nn.Module:
    """Return a copy of one layer, without wrappers around it. Its weights are not copied where they do not change.

    Args:
        name: the name of the layer in the base model.
        module: the layer, or the outermost wrapper around it.
        merge: as in `merged_state_dict`.
        tokens: the weights with trained tokens, by what identifies the adapter. Tied weights are one parameter.
        values: False leaves changed weights on the meta device.
    """
    module = _chosen(module, merge)
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _with_tokens(cast(Any, module).token_adapter, merge, tokens, values)
    wrappers = wrappers_around(module)
    layer = _innermost(module)
    if not _is_simple(wrappers) and values:
        return _merged_twin(name, wrappers, layer, merge)
    plain = _shallow_copy(layer)
    for wrapper in wrappers:
        names, key = _adapts(wrapper, merge), adapted_parameter(wrapper)
        stored = layer._parameters.get(key)
        if stored is None or not (names or _is_to_unmerge(wrapper, merge)):
            continue
        if not values:
            changed = torch.empty(whole_shape(stored), dtype=stored.dtype, device="meta")
        elif names:
            sparse = cast(SparseLoraLayer, wrapper)
            changed = sparse._as_stored(sparse.merged_weight(names)).to("cpu", stored.dtype)
        else:
            changed = cast(SparseLoraLayer, wrapper)._stored_unmerged().detach().cpu()
        plain._parameters[key] = nn.Parameter(changed.contiguous(), requires_grad=False)
    return plain


def _is_to_unmerge(wrapper: BaseTunerLayer, merge: bool) -> bool:
    return wrapper.merged and (not merge or wrapper.disable_adapters)


def _with_tokens(adapter: Any, merge: bool, tokens: dict[int, nn.Parameter], values: bool) -> nn.Module:
    """Return a copy of an embedding, or of a head that is tied to it, with the tokens of `trainable_token_indices`."""
    plain = _shallow_copy(adapter.get_base_layer())
    names = _adapts(adapter, merge)
    restored = adapter.merged_adapters if _is_to_unmerge(adapter, merge) else []
    if not names and not restored:
        return plain
    root = id(adapter.tied_adapter or adapter)
    if root not in tokens:
        weight = adapter.get_base_layer().weight.detach()
        if not values:
            weight = torch.empty(whole_shape(weight), dtype=weight.dtype, device="meta")
        elif names:
            weight = adapter.get_merged_weights(names).detach().cpu()
        else:
            weight = weight.cpu().clone()
            for name in reversed(restored):
                index = torch.tensor(adapter.token_indices[name])
                weight.index_copy_(0, index, adapter.trainable_tokens_original[name].to(weight))
        tokens[root] = nn.Parameter(weight, requires_grad=False)
    plain._parameters["weight"] = tokens[root]
    return plain


def _merged_twin(name: str, wrappers: list[BaseTunerLayer], layer: nn.Module, merge: bool) -> nn.Module:
    """Return a copy of `layer` into which PEFT merged the adapters of `wrappers`, or from which it unmerged them."""
    changing = [wrapper for wrapper in wrappers if _adapts(wrapper, merge) or _is_to_unmerge(wrapper, merge)]
    if not changing:
        return _shallow_copy(layer)
    if len(changing) == 1:
        merged = _twin(changing[0], layer, merge)
    elif merge:
        # Each adapter is merged into the weight that it was trained beside, and the changes are added up.
        key = adapted_parameter(changing[0])
        before = _weights(layer)[key].float()
        deltas = [_weights(_twin(wrapper, layer, merge))[key].float() - before for wrapper in changing]
        merged = _bare(layer)
        weight = (before + sum(deltas)).to(merged._parameters[key].dtype)  # type: ignore[union-attr]
        merged._parameters[key] = nn.Parameter(weight, requires_grad=False)
    else:
        # Layers of this package are merged before others. The first one has kept the weight from before all of them.
        ours = [wrapper for wrapper in changing if isinstance(wrapper, SparseLoraLayer)]
        first = min(ours, key=lambda wrapper: wrapper._merge_rank, default=changing[0])
        merged = _twin(first, layer, merge)
    _check_zeros(name, wrappers, layer, merged)
    return merged


def _twin(wrapper: BaseTunerLayer, layer: nn.Module, merge: bool) -> nn.Module:
    """Return a copy of `layer` into which the adapters of `wrapper` alone are merged, or without them."""
    # Hooks may belong to the whole model, which must not be copied.
    twin = _bare(cast(nn.Module, wrapper))
    vars(twin).update(_beside=[], _attached_on=())
    twin._modules["base_layer"] = _bare(layer)
    twin = copy.deepcopy(twin)
    names = _adapts(wrapper, merge)
    special = getattr(twin, "unload_and_optionally_merge_module", None)
    if not names:
        cast(Any, twin).unmerge()
    elif special is not None:
        return cast(nn.Module, special(merge=True, safe_merge=False, adapter_names=names))
    else:
        cast(Any, twin).merge(adapter_names=names)
    return cast(nn.Module, twin.get_base_layer())  # type: ignore[operator]


def _check_zeros(name: str, wrappers: list[BaseTunerLayer], layer: nn.Module, merged: nn.Module) -> None:
    """Refuse a merge that fills zeros of a pruned weight."""
    before, after = _weights(layer), _weights(merged)
    for key, weight in before.items():
        other = after.get(key)
        if other is None or other.shape != weight.shape:
            continue
        zeros = weight == 0
        filled = int((zeros & (other.to(weight.device) != 0)).sum())
        if filled and int(zeros.sum()) > STRAY_ZEROS * weight.numel():
            raise ValueError(
                f"Merging the adapters of {name!r} ({type(wrappers[0]).__name__}) would fill {filled} zeros of its "
                "pruned weight. Save the adapter beside the pruned base model, or train a MaskLoRA or ScaledLoRA "
                "adapter, whose merge keeps every zero."
            )


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point weights of one layer, dequantised if they are quantised."""
    backend = _backend(layer)
    if backend is not None:
        return {"weight": backend.get_base_weight(layer)} if backend.supports_merge else {}
    return {key: p.detach() for key, p in layer._parameters.items() if p is not None and p.is_floating_point()}


def _bare(module: nn.Module) -> nn.Module:
    """Return a copy of `module` that shares its weights and modules, and has no hooks, of torch or of accelerate."""
    copied = _shallow_copy(module)
    for attribute in [key for key in vars(copied) if key.endswith("_hooks") or "_hooks_" in key]:
        copied.__dict__[attribute] = type(vars(copied)[attribute])()
    for attribute in ("_hf_hook", "_old_forward", "forward"):
        copied.__dict__.pop(attribute, None)
    return copied


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Return a copy of `module` that shares its weights and modules. Adding or replacing one does not change `module`.

    It does not run the constructor, nor `__copy__`, which FSDP's classes refuse.
    """
    copied: nn.Module = object.__new__(type(module))
    own = {key: dict(vars(module)[key]) for key in ("_parameters", "_buffers", "_modules")}
    copied.__dict__.update(vars(module) | own)
    # What Transformers keeps on models whose adapters `add_adapter` attached: it saves the adapters alone.
    for attribute in ("_hf_peft_config_loaded", "peft_config"):
        copied.__dict__.pop(attribute, None)
    return copied
