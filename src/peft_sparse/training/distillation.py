"""What a pruned model learns from the dense one while it is trained: its logits, or the states after its blocks."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..calibration.inputs import evaluation_mode
from ..model.blocks import base_model, find_blocks, hidden_size
from ..model.sharding import has_shards


DISTILLATIONS = ("logits", "hidden_states")
# Entries of the logits that are in float32 at a time: 64 MiB of each model's.
CHUNK = 2**24
# A dense model may hold a few zeros by chance.
DENSE = 0.01


def logits_loss(student: Tensor, teacher: Tensor, kept: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² · Σ KL(p_t ‖ p_s) over the kept predictions, where p = softmax(logits / T).

    Hinton et al. 2015, arXiv:1503.02531, section 2; T² keeps the gradient's scale when T changes. Of the size of the
    logits only their gradient is made: softmaxes exist by chunks, and are computed again in backward.

    Args:
        student: logits (..., classes), of any dtype; computed with in float32.
        teacher: logits of the same shape; no gradient.
        kept: bools (...), the predictions that count.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape or student.shape[:-1] != kept.shape:
        raise ValueError(
            f"Expected logits of teacher and student and labels for the same predictions, got {tuple(teacher.shape)}, "
            f"{tuple(student.shape)} and {tuple(kept.shape)}. Distil from a model with the same tokeniser and head."
        )
    return _SumOfDivergences.apply(student.flatten(0, -2), teacher.flatten(0, -2), kept.flatten(), temperature)


class _SumOfDivergences(torch.autograd.Function):
    """T² · Σ KL(p_t ‖ p_s) of rows; its gradient is T · (p_s - p_t)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kept: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, teacher, kept)
        ctx.temperature = temperature
        total = torch.zeros((), device=student.device)
        for rows in _chunks(student):
            ours, theirs = _log_probabilities(student[rows], teacher[rows], temperature)
            divergences = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
            # Not a product: what padding brings may not be finite.
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
    """Return Σ over the kept tokens of the mean over blocks l of ‖h_s^l - h_t^l‖² / ‖h_t^l‖².

    The layer-wise relative error of SquareHead, Kurtic et al. 2023, arXiv:2310.06927, with the ratio taken token by
    token: the few tokens with huge states do not outweigh the others, and a batch in parts gives the same sum.
    Autograd keeps one float32 difference of the states of each block.

    Args:
        student: hidden states (..., d) after each block.
        teacher: the same of the teacher; no gradient.
        kept: bools (...), the tokens that count.

    Raises:
        ValueError: the states are not one for each entry of `kept`, or the models differ in blocks or width.
    """
    shapes = [[tuple(states.shape) for states in model] for model in (student, teacher)]
    if shapes[0] != shapes[1] or any(shape[:-1] != kept.shape for shape in shapes[0]):
        raise ValueError(
            "Expected the hidden states of teacher and student after as many blocks, one for each label, got "
            f"{len(teacher)} of {shapes[1][:1]} and {len(student)} of {shapes[0][:1]} for labels {tuple(kept.shape)}. "
            'Use distillation="logits", which needs the same outputs only.'
        )
    total = torch.zeros((), device=kept.device)
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.to(ours.device, torch.float32)
        size = theirs.square().sum(-1).clamp_min(torch.finfo(torch.float32).eps)
        errors = (ours.float() - theirs).square().sum(-1) / size
        total = total + torch.where(kept.to(errors.device), errors, 0.0).sum().to(total.device)
    return total / len(student)


def predictions(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return which outputs of `model` have a label, bools of the shape of the labels: -100 marks what has none.

    A causal language model predicts the label one further on, so that its last output has none.

    Raises:
        ValueError: there are no labels.
    """
    if "shift_labels" in inputs:
        return inputs["shift_labels"].ne(-100)
    if "labels" not in inputs:
        raise ValueError(
            f"Distillation counts the predictions that have labels, and the inputs are {', '.join(inputs)}. Add "
            "`labels`, for causal language models a copy of `input_ids`."
        )
    kept = inputs["labels"].ne(-100)
    base: Any = base_model(model)
    encodes_apart = getattr(base.config, "is_encoder_decoder", False)
    if encodes_apart or LOSS_MAPPING.get(getattr(base, "loss_type", None)) is not ForCausalLMLoss:
        return kept
    return nn.functional.pad(kept[..., 1:], (0, 1), value=False)


def dense_copy(model: nn.Module, share_of_zeros: float) -> nn.Module:
    """Return a copy of `model` to learn from, without the adapters on it.

    Raises:
        ValueError: it is pruned already, which the copy would be too.
    """
    if share_of_zeros > DENSE:
        raise ValueError(
            f"The model has {share_of_zeros:.1%} zeros already, so that no dense model is here to learn from. Pass "
            "one: SparseTrainer(..., teacher=AutoModelForCausalLM.from_pretrained(...))."
        )
    teacher = copy.deepcopy(model)
    return teacher.unload() if isinstance(teacher, (PeftModel, PeftMixedModel)) else teacher


def check_teacher(teacher: nn.Module, student: nn.Module, distillation: str) -> None:
    """Compare what can be compared before anything is computed. The same tokeniser is the caller's promise.

    Raises:
        ValueError: the two share weights, or differ in vocabulary, or in blocks or width where hidden states count;
            the teacher's weights are in parts.
    """
    if has_shards(teacher):
        raise ValueError(
            "The teacher's weights are in parts, which nothing puts together when it runs. Load it before the "
            "training arguments are made, with which ZeRO-3 begins to partition."
        )
    models: list[Any] = [base_model(teacher), base_model(student)]
    if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in student.parameters()}:
        raise ValueError(
            "The teacher shares parameters with the model that is trained, and would be pruned with it. Pass a model "
            "of its own: load it again, or copy.deepcopy(model) before pruning."
        )
    compared = {"vocabulary": [getattr(m.config.get_text_config(), "vocab_size", None) for m in models]}
    if distillation == "hidden_states":
        compared |= {"blocks": [len(find_blocks(m)) for m in models], "width": [hidden_size(m) for m in models]}
    for what, (theirs, ours) in compared.items():
        if theirs != ours:
            raise ValueError(
                f"Teacher and model differ in {what}: {theirs} and {ours}. Pass the dense model that this one was "
                "pruned from, or one that shares its tokeniser and shape."
            )


@torch.no_grad()
def outputs_of(teacher: nn.Module, inputs: Mapping[str, Any], distillation: str) -> Any:
    """Return what the teacher makes of a batch, without dropout and without the loss."""
    accepts = inspect.signature(base_model(teacher).forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepts else {}
    if distillation == "hidden_states":
        options["output_hidden_states"] = True
    # Encoder-decoders make the decoder's inputs of the labels.
    skipped = () if getattr(base_model(teacher).config, "is_encoder_decoder", False) else ("labels", "shift_labels")
    with evaluation_mode(teacher):
        return teacher(**{name: value for name, value in inputs.items() if name not in skipped}, **options)


def sum_of_losses(
    distillation: str, outputs: Mapping[str, Any], teacher: Mapping[str, Any], kept: Tensor, temperature: float
) -> Tensor:
    """Return the loss named `distillation`, summed over the kept predictions, from the outputs of two models."""
    if distillation == "logits":
        return logits_loss(outputs["logits"], teacher["logits"].to(kept.device), kept, temperature)
    states = [found.get("hidden_states") or found["decoder_hidden_states"] for found in (outputs, teacher)]
    # The first are the embeddings.
    return hidden_states_loss(states[0][1:], states[1][1:], kept)


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    ours, theirs = (torch.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return ours, theirs
