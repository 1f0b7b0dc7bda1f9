"""Open three features of PEFT to the tuners: hotswap, `rescale_adapter_scale`, and mixed models.

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

What PEFT does with its own methods stays the same. If a version of PEFT lacks one of these names, that feature does
not work with the tuners, and everything else does. `tests/tuners/test_tuners.py` holds the complete list of changes.
"""

import functools
from typing import Any

import peft.helpers
import peft.tuners.mixed.model
import peft.utils.hotswap
from peft.tuners.mixed import MixedModel

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


def _open_hotswap(types: tuple[Any, ...]) -> None:
    table: dict[Any, list[str]] = getattr(peft.utils.hotswap, "CONFIG_KEYS_TO_CHECK", {})
    table.update((peft_type, ["use_rslora", "lora_dropout", "alpha_pattern"]) for peft_type in types)


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
