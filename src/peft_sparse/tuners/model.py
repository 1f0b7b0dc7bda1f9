"""MaskLoraModel: puts MaskLoRA layers into a model, and holds an adapter to the mask it was trained on."""

import logging
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..blocks import base_layer, base_model, norm_names
from ..masks import fingerprint, mask_of, sparsity_of_fingerprint
from ..weights import weight_matrix
from .config import MaskLoRAConfig
from .layer import MaskLoraLayer, MaskLoraLinear


logger = logging.getLogger(__name__)


class MaskLoraModel(BaseTuner):
    """A model with MaskLoRA adapters; made by `peft.get_peft_model(model, MaskLoRAConfig(...))`."""

    prefix: str = "mask_lora_"
    tuner_layer_cls = MaskLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def _prepare_model(self, peft_config: MaskLoRAConfig, model: nn.Module) -> None:
        # PEFT calls this before it touches a module, so a refused adapter leaves the model as it was.
        _check_masks(model, peft_config)
        if peft_config.train_norms:
            peft_config.modules_to_save = sorted(set(peft_config.modules_to_save or ()) | _norm_targets(model))

    def _create_and_replace(
        self,
        peft_config: MaskLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks, alphas = peft_config.rank_pattern, peft_config.alpha_pattern
        r = ranks.get(get_pattern_key(ranks.keys(), current_key), peft_config.r)
        lora_alpha = alphas.get(get_pattern_key(alphas.keys(), current_key), peft_config.lora_alpha)
        if isinstance(target, MaskLoraLayer):
            target.update_layer(adapter_name, r, lora_alpha, peft_config)
            return
        layer = self._create_new_module(peft_config, adapter_name, target, r=r, lora_alpha=lora_alpha)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _create_new_module(
        self, peft_config: MaskLoRAConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(layer, (nn.Linear, Conv1D)):
            raise TypeError(
                f"Target module {target} is not supported. MaskLoRA adapts `torch.nn.Linear` and "
                "`transformers.pytorch_utils.Conv1D`; leave the module out of `target_modules`."
            )
        return MaskLoraLinear(
            target, adapter_name, config=peft_config, **kwargs, **get_quantization_kwargs(self.model)
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MaskLoRAConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT asks for the tensors right before it saves the configuration: the moment to write the proof into it.
        config.mask_fingerprints = {
            name: fingerprint(mask_of(module.pruned_weight()))
            for name, module in base_model(model).named_modules()
            if isinstance(module, MaskLoraLayer) and adapter_name in module.mask_lora_A and _is_loaded(module)
        }
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)


def _check_masks(model: nn.Module, config: MaskLoRAConfig) -> None:
    """Hold the zeros of `model` against the fingerprints in `config`.

    Raises:
        ValueError: they differ, and `on_mask_mismatch` is "error".
    """
    if config.on_mask_mismatch == "ignore" or not config.mask_fingerprints:
        return
    modules = dict(model.named_modules())
    differing = []
    for name, expected in config.mask_fingerprints.items():
        if name not in modules or not _is_loaded(modules[name]):
            continue
        module = modules[name]
        weight = module.pruned_weight() if isinstance(module, MaskLoraLayer) else weight_matrix(base_layer(module))
        found = fingerprint(mask_of(weight))
        if found != expected:
            differing.append((name, expected, found))
    if not differing:
        return
    examples = "; ".join(
        f"{name}: adapter {sparsity_of_fingerprint(expected):.4f}, model {sparsity_of_fingerprint(found):.4f}"
        for name, expected, found in differing[:3]
    )
    message = (
        f"The adapter was trained on other zeros than this base model has, in {len(differing)} of "
        f"{len(config.mask_fingerprints)} layers (sparsities: {examples}). Load the pruned base model the adapter was "
        'trained on, or pass a config with `on_mask_mismatch="warn"` to adapt to the zeros at hand.'
    )
    if config.on_mask_mismatch == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def _is_loaded(module: nn.Module) -> bool:
    # ZeRO-3 leaves parameters empty, and a meta weight has no zeros to compare.
    weight = getattr(base_layer(module), "weight", None)
    return isinstance(weight, torch.Tensor) and weight.numel() > 0 and not weight.is_meta


def _norm_targets(model: nn.Module) -> set[str]:
    """Return what names the norms of `model`, and nothing else, in `modules_to_save`: PEFT matches by `endswith`."""
    norms = norm_names(model)
    endings = {name.rpartition(".")[2] for name in norms}
    others = {name for name, _ in base_model(model).named_modules()} - set(norms)
    return set(norms) if any(name.endswith(tuple(endings)) for name in others) else endings
