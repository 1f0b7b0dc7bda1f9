"""Selects the units to remove: scores and numbers of parameters -> masks, True = kept.

This module works on numbers, without layers and models.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


Structure = Literal["al-am", "al-mm", "ul-mm", "ul-um"]


@dataclass(frozen=True)
class ScoredUnits:
    """The scores of the units of one attention, MLP or set of convolutions.

    Args:
        block: name of its block; for filters, of the first of their convolutions.
        kind: "attention", "mlp" or "filters".
        scores: one score per unit, (units,); units with higher scores are kept.
        cost: number of parameters of one unit; for filters, the number of its filters.
    """

    block: str
    kind: str
    scores: Tensor
    cost: int

    @property
    def size(self) -> int:
        """Number of parameters of all units."""
        return len(self.scores) * self.cost

    def order(self) -> list[int]:
        """Return the indices of the units that may be removed, from lowest to highest score, ties by index.

        The unit with the highest score is left out, because it is never removed.
        """
        return self.scores.argsort(stable=True)[:-1].tolist()


def select_units(
    sets: list[ScoredUnits], ratio: float, structure: Structure, attention_ratio: float | None = None
) -> list[Tensor]:
    """Return one mask (units,) per set, True = kept. The masks remove at least `ratio` of the parameters.

    | structure | compared with each other | share of the heads |
    | --- | --- | --- |
    | al-am | all units of the model | decided by the scores |
    | al-mm | heads of the model; neurons of the model | at most `attention_ratio`; neurons make up the rest |
    | ul-mm | heads of a block; neurons of a block | at most `attention_ratio`; neurons make up the rest |
    | ul-um | heads of a block; neurons of a block | `ratio`, rounded up to whole units |

    The excess over `ratio` is less than the parameters of the smallest removed unit. With al-mm and ul-mm heads are
    chosen first, and the excess is less than the parameters of the smallest removed neuron, if a neuron is removed.
    The excess is counted over the model for al-am and al-mm, over each block for ul-mm, and over each set for ul-um.

    Args:
        sets: the attentions and MLPs, those of one block next to each other.
        ratio: fraction of their parameters to remove, in [0, 1).
        structure: "al-am", "al-mm", "ul-mm" or "ul-um", see the table.
        attention_ratio: for al-mm and ul-mm, the largest fraction of the parameters of the heads to remove, in [0, 1).
            By default it is `ratio`, and more if the neurons are too few.

    Raises:
        ValueError: `structure` or `attention_ratio` is out of its range; `ratio` cannot be reached, because each
            attention and each MLP keeps one unit.
    """
    check_structure(structure, attention_ratio)
    removed: list[set[int]] = [set() for _ in sets]
    if structure == "al-am":
        _remove(sets, range(len(sets)), ratio, removed)
    elif structure == "al-mm":
        _remove_by_kind(sets, range(len(sets)), ratio, attention_ratio, removed)
    elif structure == "ul-mm":
        for block in dict.fromkeys(units.block for units in sets):
            inside = [index for index, units in enumerate(sets) if units.block == block]
            _remove_by_kind(sets, inside, ratio, attention_ratio, removed)
    else:
        for index in range(len(sets)):
            _remove(sets, [index], ratio, removed)
    masks = []
    for units, gone in zip(sets, removed, strict=True):
        mask = torch.ones(len(units.scores), dtype=torch.bool, device="cpu")
        mask[list(gone)] = False
        masks.append(mask)
    return masks


def check_structure(structure: str, attention_ratio: float | None) -> None:
    """Raise ValueError if `structure` is unknown, or if `attention_ratio` is out of its range or not used by it."""
    if structure not in get_args(Structure):
        choices = ", ".join(map(repr, get_args(Structure)))
        raise ValueError(f"`structure` must be one of {choices}, got {structure!r}.")
    if attention_ratio is None:
        return
    if not structure.endswith("-mm") or not 0 <= attention_ratio < 1:
        raise ValueError(
            '`attention_ratio` must be in [0, 1), and only the structures "al-mm" and "ul-mm" use it; got '
            f"{attention_ratio} with {structure!r}. Leave it out, or choose another structure."
        )


def _remove_by_kind(
    sets: list[ScoredUnits],
    chosen: Iterable[int],
    ratio: float,
    attention_ratio: float | None,
    removed: list[set[int]],
) -> None:
    """Remove heads up to `attention_ratio` of their own size, then neurons until `ratio` of all is reached.

    If `attention_ratio` is None, heads are removed up to `ratio`, or further if the neurons are too few.
    """
    chosen = list(chosen)
    heads = [i for i in chosen if sets[i].kind == "attention"]
    neurons = [i for i in chosen if sets[i].kind == "mlp"]
    if not heads or not neurons:
        _remove(sets, chosen, ratio, removed)
        return
    total = sum(sets[i].size for i in chosen)
    share = ratio if attention_ratio is None else attention_ratio
    limit = _rounded(share * sum(sets[i].size for i in heads))
    missing = ratio * total - sum(sets[i].size - sets[i].cost for i in neurons) if attention_ratio is None else 0
    gone = 0
    for _, index, unit in _ranked(sets, heads):
        if gone + sets[index].cost > limit and gone >= _rounded(missing):
            break
        removed[index].add(unit)
        gone += sets[index].cost
    _remove(sets, neurons, ratio, removed, total, gone)


def _remove(
    sets: list[ScoredUnits],
    chosen: Iterable[int],
    ratio: float,
    removed: list[set[int]],
    total: int | None = None,
    gone: int = 0,
) -> None:
    """Remove the lowest units of the sets `chosen` until `ratio` of `total` parameters is removed.

    The last unit may be larger than what was still to remove. Units that need not be removed then are kept after all,
    those with the highest scores first.

    Args:
        sets: all sets.
        chosen: indices of the sets to remove from.
        ratio: fraction to remove.
        removed: the removed units of each set; this is changed in place.
        total: number of parameters that `ratio` is a fraction of; by default that of the chosen sets.
        gone: number of these parameters that are removed already.
    """
    chosen = list(chosen)
    total = sum(sets[i].size for i in chosen) if total is None else total
    target = _rounded(ratio * total)
    taken = []
    for _, index, unit in _ranked(sets, chosen):
        if gone >= target:
            break
        removed[index].add(unit)
        taken.append((index, unit))
        gone += sets[index].cost
    for index, unit in reversed(taken):
        if gone - sets[index].cost >= target:
            removed[index].remove(unit)
            gone -= sets[index].cost
    if gone < target:
        limit = math.floor(1e4 * gone / total) / 1e4
        where = f" of {sets[chosen[0]].block!r}" if len({sets[i].block for i in chosen}) == 1 else ""
        filters = sets[chosen[0]].kind == "filters"
        what, keeps = ("filter", "layer") if filters else ("head or neuron", "attention and each MLP")
        raise ValueError(
            f"`ratio={ratio:g}` would remove every {what} of a layer{where}. Each {keeps} keeps one unit, so at most "
            f'{limit:g} can be removed. Use a smaller ratio, or `structure="al-am"`, which reaches the largest ratios.'
        )


def _ranked(sets: list[ScoredUnits], chosen: list[int]) -> list[tuple[float, int, int]]:
    """Return (score, set, unit) of all units that may be removed, lowest first, ties by set and index."""
    return sorted((float(sets[i].scores[unit]), i, unit) for i in chosen for unit in sets[i].order())


def _rounded(size: float) -> float:
    # Products are inexact: 0.29 * 100 is 28.999999999999996 and 0.07 * 100 is 7.000000000000001.
    return round(size, 6)
