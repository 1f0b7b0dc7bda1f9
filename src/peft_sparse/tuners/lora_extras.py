"""Open features of PEFT to the tuners: hotswap, `rescale_adapter_scale`, mixed models, and loading by Transformers.

PEFT 0.21.2 offers these features to a list of its own methods and has no public hook to extend the list. This module
extends the lists in memory when the package is imported. It changes no file of PEFT.

Entries added to PEFT's own containers:

- `peft.utils.hotswap.CONFIG_KEYS_TO_CHECK`: `hotswap_adapter` refuses a method that has no entry.
- `peft.tuners.mixed.model.PREFIXES`: a mixed model trains the parameters whose names hold one of these prefixes.

Names replaced in PEFT's modules:

- `peft.helpers.LoraLayer` becomes a tuple of LoRA's layer class and ours: `rescale_adapter_scale` rescales instances.
- `COMPATIBLE_TUNER_TYPES` of `peft.tuners.mixed` and of `peft.tuners.mixed.model` becomes a longer tuple.
  `peft.tuners.mixed.model.Layers` becomes a longer tuple too, and `peft.tuners.mixed.model.Configs` a longer union. A
  mixed model refuses or skips methods, layers and configurations that these do not name.
- `peft.tuners.mixed.model.MixedModel._create_and_replace` becomes a function that handles our configurations and
  passes every other one on to the original.
- `peft.tuners.tuners_utils.BaseTuner.merge_adapter` becomes a function that merges our adapters before those of other
  methods around the same weights, because these fill the zeros that ours read. It calls the original for a model
  whose adapters are all ours or all of others.
- `peft.utils.hotswap.hotswap_adapter_from_state_dict` becomes a function that calls `hotswap.swap_adapter` for our
  configurations. The original sets to zero what the new adapter lacks, which is no identity for W ⊙ (BA). For LoRA it
  calls the original, which also sets parameters of other adapters to zero whose names hold the letters "lora_" and
  the adapter's name. Those of our layers are put back.
- `peft.utils.hotswap.prepare_model_for_compiled_hotswap` becomes a function that calls `hotswap.pad_ranks` for models
  with our layers, and the original for models with LoRA's.
- `peft.tuners.lora.arrow.check_loaded_lora_compatibility_arrow` becomes a function that refuses our adapters and calls
  the original for others. `create_arrow_model` calls it, and would stop later with an error that tells nothing.

One name is replaced in Transformers:

- `transformers.integrations.peft.PeftAdapterMixin.load_adapter` becomes a function that calls the original, and then
  gives layers that the file lacks an adapter without an effect. The original draws their A and B at random. The
  function also refuses to exchange an adapter of this package in place, which the original can only do with LoRA.

What PEFT does with its own methods stays the same. If a version of PEFT lacks one of these names, that feature does
not work with the tuners, and everything else does. `tests/tuners/test_tuners.py` holds the complete list of changes.
"""

import functools
import inspect
from typing import Any, cast

import peft.helpers
import peft.tuners.lora.arrow
import peft.tuners.mixed.model
import peft.utils.hotswap
import torch
import transformers.integrations.peft
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from torch import Tensor, nn

from .base_weight import adapted_parameter, wrappers_around
from .config import SparseLoraConfig
from .hotswap import pad_ranks, reset_missing, swap_adapter
from .layer import SparseLoraLayer
from .model import SparseLoraModel


def enable_lora_extras(tuners: dict[type, type[SparseLoraModel]]) -> None:
    """Open hotswap, rescaling and mixed models to the tuners. A second call changes nothing.

    Args:
        tuners: the model class of each configuration class.
    """
    types = tuple(config_cls().peft_type for config_cls in tuners)
    _open_hotswap(types)
    _open_rescaling(tuners)
    _open_mixed_models(types, tuners)
    _order_merges()
    _open_transformers()
    _refuse_arrow()


def _open_hotswap(types: tuple[Any, ...]) -> None:
    module: Any = peft.utils.hotswap
    # `swap_adapter` sets what LoRA has to check here, such as the scalings of `alpha_pattern`.
    table: dict[Any, list[str]] = getattr(module, "CONFIG_KEYS_TO_CHECK", {})
    table.update((peft_type, ["use_rslora", "lora_dropout"]) for peft_type in types)
    for name, wrap in (
        ("hotswap_adapter_from_state_dict", _swapping),
        ("prepare_model_for_compiled_hotswap", _padding),
    ):
        original = getattr(module, name, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            setattr(module, name, wrap(original))


def _swapping(original: Any) -> Any:
    """Return a function that swaps adapters of this package, and calls `original` for all others."""

    @functools.wraps(original)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(config, SparseLoraConfig):
            swap_adapter(model, state_dict, adapter_name, config)
            return
        kept = [(tensor, tensor.detach().clone()) for tensor in _adapter_tensors(model)]
        try:
            original(model, state_dict, adapter_name, config, *args, **kwargs)
        finally:
            with torch.no_grad():
                for tensor, before in kept:
                    tensor.copy_(before)

    return hotswap_adapter_from_state_dict


def _padding(original: Any) -> Any:
    """Return a function that pads the adapters of this package, and calls `original` for LoRA's."""

    @functools.wraps(original)
    def prepare_model_for_compiled_hotswap(
        model: nn.Module,
        *,
        target_rank: int | None = None,
        config: Any = None,
        check_compiled: str = "error",
    ) -> None:
        ours = any(isinstance(module, SparseLoraLayer) for module in model.modules())
        if ours:
            pad_ranks(model, target_rank, config, check_compiled)
        if not ours or any(isinstance(module, peft.utils.hotswap.LoraLayer) for module in model.modules()):
            original(model, target_rank=target_rank, config=config, check_compiled=check_compiled)

    return prepare_model_for_compiled_hotswap


def _adapter_tensors(model: nn.Module) -> list[Tensor]:
    """Return A, B and saved masks of every adapter of this package in the model."""
    layers = [module for module in model.modules() if isinstance(module, SparseLoraLayer)]
    factors = [module for layer in layers for module in (layer.A, layer.B)]
    return [parameter for factor in factors for parameter in factor.parameters()] + [
        mask for layer in layers for mask in layer.saved_masks.values()
    ]


def _open_rescaling(tuners: dict[type, type[SparseLoraModel]]) -> None:
    # PEFT uses the name in one `isinstance` call, which takes a tuple too.
    known = getattr(peft.helpers, "LoraLayer", None)
    if known is not None:
        peft.helpers.LoraLayer = _union(known, *(model_cls.tuner_layer_cls for model_cls in tuners.values()))


def _open_mixed_models(types: tuple[Any, ...], tuners: dict[type, type[SparseLoraModel]]) -> None:
    module: Any = peft.tuners.mixed.model
    if not all(hasattr(module, name) for name in ("COMPATIBLE_TUNER_TYPES", "PREFIXES", "Configs", "Layers")):
        return
    compatible = _union(module.COMPATIBLE_TUNER_TYPES, *types)
    module.COMPATIBLE_TUNER_TYPES = peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = compatible
    module.Layers = _union(module.Layers, *(model_cls.tuner_layer_cls for model_cls in tuners.values()))
    module.PREFIXES.extend(cls.prefix for cls in tuners.values() if cls.prefix not in module.PREFIXES)
    for config_cls in tuners:
        module.Configs = module.Configs | config_cls
    if not hasattr(MixedModel._create_and_replace, "__wrapped__"):
        MixedModel._create_and_replace = _dispatching(MixedModel._create_and_replace, tuners)


def _order_merges() -> None:
    original = BaseTuner.merge_adapter
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        ours = [layer for layer in layers if isinstance(layer, SparseLoraLayer)]
        if not ours or len(ours) == len(layers):
            original(self, adapter_names, safe_merge)
            return
        self._check_merge_allowed()
        for name, layer in self.model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                _check_merged_together(name, layer, adapter_names)
        # The zeros are gone when others have merged their adapters.
        for layer in [*ours, *(layer for layer in layers if layer not in ours)]:
            with onload_layer(layer):
                layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)

    BaseTuner.merge_adapter = merge_adapter


def _check_merged_together(name: str, outermost: BaseTunerLayer, adapter_names: list[str] | None) -> None:
    """Check that no adapter of this package is left to compute with a weight into which others are merged."""
    around = wrappers_around(cast(nn.Module, outermost))
    chosen = [
        (layer, [each for each in (adapter_names or layer.active_adapters) if each in _adapters_of(layer)])
        for layer in around
        if adapted_parameter(layer) == adapted_parameter(outermost)
    ]
    if not any(names for layer, names in chosen if not isinstance(layer, SparseLoraLayer)):
        return
    for layer, names in chosen:
        if isinstance(layer, SparseLoraLayer):
            left = set(layer._present(layer.active_adapters)) - {*names, *layer.merged_adapters}
            if left:
                raise ValueError(
                    f"Adapter {sorted(left)[0]!r} is active in {name!r} and would stay unmerged, where adapters of "
                    "other methods are merged and fill the zeros that it reads. Merge all active adapters together, "
                    "or choose others by `set_adapter`."
                )


def _adapters_of(layer: BaseTunerLayer) -> set[str]:
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}


def _open_transformers() -> None:
    mixin: Any = getattr(transformers.integrations.peft, "PeftAdapterMixin", None)
    if mixin is None or hasattr(mixin.load_adapter, "__wrapped__"):
        return
    original = mixin.load_adapter
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = {name for layer in self.modules() if isinstance(layer, SparseLoraLayer) for name in layer.A}
        _refuse_hotswap(self, signature.bind(self, *args, **kwargs).arguments)
        found = original(self, *args, **kwargs)
        # Transformers also lists the parameters of the adapters that were there before.
        lacking = set(getattr(found, "missing_keys", ())) | {key for key, *_ in getattr(found, "mismatched_keys", ())}
        reset_missing(self, lacking, before)
        return found

    mixin.load_adapter = load_adapter


def _refuse_hotswap(model: Any, arguments: dict[str, Any]) -> None:
    """Refuse that Transformers exchanges an adapter of this package in place, which it can only do with LoRA."""
    name = arguments.get("adapter_name") or "default"
    if not isinstance(getattr(model, "peft_config", {}).get(name), SparseLoraConfig):
        return
    hotswap = arguments.get("hotswap", "auto")
    if getattr(model, "_hotswap_enabled", False) if hotswap == "auto" else hotswap:
        raise ValueError(
            f"The adapter {name!r} is there already, and Transformers exchanges adapters in place for LoRA alone. "
            f"Call `model.delete_adapter({name!r})` first. Or attach the adapter by `peft.PeftModel.from_pretrained`, "
            "whose models `peft.utils.hotswap.hotswap_adapter` accepts."
        )


def _refuse_arrow() -> None:
    module: Any = peft.tuners.lora.arrow
    original = getattr(module, "check_loaded_lora_compatibility_arrow", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def check_loaded_lora_compatibility_arrow(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ours = next((module for module in model.modules() if isinstance(module, SparseLoraLayer)), None)
        if ours is not None:
            raise TypeError(
                f"Arrow routes among LoRA adapters, got one with layers of type {type(ours).__name__}. Train the "
                "adapters by `peft.LoraConfig`, or choose one of them by `set_adapter`."
            )
        return original(model, *args, **kwargs)

    module.check_loaded_lora_compatibility_arrow = check_loaded_lora_compatibility_arrow


def _dispatching(original: Any, tuners: dict[type, type[SparseLoraModel]]) -> Any:
    """Return a method that handles the configurations of `tuners`, and calls `original` for all others."""

    @functools.wraps(original)
    def create_and_replace(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_cls = tuners.get(type(config))
        if model_cls is None:
            original(self, config, *args, **kwargs)
        else:
            model_cls.create_in(self, config, *args, **kwargs)

    return create_and_replace


def _union(known: Any, *added: Any) -> tuple[Any, ...]:
    known = known if isinstance(known, tuple) else (known,)
    return (*known, *(one for one in added if one not in known))
