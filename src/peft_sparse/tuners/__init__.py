"""The PEFT tuners MaskLoRA and ScaledLoRA, which keep the zeros of the base weights.

Importing this package registers them with PEFT. Of the other folders it imports `model` alone.
"""

from .config import MaskLoRAConfig, ScaledLoRAConfig
from .groups import trainable_shares
from .keeping import keep_effective_weights
from .lora_extras import enable_lora_extras
from .mask_lora import MaskLoraConv2d, MaskLoraLayer, MaskLoraLinear, MaskLoraModel
from .merging import merged_state_dict
from .proof import remember_proof
from .registration import register
from .scaled_lora import ScaledLoraConv2d, ScaledLoraLayer, ScaledLoraLinear, ScaledLoraModel


__all__ = [
    "MaskLoRAConfig",
    "MaskLoraConv2d",
    "MaskLoraLayer",
    "MaskLoraLinear",
    "MaskLoraModel",
    "ScaledLoRAConfig",
    "ScaledLoraConv2d",
    "ScaledLoraLayer",
    "ScaledLoraLinear",
    "ScaledLoraModel",
    "keep_effective_weights",
    "merged_state_dict",
    "remember_proof",
    "trainable_shares",
]

register("mask_lora", MaskLoRAConfig, MaskLoraModel)
register("scaled_lora", ScaledLoRAConfig, ScaledLoraModel)
enable_lora_extras({MaskLoRAConfig: MaskLoraModel, ScaledLoRAConfig: ScaledLoraModel})
