"""The only file that writes to PEFT's tables."""

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
    """Return the `PeftType` member called `name`, making it if PEFT has none.

    PEFT's registration insists on a member of its closed enum, and an enum with members cannot be subclassed. Setting
    the class attribute as well as the lookup tables is what makes `PeftType.MASK_LORA`, `PeftType["MASK_LORA"]`,
    `PeftType("MASK_LORA")`, iteration, pickling and JSON all work on Python 3.10 to 3.13.
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
    """Register a tuner with PEFT. Safe to repeat: after `importlib.reload` the tables point to the new classes.

    Raises:
        RuntimeError: another package registered a method of this name.
    """
    peft_type = PeftType[name.upper()]
    known: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is not None:
        if known.__module__ != config_cls.__module__:
            raise RuntimeError(
                f"PEFT method {name!r} is registered already, by {known.__module__}.{known.__qualname__}. Two "
                "packages cannot provide it; uninstall one, or import only one of them."
            )
        for table in TABLES:
            table.pop(peft_type, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
