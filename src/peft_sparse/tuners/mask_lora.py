"""The layers and the model of MaskLoRA, W + s · M ⊙ (BA). Zimmer et al. 2023 (PERP), arXiv:2312.15230v3.

The classes set names and the formula. Their methods are in `adapters`, `layer`, `conv`, `parameter` and `model`.
"""

from .adapters import STATE_NAMES
from .conv import Conv2dMixin
from .functional import Factor
from .layer import SparseLoraLayer
from .model import SparseLoraModel
from .parameter import ParameterMixin


class MaskLoraLayer(SparseLoraLayer):
    """Base class of every MaskLoRA layer. Effective weight: W + s · M ⊙ (BA)."""

    prefix = "mask_lora_"
    factor: Factor = "mask"
    adapter_layer_names = ("mask_lora_A", "mask_lora_B")
    other_param_names = (*STATE_NAMES, "mask_lora_dropout", "mask_lora_mask", "mask_lora_proof")


class MaskLoraLinear(MaskLoraLayer):
    """MaskLoRA around an `nn.Linear`, a transformers `Conv1D` or a quantised linear layer.

    Computes y = x (W + s · M ⊙ (BA))^T + bias for x (..., in), W and its mask M (out, in), A (r, in), B (out, r).
    The quantised layers are those for which `peft.utils.resolve_quantization_backend` finds a backend.
    Zimmer et al. 2023 (PERP), arXiv:2312.15230v3.
    """


class MaskLoraConv2d(Conv2dMixin, MaskLoraLayer):
    """MaskLoRA around an `nn.Conv2d`.

    Convolves x (batch, in, height, width) with the kernel W + s · M ⊙ (BA), W seen as a matrix
    (out, in / groups · k · k). Zimmer et al. 2023 (PERP), arXiv:2312.15230, appendix A.2.
    """


# PEFT recognises wrappers of parameters by this class name.
class ParamWrapper(ParameterMixin, MaskLoraLayer):
    """MaskLoRA on a bare parameter: W (out, in), or (experts, out, in) with an A and a B for each expert.

    While the module that owns the parameter runs, the parameter is W + s · M ⊙ (BA).
    """


class MaskLoraModel(SparseLoraModel):
    """A model whose layers have MaskLoRA adapters.

    `peft.get_peft_model(model, MaskLoRAConfig(...))` makes it. Zimmer et al. 2023 (PERP), arXiv:2312.15230v3
    (https://arxiv.org/abs/2312.15230).

    Args:
        model: the pruned base model.
        peft_config: its `MaskLoRAConfig`, or several by name of the adapter.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: create the adapters on the meta device, for loading.
        state_dict: adapt the layers that this state dict of an adapter names.
    """

    prefix: str = "mask_lora_"
    tuner_layer_cls = MaskLoraLayer
    layer_classes = {"linear": MaskLoraLinear, "conv2d": MaskLoraConv2d, "parameter": ParamWrapper}
