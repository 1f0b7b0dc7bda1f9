"""Which units go: scores and true parameter costs -> masks, True = kept. No layers, no models."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


Structure = Literal["al-am", "al-mm", "ul-mm", "ul-um"]


@dataclass(frozen=True)
class ScoredUnits:
    """The units of one attention or MLP.

    Args:
        block: where it lies.
        kind: "attention" or "mlp".
        scores: (units,), higher = kept.
        cost: parameters of one unit.
    """

    block: str
    kind: str
    scores: Tensor
    cost: int

    @property
    def size(self) -> int:
        """Parameters of all units."""
        return len(self.scores) * self.cost

    def order(self) -> list[int]:
        """Return the units from lowest to highest score, ties by index, without the last: one unit always stays."""
        return self.scores.argsort(stable=True)[:-1].tolist()


def select_units(
    sets: list[ScoredUnits], ratio: float, structure: Structure, attention_ratio: float | None = None
) -> list[Tensor]:
    """Return one mask per set that removes at least `ratio` of all parameters, in excess less than any unit removed.

    | structure | compared | removed of attention |
    | --- | --- | --- |
    | al-am | all units of the model | whatever ranks lowest |
    | al-mm | heads of the model, neurons of the model | at most `attention_ratio`, neurons make up the rest |
    | ul-mm | heads of a layer, neurons of a layer | at most `attention_ratio`, neurons make up the rest |
    | ul-um | heads of a layer, neurons of a layer | `ratio`, of neurons too, each rounded up to whole units |

    In excess: of the whole for al-*, of every block for ul-mm, of every set for ul-um. With *-mm, heads are chosen
    first, and the excess is less than any neuron removed.

    Raises:
        ValueError: `structure` or `attention_ratio` is none of these; too few units can go, since each attention and
            MLP keeps one.
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
        mask = torch.ones(len(units.scores), dtype=torch.bool)
        mask[list(gone)] = False
        masks.append(mask)
    return masks


def check_structure(structure: str, attention_ratio: float | None) -> None:
    """Raise ValueError unless `structure` is one of its choices and takes `attention_ratio`."""
    if structure not in get_args(Structure):
        choices = ", ".join(map(repr, get_args(Structure)))
        raise ValueError(f"`structure` must be one of {choices}, got {structure!r}.")
    if attention_ratio is None:
        return
    if not structure.endswith("-mm") or not 0 <= attention_ratio < 1:
        raise ValueError(
            '`attention_ratio` must be in [0, 1) and is for "al-mm" and "ul-mm", which rank heads and neurons apart; '
            f"got {attention_ratio} with {structure!r}. Leave it out, or choose another structure."
        )


def _remove_by_kind(
    sets: list[ScoredUnits],
    chosen: Iterable[int],
    ratio: float,
    attention_ratio: float | None,
    removed: list[set[int]],
) -> None:
    """Remove heads up to `attention_ratio` of their own size, then neurons until `ratio` of all is reached.

    Without an `attention_ratio` that is `ratio`, and more where the neurons are too few.
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
    """Remove the lowest units of `chosen` until `ratio` of `total`, their own size by default, is `gone`.

    What the last one, a head maybe, takes too much is given back in cheaper units, the highest first.
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
        raise ValueError(
            f"`ratio={ratio:g}` would remove every head or neuron of a layer{where}: each attention and each MLP "
            f"keeps one unit, which leaves at most {limit:g} to remove. Ask for less; "
            '`structure="al-am"`, which takes of every layer what it can spare, reaches furthest.'
        )


def _ranked(sets: list[ScoredUnits], chosen: list[int]) -> list[tuple[float, int, int]]:
    """Return (score, set, unit) of all units that may go, lowest first, ties by place."""
    return sorted((float(sets[i].scores[unit]), i, unit) for i in chosen for unit in sets[i].order())


def _rounded(size: float) -> float:
    # 0.29 * 100 is 28.999999999999996 and 0.07 * 100 is 7.000000000000001.
    return round(size, 6)
