"""Saves the base model of a model with adapters as a plain model, which loads without PEFT and without this package.

`SparseTrainer.save_merged_model` and `SparseTrainer.save_base_model` call it.
"""

from pathlib import Path
from typing import Any, cast

import torch
from peft.utils import CONFIG_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from ..model.blocks import Targets, base_model
from ..model.environment import remembered
from ..model.sharding import has_shards
from ..model.tree import has_adapters, loaded_from
from ..sharing.card import complete_card
from ..sharing.card_facts import facts_of_model
from ..tuners.merging import merged_state_dict, plain_model
from ..tuners.ties import check_ties, give_own_weights, settle_ties


def save_plain_model(
    model: nn.Module,
    output_dir: str,
    *,
    merge: bool,
    write: bool,
    sparsity: float,
    targets: tuple[Targets, Targets] = (None, None),
    processors: tuple[Any, ...] = (),
) -> None:
    """Save the base model of `model`, with its model card. The model stays as it is, also if saving fails.

    A head that shares its weight with the embedding, and no longer does because an adapter or `modules_to_save` has
    changed it, is saved beside the embedding, under a configuration that does not tie them.

    Args:
        model: the model with adapters, attached in any of PEFT's or Transformers' ways. If it has `save_pretrained`,
            this method of it saves. Otherwise a state dict is saved, as `model.safetensors`.
        output_dir: the folder to write to.
        merge: True merges the active adapters. False saves the base model without its adapters.
        write: whether this process writes. Every process must call the function.
        sparsity: the fraction of zeros that the model card tells.
        targets: which layers are counted for the card, and which are not, as in `sparsity`.
        processors: what is saved with the model, such as the tokeniser.

    Raises:
        TypeError: an adapter cannot be merged, see `merged_state_dict`.
        ValueError: the folder holds an adapter; a tied head cannot be saved untied; or merging would fill zeros.
    """
    if (Path(output_dir) / CONFIG_NAME).exists():
        raise ValueError(
            f"The folder {output_dir!r} holds an adapter ({CONFIG_NAME}), which `from_pretrained` would load onto the "
            "plain model. Save the model to another folder."
        )
    sharded = has_shards(base_model(model))
    plain = plain_model(model, merge=merge, values=write and not sharded)
    alone: list[str] = []
    if isinstance(plain, PreTrainedModel):
        alone = settle_ties(plain, plain_model(model, merge=False, values=False))
    else:
        check_ties(plain, plain_model(model, merge=False, values=False))
    state = merged_state_dict(model, merge=merge, keep=write) if sharded else None
    if not write:
        return
    if state is None:
        give_own_weights(plain, alone)
    else:
        state |= {name: state[name].clone() for name in alone}
    _write(plain, state, output_dir)
    for processor in processors:
        processor.save_pretrained(output_dir)
    known: dict[str, Any] = {"done": remembered(model), "base": loaded_from(model)}
    # What one process holds of sharded weights does not tell the sparsity of each.
    known |= {"sparsity": sparsity} if sharded else {"targets": targets}
    complete_card(output_dir, facts_of_model(plain, output_dir, **known))


def what_was_trained(trainer: Any, output: TrainOutput) -> dict[str, Any]:
    """Return what a training did, for the model card.

    Args:
        trainer: the trainer, after its training.
        output: what the training returned.
    """
    args, state = trainer.args, trainer.state
    is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
    steps = state.best_global_step if is_best else state.global_step
    # An evaluation before the last steps is not of this model.
    evaluated = [each["eval_loss"] for each in state.log_history if "eval_loss" in each and each["step"] == steps]
    everything = all(parameter.requires_grad for parameter in trainer.model.parameters())
    return {
        "steps": steps,
        # `auto_find_batch_size` may have lowered that of the arguments.
        "batch_size": trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": _rate_of(trainer),
        "distillation": args.distillation,
        # The time of the runs before a resumed one is not known.
        "seconds": None if trainer._initial_global_step else output.metrics.get("train_runtime"),
        "eval_loss": evaluated[-1] if evaluated else None,
        "trained": "adapter" if has_adapters(trainer.model) else "all weights" if everything else "some weights",
    }


def _rate_of(trainer: Any) -> float | None:
    """Return the learning rate from which the schedule starts. None where each step has another."""
    if trainer.args.retraining_schedule is not None:
        return None
    # Not that of the arguments: an optimiser of the user has its own.
    groups = trainer.optimizer.param_groups
    rates = [rate for group in groups if (rate := group.get("initial_lr", group.get("lr"))) is not None]
    return max(map(float, rates), default=None)


def _write(plain: nn.Module, state: dict[str, Tensor] | None, output_dir: str) -> None:
    if isinstance(plain, PreTrainedModel):
        plain.save_pretrained(output_dir, **({} if state is None else {"state_dict": state}))
    elif state is None and hasattr(plain, "save_pretrained"):
        cast(Any, plain).save_pretrained(output_dir)
    else:
        # A file of safetensors holds each tensor by one name, and `load_state_dict` wants all names.
        tensors = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in (state or plain.state_dict()).items()
        }
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(Path(output_dir) / SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
