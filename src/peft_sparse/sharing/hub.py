"""Write the card of every model and adapter of this package that is saved or leaves for the Hub.

The configuration of an adapter calls `card_of_config` when it is saved. PEFT and Transformers write other cards, some
of them after that, and have no hook for text in them. This module extends three methods in memory when the package is
imported. It changes no file of PEFT or Transformers, and no card of a model that this package has not changed.

- `PeftModel.create_or_update_model_card`: the card that PEFT writes first, beside the folders of named adapters.
- `PushToHubMixin._upload_modified_files`: `push_to_hub` of models writes a card of its own right before this call.
- `Trainer.create_model_card`, also of every subclass that has its own, such as those of TRL. `Trainer.push_to_hub`
  calls it after it has saved the model.
"""

import dataclasses
import filecmp
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import PushToHubMixin

from ..model.environment import remembered
from ..model.sharding import has_shards
from ..model.tree import has_adapters, loaded_from
from ..reconstruction.residual_report import marked
from ..tuners.config import CARD_WRITERS, SparseLoraConfig
from ..tuners.layer import SparseLoraLayer
from ..tuners.proof import other_sparsities
from .card import CARD, card_in, complete_card, name_repository, part_of
from .card_facts import (
    Facts,
    class_of_task,
    facts_of_model,
    size_of_weights,
    zeros_in_fingerprints,
    zeros_under_adapter,
)


def enable_cards() -> None:
    """Extend the three methods, and write cards when adapters are saved. A second call changes nothing."""
    if card_of_config not in CARD_WRITERS:
        CARD_WRITERS.append(card_of_config)
    _extend(PeftModel, "create_or_update_model_card", _describe_saved, _read)
    _extend(PushToHubMixin, "_upload_modified_files", _describe_pushed)
    _extend_trainers()


def card_of_config(folder: str, config: SparseLoraConfig) -> None:
    """Write the card of an adapter that is saved. If it is a checkpoint of a Trainer, write the card of the run too.

    The card of the run is the one that the Trainer pushes to the Hub.

    Args:
        folder: the folder of the adapter.
        config: its configuration, which has its fingerprints.
    """
    facts = _facts_of_config(config)
    complete_card(folder, facts)
    path = Path(folder).absolute()
    if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name):
        complete_card(path.parent, facts)


def describe_model(model: nn.Module, folder: str | Path, *, repo_id: str | None = None, before: str = "") -> None:
    """Write the card of a model that was saved to `folder`: that of its adapters, or that of the plain model.

    Args:
        model: the model. Its weights are not sharded.
        folder: the folder of the card.
        repo_id: the name on the Hub.
        before: the card that another library has just replaced.
    """
    if has_adapters(model):
        _describe_adapters(model, folder, before, repo_id=repo_id)
    else:
        complete_card(folder, facts_of_model(model, folder, repo_id=repo_id), before=before)


def _facts_of_config(config: SparseLoraConfig, **others: Any) -> Facts:
    known: dict[str, Any] = {
        "kind": "adapter",
        "weights": zeros_in_fingerprints(config.mask_fingerprints or config._proof),
        "done": config._done,
        "base": config.base_model_name_or_path,
        "auto_class": class_of_task(config.task_type),
        "adapter": {
            "peft_type": config.peft_type.value,
            "r": config.r,
            "save_mask": config.save_mask,
            "other_sparsities": config.other_sparsities or config._others,
        },
    }
    return Facts(**known | {name: value for name, value in others.items() if value})


def _describe_adapters(model: Any, folder: str | Path, before: str = "", repo_id: str | None = None) -> bool:
    """Write into the card in `folder` how the adapters of `model` are loaded, and return whether one is ours."""
    if isinstance(model, SparseLoraConfig):
        complete_card(folder, _facts_of_config(model, repo_id=repo_id), before=before)
        return True
    # Other models with adapters are saved whole, and a folder with a whole model holds no adapter to load.
    saves_adapters = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    if not saves_adapters or not isinstance(model, nn.Module):
        return False
    configs = cast(dict[str, Any], model.peft_config)
    base = loaded_from(model)
    ours = {name: config for name, config in configs.items() if isinstance(config, SparseLoraConfig)}
    if ours:
        layers = (module for module in model.modules() if isinstance(module, SparseLoraLayer))
        active = [name for layer in layers for name in layer.active_adapters if name in ours]
        name = next(iter([*active, *ours]))
        weights = () if has_shards(model) else zeros_under_adapter(model, name)
        if weights:
            # PEFT writes a card before it saves the adapter.
            ours[name]._others = other_sparsities(model, name)
        # While the model is being saved, the folder may hold the weights of an earlier save, or none.
        size = size_of_weights(folder) if repo_id else None
        sizes = {} if size is None else {"on disk": size}
        known = {"weights": weights, "done": remembered(model), "sizes": sizes, "repo_id": repo_id}
        facts = _facts_of_config(ours[name], **known)
        complete_card(folder, dataclasses.replace(facts, base=facts.base or base), before=before)
        return True
    for config in configs.values():
        if report := marked(config):
            facts = Facts(
                "residual",
                sparsity=report["sparsity"],
                done=remembered(model) | {"residual": report},
                base=config.base_model_name_or_path or base,
                auto_class=class_of_task(config.task_type),
                repo_id=repo_id,
            )
            complete_card(folder, facts, before=before)
            return True
    return False


def _describe_saved(model: PeftModel, output_dir: str, before: str = "") -> None:
    _describe_adapters(model, output_dir, before)


def _describe_pushed(pushed: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> None:
    """Write the card of what `push_to_hub` has saved to a folder and is about to upload."""
    if _describe_adapters(pushed, working_dir, repo_id=repo_id) or not isinstance(pushed, nn.Module):
        return
    if has_adapters(pushed) or has_shards(pushed):
        return
    source = str(loaded_from(pushed) or "")
    if remembered(pushed):
        complete_card(working_dir, facts_of_model(pushed, working_dir, repo_id=repo_id))
    elif part_of(source) and _same_weights(source, working_dir):
        # It was loaded from a folder with a card of ours, which knows more than the model does.
        (Path(working_dir) / CARD).write_text(card_in(source), encoding="utf-8")
        name_repository(working_dir, repo_id, Path(source).absolute().name)


def _same_weights(source: str, folder: str) -> bool:
    files = sorted(path.name for path in Path(folder).glob("*.safetensors"))
    return bool(files) and all(
        (Path(source) / name).exists() and filecmp.cmp(Path(source) / name, Path(folder) / name, shallow=False)
        for name in files
    )


def _read(_: Any, output_dir: str) -> str:
    return card_in(output_dir)


def _extend(kind: type, name: str, describe: Callable[..., Any], read: Callable[..., str] | None = None) -> None:
    """Let the method `name` of `kind` call `describe` with its own arguments.

    Args:
        kind: the class.
        name: the name of the method.
        describe: what is called: before the method, or if there is `read`, after it.
        read: returns the card before the method, which `describe` gets as `before`.
    """
    original = vars(kind).get(name)
    if original is None or hasattr(original, "describes_adapters"):
        return

    @functools.wraps(original)
    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        if read is None:
            describe(self, *args, **kwargs)
            return original(self, *args, **kwargs)
        before = read(self, *args, **kwargs)
        result = original(self, *args, **kwargs)
        describe(self, *args, before=before, **kwargs)
        return result

    vars(extended)["describes_adapters"] = True
    setattr(kind, name, extended)


def _read_of_trainer(trainer: Any, *args: Any, **kwargs: Any) -> str:
    folder = trainer.args.output_dir
    text = card_in(folder)
    if text and not hasattr(unwrapped_model(trainer), "create_or_update_model_card"):
        # `Trainer` calls this method of the model where the card names PEFT. `add_adapter` gives a model without it.
        named = text.replace("library_name: peft\n", "library_name: transformers\n", 1)
        (Path(folder) / CARD).write_text(named, encoding="utf-8")
    return text


def _describe_of_trainer(trainer: Any, *args: Any, before: str = "", **kwargs: Any) -> None:
    if trainer.is_world_process_zero():
        _describe_adapters(unwrapped_model(trainer), trainer.args.output_dir, before, repo_id=repo_of(trainer))


def unwrapped_model(trainer: Any) -> Any:
    """Return the model of a Trainer without what `accelerate` and `torch.compile` put around it."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def repo_of(trainer: Any) -> str | None:
    """Return the name on the Hub that a Trainer pushes to. None if it has none."""
    return getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id


def _extend_trainers() -> None:
    known = [Trainer]
    while known:
        kind = known.pop()
        _extend(kind, "create_model_card", _describe_of_trainer, _read_of_trainer)
        known += kind.__subclasses__()
    if "__init_subclass__" not in vars(Trainer):
        # Trainers that are imported later.
        Trainer.__init_subclass__ = classmethod(_extend_new_trainer)


def _extend_new_trainer(kind: Any, **kwargs: Any) -> None:
    super(Trainer, kind).__init_subclass__(**kwargs)
    _extend(kind, "create_model_card", _describe_of_trainer, _read_of_trainer)
