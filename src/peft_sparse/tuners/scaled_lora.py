"""The layers and the model of ScaledLoRA: W ⊙ (1 + s · BA), or W ⊙ (BA) of Zimmer et al. 2023, arXiv:2312.15230v3.

The classes set names and the formula, initialise A and B, and hold the forward pass of rank 1. Their other methods are
in `adapters`, `layer`, `conv`, `parameter` and `model`.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..model.weights import stored_weight
from .adapters import STATE_NAMES
from .conv import Conv2dMixin
from .functional import Factor, scale_rows_and_columns
from .layer import SparseLoraLayer
from .model import SparseLoraModel
from .parameter import ParameterMixin


# Entries of the two components that scale whole rows and whole columns of W. A larger value lets them move faster at
# the same learning rate. They would be 1 in the component of ones of `residual=False`, which trains worse.
GAIN = 0.1


class ScaledLoraLayer(SparseLoraLayer):
    """Base class of every ScaledLoRA layer.

    The effective weight of an adapter is W ⊙ (1 + s · BA), or with `residual=False` W ⊙ (1 + s · (BA - 1)), which is
    W ⊙ (BA) for s = 1.
    """

    prefix = "scaled_lora_"
    factor: Factor = "weight"
    adapter_layer_names = ("scaled_lora_A", "scaled_lora_B")
    other_param_names = (*STATE_NAMES, "scaled_lora_dropout", "scaled_lora_mask", "scaled_lora_proof")

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool | Literal["paper"]) -> None:
        """Draw A and B anew.

        Args:
            adapter_name: name of the adapter.
            init_weights: of a residual adapter, True draws A as LoRA does and sets B to zero. From rank 2 on, the
                first row of A is then constant, and so is the second column of B, whose row of A is zero. False draws
                both. With `residual=False`, True makes BA a matrix of ones: the first row of A and the first column
                of B are ones, the other rows of A are drawn as in LoRA, and the other columns of B are zero. "paper"
                sets every entry of A and B to 1 / sqrt(r). False draws A and B at random, and adds 1 to the first row
                of A and to the first column of B.
        """
        super().reset_parameters(adapter_name, init_weights)
        r = self.r[adapter_name]
        A, B = stored_weight(self.A[adapter_name]), stored_weight(self.B[adapter_name])
        # With several experts, A (experts · r, in) has the expert as the slower index, and B (out, r · experts) has it
        # as the faster one.
        experts = A.shape[0] // r
        rows_of_A, columns_of_B = A.view(experts, r, -1), B.view(-1, r, experts)
        if self.residual[adapter_name]:
            if init_weights and r > 1:
                rows_of_A[:, 0] = columns_of_B[:, 1] = GAIN
                rows_of_A[:, 1] = 0
            return
        if init_weights == "paper":
            nn.init.constant_(A, 1 / math.sqrt(r))
            nn.init.constant_(B, 1 / math.sqrt(r))
            return
        for first in (rows_of_A[:, 0], columns_of_B[:, 0]):
            if init_weights:
                first.fill_(1)
            else:
                first.add_(1)


class ScaledLoraLinear(ScaledLoraLayer):
    """ScaledLoRA around an `nn.Linear`, a transformers `Conv1D` or a quantised linear layer.

    Computes y = x (W ⊙ (1 + s · BA))^T + bias for x (..., in), W (out, in), A (r, in), B (out, r), with BA - 1 in the
    place of BA if `residual=False`. With one active adapter of r = 1, s = 1 and `residual=False` it computes
    y = ((x ⊙ a) W^T) ⊙ b + bias instead, without a matrix of W's size. A quantised base, a base layer with hooks, and
    training with dropout use the first formula. The quantised layers are those for which
    `peft.utils.resolve_quantization_backend` finds a backend.
    Zimmer et al. 2023 (PERP), arXiv:2312.15230v3.
    """

    def _forward_rank_one(self, x: Tensor, names: list[str]) -> Tensor | None:
        if (
            len(names) > 1
            or self.residual[names[0]]
            or self.r[names[0]] > 1
            or self.scaling[names[0]] != 1
            or self.quantization_backend is not None
            or self._is_narrower(names)
        ):
            return None
        a, b = stored_weight(self.A[names[0]])[0], stored_weight(self.B[names[0]])[:, 0]
        source = self._weight_source(names)
        return scale_rows_and_columns(x, source if isinstance(source, Tensor) else source(), a, b, self.bias)


class ScaledLoraConv2d(Conv2dMixin, ScaledLoraLayer):
    """ScaledLoRA around an `nn.Conv2d`.

    Convolves x (batch, in, height, width) with the kernel W ⊙ (1 + s · BA), W seen as a matrix
    (out, in / groups · k · k), with BA - 1 in the place of BA if `residual=False`.
    Zimmer et al. 2023 (PERP), arXiv:2312.15230, appendix A.2.
    """


# PEFT recognises wrappers of parameters by this class name.
class ParamWrapper(ParameterMixin, ScaledLoraLayer):
    """ScaledLoRA on a bare parameter: W (out, in), or (experts, out, in) with an A and a B for each expert.

    While the module that owns the parameter runs, the parameter is W ⊙ (1 + s · BA), with BA - 1 in the place of BA if
    `residual=False`.
    """


class ScaledLoraModel(SparseLoraModel):
    """A model whose layers have ScaledLoRA adapters.

    `peft.get_peft_model(model, ScaledLoRAConfig(...))` makes it. Zimmer et al. 2023 (PERP), arXiv:2312.15230v3
    (https://arxiv.org/abs/2312.15230).

    Args:
        model: the pruned base model.
        peft_config: its `ScaledLoRAConfig`, or several by name of the adapter.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: create the adapters on the meta device, for loading.
        state_dict: adapt the layers that this state dict of an adapter names.
    """

    prefix: str = "scaled_lora_"
    tuner_layer_cls = ScaledLoraLayer
    layer_classes = {"linear": ScaledLoraLinear, "conv2d": ScaledLoraConv2d, "parameter": ParamWrapper}
