"""Sums the gradients of the weights on calibration data, without a second copy of the model."""

import contextlib
from typing import Any

import torch
from accelerate.utils import send_to_device, slice_tensors
from torch import Tensor, nn
from tqdm import tqdm

from ..model.blocks import base_model, is_encoder_decoder
from ..model.offload import execution_device
from ..model.processes import add_up, exchange, share_of
from ..model.weights import WeightView
from .collation import can_be_split
from .inputs import counted, labels_of, model_arguments, output_of, sequences_in
from .label_positions import is_causal, label_offset


def gradient_sums(
    model: nn.Module,
    weights: dict[str, WeightView],
    inputs: list[dict[str, Any]],
    offload: bool = False,
    shared: bool = False,
) -> dict[str, Tensor]:
    """Return Σ_n |∂L_n/∂W| of every weight, over the calibration sequences n, as float32 matrices (out, in).

    L_n is the model's own loss of sequence n. If the inputs have no labels, the tokens are the labels, apart from
    padding; a decoder whose loss does not shift them gets the next tokens. Tokens that a token mask leaves out are no
    labels. Each gradient is added to its sum and freed as soon as it is computed. Memory is thus the sums (4 bytes per
    weight) and one gradient at a time. Where a weight is in float16, the loss is multiplied by 1024 and the gradients
    are divided by it, so that small gradients do not become zero.

    Args:
        model: the model.
        weights: the weights, by name.
        inputs: model inputs. Batches are split into single sequences, because the sum is over sequences.
        offload: whether the sums are kept in CPU memory.
        shared: whether processes share the sequences, and add up their sums. All processes get the same `inputs`.

    Raises:
        ValueError: the model returns no loss, no gradient reaches a weight, a gradient is not finite, or a batch of
            several sequences cannot be split.
    """
    sums: dict[str, Tensor] = {}
    parameters = {id(weight.storage): weight.storage for weight in weights.values()}
    device = execution_device(model)
    scale = 1024.0 if any(p.dtype == torch.float16 for p in parameters.values()) else 1.0

    def add(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for name, weight in by_parameter[id(parameter)]:
            size = weight.matrix_of(gradient).abs().float().div_(scale)
            size = size.cpu() if offload else size
            sums[name] = sums[name].add_(size) if name in sums else size

    next_tokens = _wants_next_tokens(model, inputs)
    by_parameter: dict[int, list[tuple[str, WeightView]]] = {key: [] for key in parameters}
    for name, weight in weights.items():
        by_parameter[id(weight.storage)].append((name, weight))
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as undo, torch.enable_grad():
        for parameter, was in trainable:
            undo.callback(parameter.requires_grad_, was)
            parameter.requires_grad_(id(parameter) in parameters)
        for stored in parameters.values():
            undo.callback(setattr, stored, "grad", stored.grad)
            stored.grad = None
            # Hooks of the caller may change gradients, or weights, as an optimizer that steps in the backward pass.
            for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                undo.callback(setattr, stored, hooks, getattr(stored, hooks))
                setattr(stored, hooks, None)
            undo.callback(stored.register_post_accumulate_grad_hook(add).remove)
        singles = [(batch, i) for batch in inputs for i in range(sequences_in(batch))]
        for batch, i in tqdm(
            share_of(singles) if shared else singles, desc="gradients", unit="sequence", leave=False, disable=None
        ):
            (_loss(model, send_to_device(_single(batch, i), device), next_tokens) * scale).backward()
    if shared:
        _add_up(weights, sums, offload)
    _check_gradients(weights, sums)
    return sums


def _add_up(weights: dict[str, WeightView], sums: dict[str, Tensor], offload: bool) -> None:
    """Add up `sums` over all processes, in place. Weights that only other processes reached are added."""
    reached = set().union(*exchange(set(sums)))
    for name in weights:
        if name in reached and name not in sums:
            weight = weights[name]
            sums[name] = torch.zeros(weight.shape, device="cpu" if offload else weight.storage.device)
    add_up([sums[name] for name in weights if name in reached])


def _single(batch: dict[str, Any], index: int) -> dict[str, Any]:
    """Return sequence `index` of `batch` as a batch."""
    if sequences_in(batch) == 1:
        return batch
    if not can_be_split(batch):
        raise ValueError(
            'Criterion "gblm" sums over single sequences, and a batch of several cannot be split, because it holds '
            f"a cache or tensors of another first dimension: {', '.join(map(repr, batch))}. Give batches of one "
            "sequence."
        )
    return slice_tensors(batch, slice(index, index + 1))


@torch.no_grad()
def _wants_next_tokens(model: nn.Module, inputs: list[dict[str, Any]]) -> bool:
    """Return whether the label at a position must be the next token, where the inputs have no labels.

    It must be if outputs predict the next token and the loss does not shift the labels, as in some decoders.
    """
    device = execution_device(model)
    batch = next((b for b in inputs if "labels" not in b and "input_ids" in b and b["input_ids"].shape[1] > 1), None)
    if batch is None or is_encoder_decoder(model):
        # The labels of an encoder-decoder are the next tokens already.
        return False
    batch = send_to_device(_single(batch, 0), device)

    def run(inputs: dict[str, Any]) -> Any:
        return model(**model_arguments(model, inputs))

    def loss_of(inputs: dict[str, Any]) -> tuple[Any, Any]:
        outputs = run(inputs)
        return output_of(outputs, "loss"), outputs

    labelled, name = batch | {"labels": labels_of(batch)}, type(base_model(model)).__name__
    loss, outputs = loss_of(labelled)
    logits = output_of(outputs, "logits")
    if not isinstance(loss, Tensor) or not loss.isfinite().all() or not isinstance(logits, Tensor):
        # What is wrong with them is told where gradients are summed.
        return False
    offset = label_offset(loss_of, labelled, name, "Give calibration batches with `labels`.")
    return offset == 0 and logits.shape[:-1] == labelled["labels"].shape and is_causal(run, batch)


def _loss(model: nn.Module, batch: dict[str, Any], next_tokens: bool) -> Tensor:
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        batch = {**batch, "labels": counted(labels, batch, shifted=is_encoder_decoder(model))}
    elif "input_ids" in batch:
        labels = labels_of(batch)
        batch = {**batch, "labels": nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if next_tokens else labels}
    loss = output_of(model(**model_arguments(model, batch)), "loss")
    if not isinstance(loss, Tensor):
        raise ValueError(
            f'Criterion "gblm" needs a loss, and {type(base_model(model)).__name__} returned none. Give calibration '
            "batches with `labels`, or a model with a task head."
        )
    return loss


def _check_gradients(weights: dict[str, WeightView], sums: dict[str, Tensor]) -> None:
    missing = [name for name in weights if name not in sums]
    if missing:
        raise ValueError(
            f"No gradient reached {missing[0]!r} ({len(missing)} such weights). Use more calibration sequences, or "
            "add it to `exclude_modules`."
        )
    finite = torch.stack([total.isfinite().all().cpu() for total in sums.values()]).tolist()
    if not all(finite):
        raise ValueError(
            f"The gradient of {list(sums)[finite.index(False)]!r} is not finite. Run the model in float32 or "
            "bfloat16, and check the calibration data."
        )
