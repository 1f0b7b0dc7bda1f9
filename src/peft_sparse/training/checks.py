"""What a training needs, checked before the model is pruned or changed in another way."""

import itertools
from collections.abc import Sized
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Trainer

from ..model.tree import has_adapters
from .arguments import SparseTrainingArguments
from .freezing import FreezingCallback
from .pruning_callback import PruningCallback


def check_asked(args: SparseTrainingArguments, model: nn.Module | None, optimizers: tuple[Any, Any]) -> None:
    """Check what a `SparseTrainer` is made with: arguments, model and optimisers that go together.

    Raises:
        ValueError: they do not.
    """
    if args.reconstructs and model is not None and has_adapters(model):
        raise ValueError(
            "Reconstruction attaches and merges an adapter for each region, and the model has an adapter already. "
            "Pass the plain model, and the configuration of the adapter as `peft_config`."
        )
    if args.recovery == "none" and args.pruning_pattern() is None:
        raise ValueError('`recovery="none"` only prunes, and there is no sparsity. Set `sparsity` or `pattern`.')
    if args.reconstructs and optimizers != (None, None):
        raise ValueError(
            "Reconstruction makes an optimiser for each region, and `optimizers` holds one of the whole model. "
            "Leave `optimizers` out, and choose the optimiser by `optim` or `optimizer_cls_and_kwargs`."
        )


def check_data(trainer: Trainer) -> None:
    """Check that there is a sample to train on, as far as this is known. A subclass may have data of its own.

    Raises:
        ValueError: there is no training set, or it is empty.
    """
    if type(trainer).get_train_dataloader is not Trainer.get_train_dataloader:
        return
    data: Any = trainer.train_dataset
    if data is None or (isinstance(data, Sized) and len(data) == 0):
        raise ValueError(
            f"Training needs samples, and `train_dataset` {'is None' if data is None else 'is empty'}. Pass samples, "
            'or set `recovery="none"` to prune only.'
        )


def check_callbacks(trainer: Trainer, own: PruningCallback | None) -> None:
    """Check that no callback of the user prunes or freezes what a reconstruction prunes and fits.

    Args:
        trainer: a trainer that does not only retrain.
        own: the callback that the trainer has added itself.

    Raises:
        ValueError: there is such a callback.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, (PruningCallback, FreezingCallback)) and callback is not own:
            recovery = cast(SparseTrainingArguments, trainer.args).recovery
            raise ValueError(
                f"A {type(callback).__name__} acts at the steps of a retraining, and `recovery={recovery!r}` prunes "
                "and fits the model in its own order. Remove the callback, and set `sparsity` or `pattern`. To "
                'retrain with it, make another SparseTrainer with `recovery="retrain"`.'
            )


def check_trained(trainer: Trainer) -> None:
    """Check that there is a parameter to train, in the model or in an optimiser that the user has given.

    A model of `model_init` is not made yet, and is not checked.

    Raises:
        ValueError: all parameters are frozen.
    """
    model: Any = trainer.model
    groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
    known = itertools.chain(model.parameters(), *(group["params"] for group in groups))
    if trainer.model_init is None and not any(parameter.requires_grad for parameter in known):
        raise ValueError(
            f"All parameters of this {type(model).__name__} are frozen, so that there is nothing to train. Merging an "
            "adapter leaves the weights frozen. Call `model.requires_grad_(True)` to train all weights, attach an "
            "adapter, or make an attached one active by `set_adapter`."
        )


def check_unmerged(model: nn.Module) -> None:
    """Check that no adapter is merged: the layer would compute with the merged weight alone.

    Raises:
        ValueError: an adapter is merged.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise ValueError(
                f"The adapter {layer.merged_adapters[0]!r} is merged into {name!r}, so that training would not change "
                "it. Call `unmerge_adapter()` before training, or take the merged adapter out by "
                "`merge_and_unload()`."
            )
