"""Gradients of the weights on calibration data, summed without a second copy of the model."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from ..model.blocks import base_model
from ..model.processes import add_up, exchange, share_of
from ..model.weights import WeightView
from .inputs import sequences_in


def gradient_sums(
    model: nn.Module,
    weights: dict[str, WeightView],
    inputs: list[dict[str, Any]],
    offload: bool = False,
    shared: bool = False,
) -> dict[str, Tensor]:
    """Return Σ_n |∂L_n/∂W| for every weight, over calibration sequences n, as float32 matrices (out, in).

    L is the model's own loss, for a causal language model that of its inputs as labels. A gradient is added up and
    freed as soon as it is there, so that beside the sums, 4 bytes per weight, no more than one is held. In float16 the
    loss is scaled up, so that small gradients do not vanish.

    Args:
        inputs: model inputs; batches are taken apart, since n counts sequences.
        offload: keep the sums in CPU memory.
        shared: processes share the sequences out and add up what they find; all are given the same `inputs`.

    Raises:
        ValueError: the model returns no loss, or a gradient that is not finite.
    """
    sums: dict[str, Tensor] = {}
    parameters = {id(weight.storage): weight.storage for weight in weights.values()}
    device = next(model.parameters()).device
    scale = 1024.0 if any(p.dtype == torch.float16 for p in parameters.values()) else 1.0

    def add(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for name, weight in by_parameter[id(parameter)]:
            size = weight.matrix_of(gradient).abs().float().div_(scale)
            size = size.cpu() if offload else size
            sums[name] = sums[name].add_(size) if name in sums else size

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
            undo.callback(stored.register_post_accumulate_grad_hook(add).remove)
        singles = _single_sequences(inputs)
        for batch in tqdm(
            share_of(singles) if shared else singles, desc="gradients", unit="sequence", leave=False, disable=None
        ):
            (_loss(model, send_to_device(batch, device)) * scale).backward()
    if shared:
        _add_up(weights, sums, offload)
    _check_gradients(weights, sums)
    return sums


def _add_up(weights: dict[str, WeightView], sums: dict[str, Tensor], offload: bool) -> None:
    """Add the sums of all processes to those of this one, which may lack some. In place."""
    reached = set().union(*exchange(set(sums)))
    for name in weights:
        if name in reached and name not in sums:
            weight = weights[name]
            sums[name] = torch.zeros(weight.shape, device="cpu" if offload else weight.storage.device)
    add_up([sums[name] for name in weights if name in reached])


def _single_sequences(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    singles = []
    for batch in inputs:
        for i in range(sequences_in(batch)):
            singles.append({k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in batch.items()})
    return singles


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    if "labels" not in batch and "input_ids" in batch:
        batch = {**batch, "labels": _labels(batch)}
    outputs = model(**batch)
    # As `Trainer`, which takes plain dicts too.
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f'Criterion "gblm" needs a loss, and {type(base_model(model)).__name__} returned none. Give calibration '
            "batches with `labels`, or a model with a task head."
        )
    return loss


def _labels(batch: dict[str, Any]) -> Tensor:
    """Return the tokens themselves as labels, those aside that are padding or would be predicted from padding."""
    side = "decoder_" if "decoder_input_ids" in batch else ""
    labels, mask = batch[f"{side}input_ids"], batch.get(f"{side}attention_mask")
    if isinstance(mask, Tensor):
        predicted = mask.bool()
        predicted[:, 1:] &= predicted[:, :-1].clone()
        labels = labels.masked_fill(~predicted, -100)
    # Decoders alone shift their labels; those behind an encoder expect what follows each token.
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if side else labels


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
