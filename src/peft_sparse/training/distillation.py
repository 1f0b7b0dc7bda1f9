"""Distillation: the losses by which a pruned model learns from a dense teacher, and the checks of the teacher."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.inputs import evaluation_mode, output_of
from ..model.blocks import base_model, find_blocks, hidden_size, is_encoder_decoder
from ..model.sharding import has_shards
from ..model.tree import has_adapters, without_adapters
from ..model.weights import DENSE


DISTILLATIONS = ("logits", "hidden_states")
# What to do if it cannot be found which outputs have a label.
ADVICE = (
    "Add `shift_labels` to the batches, which holds the label of each output, if the model takes it; or compare "
    "logits and labels in a `compute_loss_func`."
)
# How many logits of each model are converted to float32 at a time: 64 MiB.
CHUNK = 2**24


def logits_loss(student: Tensor, teacher: Tensor, kept: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² · Σ KL(p_t ‖ p_s) over the selected predictions, where p = softmax(logits / T).

    p_t is the teacher's distribution and p_s the student's. The factor T² keeps the scale of the gradient when T
    changes. Hinton et al. 2015, arXiv:1503.02531, section 2.

    The softmaxes are computed in float32, in chunks of rows, and again in the backward pass. If the logits are
    contiguous, the only new tensor of their size is their gradient.

    Args:
        student: logits (..., classes), of any dtype.
        teacher: logits of the same shape, of any dtype. They get no gradient.
        kept: bools (...), True for the predictions that are summed.
        temperature: T, positive.

    Raises:
        ValueError: the shapes do not match, or there is one class, whose probability is always 1.
    """
    if student.shape == teacher.shape and (student.shape[-1] < 2 or student.shape[:-1] != kept.shape):
        raise ValueError(
            'distillation="logits" compares distributions over two or more classes, one for each label. Got logits of '
            f"shape {tuple(student.shape)} for labels of shape {tuple(kept.shape)}. Leave `distillation` out for "
            "regression and for several labels per sample, or give one label for each output."
        )
    if student.shape != teacher.shape or student.shape[:-1] != kept.shape:
        raise ValueError(
            "Expected logits of teacher and student and labels for the same predictions. Got the shapes "
            f"{tuple(teacher.shape)}, {tuple(student.shape)} and {tuple(kept.shape)}. Use a teacher with the same "
            "tokeniser and head."
        )
    return _SumOfDivergences.apply(student.flatten(0, -2), teacher.flatten(0, -2), kept.flatten(), temperature)


class _SumOfDivergences(torch.autograd.Function):
    """T² · Σ KL(p_t ‖ p_s) over rows. The gradient with respect to the student is T · (p_s - p_t)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kept: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher, kept)
        ctx.temperature = temperature
        total = torch.zeros((), device=student.device)
        for rows in _chunks(student):
            ours, theirs = _log_probabilities(student[rows], teacher[rows], temperature)
            divergences = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
            # Not a product with the mask, because the values of padding may not be finite.
            total += torch.where(kept[rows], divergences, 0.0).sum()
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, kept = ctx.saved_tensors
        gradient = torch.empty_like(student)
        for rows in _chunks(student):
            ours, theirs = _log_probabilities(student[rows], teacher[rows], ctx.temperature)
            part = ours.exp_().sub_(theirs.exp_()).mul_(ctx.temperature * upstream)
            gradient[rows] = part.masked_fill_(~kept[rows, None], 0).to(gradient.dtype)
        return gradient, None, None, None


def hidden_states_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], kept: Tensor) -> Tensor:
    """Return Σ over the selected tokens of (1/L) · Σ_l ‖h_s^l - h_t^l‖² / ‖h_t^l‖².

    h_s^l and h_t^l are the hidden states of student and teacher after block l of L. This is the relative error of
    SquareHead (Kurtic et al. 2023, arXiv:2310.06927), with one difference: the ratio is computed for each token, and
    not as a ratio of two means. A few tokens with very large hidden states then do not dominate the loss, and a batch
    gives the same sum if it is split.

    For the backward pass, autograd keeps one float32 tensor of the size of the hidden states for each block.

    Args:
        student: the student's hidden states (..., d) after each block.
        teacher: the teacher's hidden states (..., d) after each block. They get no gradient.
        kept: bools (...), True for the tokens that are summed.

    Raises:
        ValueError: student and teacher differ in the number of blocks or in d, or their hidden states do not have the
            shape of `kept`.
    """
    shapes = [[tuple(states.shape) for states in model] for model in (student, teacher)]
    if shapes[0] != shapes[1] or any(shape[:-1] != kept.shape for shape in shapes[0]):
        raise ValueError(
            "Expected the same number of hidden states from teacher and student, one vector per label. Got "
            f"{len(teacher)} of shape {shapes[1][:1]} and {len(student)} of shape {shapes[0][:1]} for labels of shape "
            f'{tuple(kept.shape)}. Use distillation="logits", which needs equal outputs only.'
        )
    total = torch.zeros((), device=kept.device)
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.to(ours.device, torch.float32)
        size = theirs.square().sum(-1).clamp_min(torch.finfo(torch.float32).eps)
        errors = (ours.float() - theirs).square().sum(-1) / size
        total = total + torch.where(kept.to(errors.device), errors, 0.0).sum().to(total.device)
    return total / len(student)


def predictions(inputs: Mapping[str, Any], offset: Callable[[], int]) -> Tensor:
    """Return which outputs of a model have a label, as bools of the shape of the labels.

    An output whose label is -100 has no label.

    Args:
        inputs: the model inputs.
        offset: returns 1 if output i has the label of position i + 1, as in a causal language model, and 0 if it has
            that of position i. It is not called if the inputs contain `shift_labels`, the labels of the outputs.

    Raises:
        ValueError: the inputs contain no labels.
    """
    if "shift_labels" in inputs:
        return inputs["shift_labels"].ne(-100)
    if "labels" not in inputs:
        raise ValueError(
            "Distillation needs `labels` among the inputs, to know which predictions count. The inputs are "
            f"{', '.join(inputs)}. Add `labels`; for causal language models they are a copy of `input_ids`."
        )
    kept = inputs["labels"].ne(-100)
    if not offset():
        return kept
    # The last output has no label.
    return torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1)


def dense_copy(model: nn.Module, share_of_zeros: float) -> nn.Module:
    """Return a copy of `model` without its adapters, as a teacher.

    Args:
        model: the dense model, with or without adapters.
        share_of_zeros: the sparsity of `model`, a fraction.

    Raises:
        ValueError: more than 1 % of the weights are zero, so that the model is not dense.
    """
    if share_of_zeros > DENSE:
        raise ValueError(
            f"Distillation needs a dense teacher, and {share_of_zeros:.1%} of the model's weights are zero already. "
            "Pass the dense model: SparseTrainer(..., teacher=AutoModelForCausalLM.from_pretrained(...))."
        )
    teacher = copy.deepcopy(model)
    return without_adapters(teacher) if has_adapters(teacher) else teacher


def check_teacher(teacher: nn.Module, student: nn.Module, distillation: str) -> None:
    """Check that `student` can learn from `teacher`. The tokenisers are not compared.

    Raises:
        ValueError: the two models share parameters, or differ in the size of the vocabulary; with "hidden_states",
            they differ in the number of blocks or in the hidden size; the teacher's weights are sharded.
    """
    if has_shards(teacher):
        raise ValueError(
            "The teacher's weights are sharded over processes, and nothing gathers them when the teacher runs. Load "
            "the teacher before the training arguments are made, because ZeRO-3 shards each model loaded after them."
        )
    models: list[Any] = [base_model(teacher), base_model(student)]
    if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in student.parameters()}:
        raise ValueError(
            "The teacher shares parameters with the model that is trained, and would be pruned too. Load the teacher "
            "separately, or pass copy.deepcopy(model), made before pruning."
        )
    compared = {"the size of the vocabulary": [_vocabulary(m) for m in models]}
    if distillation == "hidden_states":
        compared |= {
            "the number of blocks": [len(find_blocks(m)) for m in models],
            "the hidden size": [hidden_size(m) for m in models],
        }
    for what, (theirs, ours) in compared.items():
        if theirs != ours:
            raise ValueError(
                f"Teacher and model differ in {what}: {theirs} and {ours}. Pass the dense model from which this model "
                "was pruned, or a model with the same tokeniser and shape."
            )


def _vocabulary(model: nn.Module) -> int | None:
    # A model of no library may have no configuration. Its logits are compared when it runs.
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


@torch.no_grad()
def outputs_of(teacher: nn.Module, inputs: Mapping[str, Any], distillation: str) -> Any:
    """Return the teacher's outputs for a batch, in evaluation mode and without a loss."""
    accepts = inspect.signature(base_model(teacher).forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepts else {}
    if distillation == "hidden_states":
        options["output_hidden_states"] = True
    # An encoder-decoder computes the decoder's inputs from the labels, so it needs them.
    skipped = () if is_encoder_decoder(teacher) else ("labels", "shift_labels")
    with evaluation_mode(teacher):
        return teacher(**{name: value for name, value in inputs.items() if name not in skipped}, **options)


def sum_of_losses(distillation: str, outputs: Any, teacher: Any, kept: Tensor, temperature: float) -> Tensor:
    """Return the loss that `distillation` names, summed over the kept predictions, from the outputs of both models.

    Raises:
        ValueError: a model does not return these outputs, or they do not match.
    """
    names = ("logits",) if distillation == "logits" else ("hidden_states", "decoder_hidden_states")
    ours, theirs = (_first_of(found, names) for found in (outputs, teacher))
    if distillation == "logits":
        return logits_loss(ours, theirs.to(kept.device), kept, temperature)
    # The first hidden states are the embeddings.
    return hidden_states_loss(ours[1:], theirs[1:], kept)


def _first_of(outputs: Any, names: Sequence[str]) -> Any:
    for name in names:
        if (found := output_of(outputs, name)) is not None:
            return found
    raise ValueError(
        f"Distillation reads `{names[0]}` from the outputs of model and teacher, and got a {type(outputs).__name__} "
        "without them. Let both models return a dict or a `ModelOutput` that holds them."
    )


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    ours, theirs = (torch.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return ours, theirs
