"""Finds which output of a model the label of a position belongs to, by trying what the model's own loss reads."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .inputs import output_of


LossOf = Callable[[dict[str, Any]], tuple[Any, Any]]

# How many labels are tried at a position, and how many differences of losses are measured in all.
LABELS, DIFFERENCES = 4, 9
# How many labelled positions are looked at, to try those where neighbouring outputs differ most.
CANDIDATES = 64
# The correlation of losses with -log p from which they count as explained. Nine random differences have it in 1 of
# 5,000 cases.
EXPLAINED = 0.9


@torch.no_grad()
def label_offset(loss_of: LossOf, inputs: dict[str, Any], name: str, advice: str) -> int:
    """Return 1 if the label of position j is compared with the output at j - 1, and 0 if with the output at j.

    The loss is computed for batches in which position j of one sequence alone has a label, with several values v of
    this label. Where the loss reads the output at i, its changes follow those of -log p(v) at i, whatever else is
    added to the loss. The number of runs depends on the number of classes alone, so that all processes make as many.
    The model must be in evaluation mode.

    Args:
        loss_of: inputs -> (loss, outputs). It may change the dict that it gets.
        inputs: model inputs, whose `labels` have the shape (sequences, positions).
        name: the name of the model, for messages.
        advice: what to do if this cannot be found, for messages.

    Raises:
        ValueError: the loss follows neither the output at j nor that at j - 1.
    """
    labels = inputs["labels"]
    loss, outputs = loss_of(dict(inputs))
    logits = output_of(outputs, "logits")
    if (
        not isinstance(loss, Tensor)
        or labels.dim() < 2
        or not isinstance(logits, Tensor)
        or logits.shape[:-1] != labels.shape
    ):
        # One label for a sequence, or labels that are compared with something else.
        return 0
    classes = logits.shape[-1]
    if classes < 2:
        return 0
    places, tried = _probes(logits, labels)
    feeds_labels = _feeds_labels(loss_of, inputs, logits, places[0].tolist())
    losses, costs = [], []
    for place, values in zip(places.tolist(), tried.tolist(), strict=True):
        for value in values:
            loss, outputs = loss_of(inputs | {"labels": _lone_label(labels, place, value, feeds_labels)})
            losses.append(loss.detach().float().mean().cpu())
            costs.append(_costs(output_of(outputs, "logits"), place, value).cpu())
    offset, found = _decided(torch.stack(losses), torch.stack(costs), tried.shape[1])
    if offset is None:
        raise ValueError(
            f"The labels of {name} must belong to known outputs. Expected a loss that compares the label of a "
            "position with the output there, or with the output before it. When single labels changed, the loss "
            f"followed these two with correlations {found[0]:.2f} and {found[1]:.2f}. {advice}"
        )
    return offset


@torch.no_grad()
def is_causal(run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> bool:
    """Return whether the outputs of a model do not depend on later tokens, by changing the last token.

    Args:
        run: inputs -> outputs with logits (sequences, tokens, classes).
        inputs: model inputs of one sequence, with `input_ids` of two tokens or more.
    """
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    last = tokens.shape[1] - 1
    if isinstance(mask, Tensor) and mask.shape == tokens.shape and bool(mask[0].any()):
        # Padding changes no output.
        last = int(mask[0].nonzero()[-1])
    changed = tokens.clone()
    changed[:, last] = torch.where(tokens[:, last] > 0, tokens[:, last] - 1, 1)
    before, after = (output_of(run(inputs | {"input_ids": ids}), "logits")[:, :last] for ids in (tokens, changed))
    # Only rounding may differ.
    rounding = 8 * torch.finfo(before.dtype).eps
    return bool((before - after).abs().max() <= rounding * before.abs().max()) if last else True


def _feeds_labels(loss_of: LossOf, inputs: dict[str, Any], logits: Tensor, place: list[int]) -> bool:
    """Return whether the outputs depend on labels, from which an encoder-decoder makes the inputs of its decoder."""
    _, outputs = loss_of(inputs | {"labels": _lone_label(inputs["labels"], place, 0, keep_before=False)})
    return not torch.equal(output_of(outputs, "logits"), logits)


def _probes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return places, as indices of `labels`, and the labels to try at each of them."""
    classes = logits.shape[-1]
    count = min(LABELS, classes)
    found = labels.ne(-100).nonzero()
    everywhere = torch.ones_like(labels, dtype=torch.bool).nonzero()
    # From the third position on, the position before has a label that some loss reads.
    choices = (found[found[:, 1] > 1], found[found[:, 1] > 0], everywhere[everywhere[:, 1] > 0], everywhere)
    places = next(choice for choice in choices if len(choice))
    spread = torch.linspace(0, len(places) - 1, min(CANDIDATES, len(places)), device=places.device)
    places = places[spread.long().unique()]
    here = logits[tuple(places.T)].float().log_softmax(-1)
    before = logits[tuple(_before(places).T)].float().log_softmax(-1)
    # Classes that a model rules out have a logit of about minus infinity.
    possible = (here > -1e4) & (before > -1e4)
    apart = here - before
    range_of = apart.masked_fill(~possible, -math.inf).amax(-1) - apart.masked_fill(~possible, math.inf).amin(-1)
    wanted = math.ceil(DIFFERENCES / (count - 1))
    best = range_of.nan_to_num(-1.0).topk(min(wanted, len(places))).indices
    # Always as many places, because all processes must run the model equally often.
    best = best.repeat(math.ceil(wanted / len(best)))[:wanted]
    order = apart[best].masked_fill(~possible[best], math.inf).argsort(-1)
    # From the values whose probability falls most to those whose probability rises most.
    last = possible[best].sum(-1, keepdim=True).clamp_min(1) - 1
    steps = torch.arange(count, device=last.device) * last // max(1, count - 1)
    return places[best], order.gather(-1, steps)


def _before(places: Tensor) -> Tensor:
    before = places.clone()
    before[:, 1] = (before[:, 1] - 1).clamp_min(0)
    return before


def _lone_label(labels: Tensor, place: list[int], value: int, keep_before: bool) -> Tensor:
    """Return labels that are -100 everywhere but at `place`, and maybe at the position before it."""
    lone = torch.full_like(labels, -100)
    if keep_before and place[1]:
        # Where the decoder's inputs are the labels, equal inputs would have nearly equal outputs.
        position = (place[0], place[1] - 1, *place[2:])
        lone[position] = labels[position].clamp_min(0)
    lone[tuple(place)] = value
    return lone


def _costs(logits: Tensor, place: list[int], value: int) -> Tensor:
    """Return -log p(value) at the position of `place` and at the position before it; NaN if there is none before."""
    here = logits[tuple(place)].float().log_softmax(-1)[value]
    if place[1] == 0:
        return torch.stack([-here, torch.full_like(here, torch.nan)])
    return torch.stack([-here, -logits[place[0], place[1] - 1, *place[2:]].float().log_softmax(-1)[value]])


def _decided(losses: Tensor, costs: Tensor, count: int) -> tuple[int | None, list[float]]:
    """Return the offset that explains the losses, None if none does, and the correlations with the costs of both.

    Args:
        losses: one for each measurement.
        costs: -log p at the position of the label and at the one before (measurements, 2).
        count: the number of measurements at each place.
    """
    if costs[:, 1].isnan().all() and not (losses.isfinite().all() and losses.std() > 0):
        # There is one position, and its label has no effect: the output that it belongs to would be the one before.
        return 1, []
    changes = _changes(losses, count)
    expected = [_changes(costs[:, offset], count) for offset in range(2)]
    correlations = [float(changes @ each / (changes.norm() * each.norm())) for each in expected]
    here, before = (value if math.isfinite(value) else 0.0 for value in correlations)
    best, other = max(here, before), min(here, before)
    is_clear = best >= EXPLAINED and 1 - best <= (1 - other) / 4
    return (int(before > here) if is_clear else None), [here, before]


def _changes(values: Tensor, count: int) -> Tensor:
    """Return by how much values differ from their mean at each place."""
    places = values.double().view(-1, count)
    return (places - places.mean(-1, keepdim=True)).flatten()
