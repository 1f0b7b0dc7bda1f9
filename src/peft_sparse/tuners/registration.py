"""Register the tuners with PEFT.

This file adds to PEFT's tables of methods and to its `PeftType` enum. `lora_extras` makes the other changes to PEFT.
"""

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method


TABLES: tuple[dict[Any, Any], ...] = (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)


def add_peft_type(name: str) -> PeftType:
    """Return the member of `PeftType` called `name`. The member is added if PEFT has none of this name.

    PEFT's registration accepts only members of this enum, and Python does not allow subclasses of an enum that has
    members. The member is written as a class attribute and into the enum's lookup tables. Both are needed for
    `PeftType.MASK_LORA`, `PeftType["MASK_LORA"]`, `PeftType("MASK_LORA")`, iteration, pickling and JSON to work on
    Python 3.11 to 3.13.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Register a tuner with PEFT by `peft.utils.register_peft_method`.

    A second call with classes of the same module replaces the first: after `importlib.reload`, PEFT's tables name the
    new classes.

    Args:
        name: name of the method in lower case, such as "mask_lora".
        config_cls: class of the configuration.
        model_cls: class of the model, a subclass of `BaseTuner`.

    Raises:
        RuntimeError: a class of another module is registered under this name.
    """
    peft_type = PeftType[name.upper()]
    known: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is not None:
        if known.__module__ != config_cls.__module__:
            raise RuntimeError(
                f"The PEFT method {name!r} is registered already, by {known.__module__}.{known.__qualname__}. Only "
                "one package can provide a method. Uninstall one of the two packages, or import only one of them."
            )
        for table in TABLES:
            table.pop(peft_type, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=True)
