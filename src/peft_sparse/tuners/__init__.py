"""PEFT tuners that cannot fill a zero. Importing this package registers them with PEFT."""

from .config import MaskLoRAConfig
from .layer import MaskLoraLayer, MaskLoraLinear
from .model import MaskLoraModel
from .registration import register


__all__ = ["MaskLoRAConfig", "MaskLoraLayer", "MaskLoraLinear", "MaskLoraModel"]

register("mask_lora", MaskLoRAConfig, MaskLoraModel)
