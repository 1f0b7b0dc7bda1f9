"""Tells Transformers how to load packed checkpoints: `from_pretrained` then gives a plain model.

Transformers knows compressed weights as quantised ones. The quantizer that is registered here unpacks each tensor when
the loader has read it, before any of the loader's own conversions, and leaves no trace in the loaded model.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .packed_file import PackedFile
from .packed_weight import PackedWeight
from .packing import METHOD, check_count


class PackedConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a packed checkpoint.

    Args:
        codec: the name of the codec.
        version: its version.
        tensors: the number of tensors in all files.
        replaced: the entries of the configuration that packing replaced, with what stood there.
        kwargs: what later versions may add.
    """

    # Tells Transformers that the loaded model is a plain one.
    dequantize = True

    def __init__(
        self,
        codec: str | None = None,
        version: int | None = None,
        tensors: int | None = None,
        replaced: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.codec, self.version, self.tensors = codec, version, tensors
        self.replaced = replaced or {}


class PackedQuantizer(HfQuantizer):
    """Unpacks tensors while Transformers loads them."""

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "`PackedConfig` describes packed checkpoints, and this one is plain. Load it without "
                "`quantization_config`, and use `pack_checkpoint` to pack it."
            )
        # The converters of the model, by those that stand for them while it is loaded.
        self._converters: dict[WeightTransform, WeightTransform] = {}

    def is_serializable(self) -> bool:
        """The loaded model is saved as the plain model that it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The loaded model is a plain one."""
        return True

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Take out of the configuration what stops a loader that does not know packed checkpoints."""
        if getattr(config, "distributed_config", None) is not None:
            raise ValueError(
                "A packed checkpoint cannot be loaded in shards by several processes. Make a plain one with "
                "`unpack_checkpoint`."
            )
        if (named := self.quantization_config.replaced.get("transformers_weights")) is not None:
            config.transformers_weights = named
        elif hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        # The loader hides errors of its conversions in a report, and lets tensors be missing. So all is checked first.
        found = 0
        for path in checkpoint_files or []:
            with PackedFile(Path(path)) as file:
                file.verify()
                found += len(file.plain)
        check_count(found, self.quantization_config.tensors)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Let every tensor be unpacked before the model's own conversions."""
        updated = []
        for transform in weight_conversions:
            if isinstance(transform, WeightConverter):
                sources, targets = transform._original_source_patterns, transform._original_target_patterns
                copy = transform.copy(sources, targets, operations=[Unpack(), *transform.operations])
                self._converters[copy] = transform
                updated.append(copy)
            else:
                self._converters[transform] = transform
                updated.append(transform)
        # The empty pattern matches every name that no other converter does.
        return [*updated, WeightConverter("", "", [Unpack(final=True)], force_cpu=True)]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Leave the cast of packed weights to the step that unpacks them."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Unpack):
                operation.dtype = dtype
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Saving reverses these.
        model._weight_conversions = [
            self._converters[transform] for transform in model._weight_conversions if transform in self._converters
        ]
        return model


class Unpack(ConversionOps):
    """The step of the loader that unpacks what was read.

    Args:
        final: whether no conversion of the model follows.
    """

    def __init__(self, final: bool = False) -> None:
        self.final = final
        # What a weight is cast to, as a plain one would be when it is read.
        self.dtype: torch.dtype | None = None

    def convert(self, input_dict: dict[str, Any], full_layer_name: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return the same tensors, unpacked."""
        found = {
            pattern: [self._unpacked(tensor) for tensor in tensors] if isinstance(tensors, list) else tensors
            for pattern, tensors in input_dict.items()
        }
        if self.final:
            ((tensor,),) = found.values()
            return {str(full_layer_name): tensor}
        return found

    def _unpacked(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        packed = memoryview(tensor.cpu().numpy().data)
        weight = PackedWeight(lambda offset, size: bytes(packed[offset : offset + size]), len(packed))
        dense = weight.tensor()
        return dense.to(tensor.device, self.dtype if dense.is_floating_point() else None)


def enable_packed_models() -> None:
    """Let Transformers load packed checkpoints. A second call has no effect."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PackedConfig)
        register_quantizer(METHOD)(PackedQuantizer)
