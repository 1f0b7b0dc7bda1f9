"""Write in every model card that leaves with an adapter how it is loaded. PEFT alone does not know the methods.

`SparseLoraConfig.save_pretrained` writes the card of the folder that it saves into. PEFT and Transformers write other
cards, some of them after that, and have no hook for text in them. This module extends three methods in memory when the
package is imported. It changes no file of PEFT or Transformers, and no card of a model without our adapters. Those of
`residual_lora` are ordinary LoRA adapters, and are marked by `mark_residual`.

- `PeftModel.create_or_update_model_card`: the card that PEFT writes first, beside the folders of named adapters.
- `PushToHubMixin._upload_modified_files`: `push_to_hub` of models writes a card of its own right before this call.
- `Trainer.create_model_card`, also of every subclass that has its own, such as those of TRL. `Trainer.push_to_hub`
  calls it after it has saved the model.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import Trainer
from transformers.utils import PushToHubMixin

from ..model.blocks import base_model
from ..model.masks import sparsity_of
from ..model.sharding import has_shards
from ..model.tree import loaded_from
from .card import describe_residual
from .config import SparseLoraConfig
from .layer import SparseLoraLayer


# The attribute by which the configuration of an adapter says that it corrects a pruned base. PEFT does not save it.
_RESIDUAL = "_corrects_sparsity"


def mark_residual(config: LoraConfig, sparsity: float) -> None:
    """Let the cards of an adapter say that it corrects a pruned model.

    Args:
        config: the configuration of the adapter.
        sparsity: the fraction of zeros in the corrected weights.
    """
    setattr(config, _RESIDUAL, sparsity)


def enable_cards() -> None:
    """Extend the three methods. A second call changes nothing."""
    _extend(PeftModel, "create_or_update_model_card", lambda model, output_dir: describe_adapters(model, output_dir))
    _extend(
        PushToHubMixin,
        "_upload_modified_files",
        lambda pushed, working_dir, *args, **kwargs: describe_adapters(pushed, working_dir),
        before=True,
    )
    _extend_trainers()


def describe_adapters(model: Any, folder: str) -> None:
    """Write into the model card in `folder` how the adapters of `model` are loaded, if one of them is ours.

    Args:
        model: a model, or the configuration of an adapter.
        folder: the folder of the card.
    """
    if isinstance(model, SparseLoraConfig):
        model.describe(folder)
        return
    # Other models with adapters are saved whole, and a folder with a whole model holds no adapter to load.
    saves_adapters = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    if not saves_adapters or not isinstance(model, nn.Module):
        return
    configs = cast(dict[str, Any], model.peft_config)
    ours = {name: config for name, config in configs.items() if isinstance(config, SparseLoraConfig)}
    if ours:
        layers = (module for module in model.modules() if isinstance(module, SparseLoraLayer))
        active = [name for layer in layers for name in layer.active_adapters if name in ours]
        name = next(iter([*active, *ours]))
        ours[name].describe(folder, mean_sparsity(model, name), loaded_from(model))
        return
    for config in configs.values():
        if hasattr(config, _RESIDUAL):
            base = config.base_model_name_or_path or loaded_from(model)
            describe_residual(folder, getattr(config, _RESIDUAL), task_type=config.task_type, base=base)


def mean_sparsity(model: nn.Module, adapter_name: str) -> float | None:
    """Return the mean of the sparsities of the base weights that have the adapter. Return None if none can be read."""
    if has_shards(model):
        return None
    found = []
    for module in base_model(model).modules():
        if isinstance(module, SparseLoraLayer) and adapter_name in module.A and module._readable():
            weight = module.pruned_weight()
            if weight.numel() and not weight.is_meta:
                found.append(sparsity_of(weight))
    return sum(found) / len(found) if found else None


def _extend(kind: type, name: str, describe: Callable[..., None], before: bool = False) -> None:
    """Let the method `name` of `kind` call `describe` with its own arguments, before or after it does its work."""
    original = vars(kind).get(name)
    if original is None or hasattr(original, "describes_adapters"):
        return

    @functools.wraps(original)
    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before:
            describe(self, *args, **kwargs)
        result = original(self, *args, **kwargs)
        if not before:
            describe(self, *args, **kwargs)
        return result

    vars(extended)["describes_adapters"] = True
    setattr(kind, name, extended)


def _describe_of_trainer(trainer: Any, *args: Any, **kwargs: Any) -> None:
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        describe_adapters(model, trainer.args.output_dir)


def _extend_trainers() -> None:
    known = [Trainer]
    while known:
        kind = known.pop()
        _extend(kind, "create_model_card", _describe_of_trainer)
        known += kind.__subclasses__()
    if "__init_subclass__" not in vars(Trainer):
        # Trainers that are imported later.
        Trainer.__init_subclass__ = classmethod(_extend_new_trainer)


def _extend_new_trainer(kind: Any, **kwargs: Any) -> None:
    super(Trainer, kind).__init_subclass__(**kwargs)
    _extend(kind, "create_model_card", _describe_of_trainer)
