"""MaskLoRA: W + s · M ⊙ (BA). Zimmer et al. 2023, arXiv:2312.15230v3."""

from .conv import Conv2dMixin
from .functional import Factor
from .layer import STATE_NAMES, SparseLoraLayer
from .model import SparseLoraModel
from .parameter import ParameterMixin


class MaskLoraLayer(SparseLoraLayer):
    """What all MaskLoRA layers are instances of."""

    prefix = "mask_lora_"
    factor: Factor = "mask"
    adapter_layer_names = ("mask_lora_A", "mask_lora_B")
    other_param_names = (*STATE_NAMES, "mask_lora_dropout", "mask_lora_mask")


class MaskLoraLinear(MaskLoraLayer):
    """y = x (W + s · M ⊙ (BA))^T + b around an `nn.Linear` or a transformers `Conv1D`."""


class MaskLoraConv2d(Conv2dMixin, MaskLoraLayer):
    """The same around an `nn.Conv2d`."""


class ParamWrapper(ParameterMixin, MaskLoraLayer):
    """The same on a parameter; PEFT knows wrappers of parameters by this name."""


class MaskLoraModel(SparseLoraModel):
    """A model with MaskLoRA adapters; made by `peft.get_peft_model(model, MaskLoRAConfig(...))`."""

    prefix: str = "mask_lora_"
    tuner_layer_cls = MaskLoraLayer
    layer_classes = {"linear": MaskLoraLinear, "conv2d": MaskLoraConv2d, "parameter": ParamWrapper}
