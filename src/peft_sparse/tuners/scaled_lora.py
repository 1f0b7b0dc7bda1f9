"""ScaledLoRA: W ⊙ (BA), from exactly W. Zimmer et al. 2023, arXiv:2312.15230v3."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..model.weights import stored_weight
from .conv import Conv2dMixin
from .functional import Factor, scale_rows_and_columns
from .layer import STATE_NAMES, SparseLoraLayer
from .model import SparseLoraModel
from .parameter import ParameterMixin


class ScaledLoraLayer(SparseLoraLayer):
    """What all ScaledLoRA layers are instances of."""

    prefix = "scaled_lora_"
    factor: Factor = "weight"
    adapter_layer_names = ("scaled_lora_A", "scaled_lora_B")
    other_param_names = (*STATE_NAMES, "scaled_lora_dropout", "scaled_lora_mask")

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool | Literal["paper"]) -> None:
        """Make BA all ones: the first component of ones, the others as in LoRA, so that no two of them are equal."""
        super().reset_parameters(adapter_name, init_weights)
        r = self.r[adapter_name]
        A, B = stored_weight(self.A[adapter_name]), stored_weight(self.B[adapter_name])
        if init_weights == "paper":
            nn.init.constant_(A, 1 / math.sqrt(r))
            nn.init.constant_(B, 1 / math.sqrt(r))
            return
        # A parameter of several experts has r components each: all first components come first in A, in B every
        # component counts its experts.
        experts = A.shape[0] // r
        first_of_A, first_of_B = A.view(experts, r, -1)[:, 0], B.view(-1, r, experts)[:, 0]
        if init_weights:
            first_of_A.fill_(1)
            first_of_B.fill_(1)
        else:
            first_of_A.add_(1)
            first_of_B.add_(1)


class ScaledLoraLinear(ScaledLoraLayer):
    """y = x (W ⊙ (BA))^T + b around an `nn.Linear` or a transformers `Conv1D`."""

    def _forward_rank_one(self, x: Tensor, names: list[str]) -> Tensor | None:
        if (
            len(names) > 1
            or self.r[names[0]] > 1
            or self.scaling[names[0]] != 1
            or self.quantization_backend is not None
        ):
            return None
        a, b = stored_weight(self.A[names[0]])[0], stored_weight(self.B[names[0]])[:, 0]
        return scale_rows_and_columns(x, self.pruned_weight(), a, b, self.bias)


class ScaledLoraConv2d(Conv2dMixin, ScaledLoraLayer):
    """The same around an `nn.Conv2d`."""


class ParamWrapper(ParameterMixin, ScaledLoraLayer):
    """The same on a parameter; PEFT knows wrappers of parameters by this name."""


class ScaledLoraModel(SparseLoraModel):
    """A model with ScaledLoRA adapters; made by `peft.get_peft_model(model, ScaledLoRAConfig(...))`."""

    prefix: str = "scaled_lora_"
    tuner_layer_cls = ScaledLoraLayer
    layer_classes = {"linear": ScaledLoraLinear, "conv2d": ScaledLoraConv2d, "parameter": ParamWrapper}
