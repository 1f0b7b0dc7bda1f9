"""Features that PEFT grants LoRA by name: hotswap, mixed models, rescaled adapters.

Each is opened by adding our types to a table or a tuple of PEFT's, and left alone where a PEFT has moved it.
"""

import functools
from typing import Any

import peft.helpers
import peft.mixed_model
import peft.tuners.mixed.model
import peft.utils.hotswap
from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from peft.tuners.mixed import MixedModel

from .model import SparseLoraModel


def enable_lora_extras(tuners: dict[type, type[SparseLoraModel]]) -> None:
    """Admit the tuners, given as configuration class: model class, wherever PEFT admits LoRA. Safe to repeat."""
    types = tuple(config_cls().peft_type for config_cls in tuners)
    _admit_to_hotswap(types)
    _admit_to_rescaling(tuners)
    _admit_to_mixed_models(types, tuners)


def _admit_to_hotswap(types: tuple[Any, ...]) -> None:
    table: dict[Any, list[str]] = getattr(peft.utils.hotswap, "CONFIG_KEYS_TO_CHECK", {})
    table.update((peft_type, ["use_rslora", "lora_dropout", "alpha_pattern"]) for peft_type in types)


def _admit_to_rescaling(tuners: dict[type, type[SparseLoraModel]]) -> None:
    # `rescale_adapter_scale` asks isinstance(module, LoraLayer), and isinstance takes a tuple.
    known = getattr(peft.helpers, "LoraLayer", None)
    if known is not None:
        peft.helpers.LoraLayer = _union(known, *(model_cls.tuner_layer_cls for model_cls in tuners.values()))


def _admit_to_mixed_models(types: tuple[Any, ...], tuners: dict[type, type[SparseLoraModel]]) -> None:
    module: Any = peft.tuners.mixed.model
    if not all(hasattr(module, name) for name in ("COMPATIBLE_TUNER_TYPES", "PREFIXES", "Configs", "Layers")):
        return
    compatible = _union(module.COMPATIBLE_TUNER_TYPES, *types)
    module.COMPATIBLE_TUNER_TYPES = peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = compatible
    module.Layers = _union(module.Layers, *(model_cls.tuner_layer_cls for model_cls in tuners.values()))
    module.PREFIXES.extend(cls.prefix for cls in tuners.values() if cls.prefix not in module.PREFIXES)
    for config_cls in tuners:
        module.Configs = module.Configs | config_cls
    for peft_type in types:
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type] = MixedModel
    if not hasattr(MixedModel._create_and_replace, "__wrapped__"):
        MixedModel._create_and_replace = _dispatching(MixedModel._create_and_replace, tuners)


def _dispatching(original: Any, tuners: dict[type, type[SparseLoraModel]]) -> Any:
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
