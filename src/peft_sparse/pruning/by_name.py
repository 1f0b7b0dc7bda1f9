"""Patterns and other values that the caller gives by layer, matched to the names of the weights."""

import re
from collections.abc import Mapping
from numbers import Real
from typing import TypeVar

from ..model.weights import WeightView
from .patterns import Pattern, Unstructured, parse_pattern


PatternLike = float | str | Pattern
Value = TypeVar("Value")


def one_pattern(
    pattern: PatternLike | Mapping[str, PatternLike] | None, sparsity: float | None
) -> PatternLike | Mapping[str, PatternLike]:
    """Return the one of `pattern` and `sparsity` that is given.

    Raises:
        ValueError: both or neither are given.
    """
    if (pattern is None) == (sparsity is None):
        both = "neither" if pattern is None else f"pattern={pattern!r} and sparsity={sparsity!r}"
        raise ValueError(f'Expected one of `pattern`, such as 0.5 or "2:4", and `sparsity`, such as 0.5; got {both}.')
    if sparsity is None:
        return pattern  # type: ignore[return-value]
    # Numbers of NumPy become those of Python.
    return Unstructured(float(sparsity) if isinstance(sparsity, Real) else sparsity)


def patterns_by_name(
    pattern: PatternLike | Mapping[str, PatternLike], weights: dict[str, WeightView]
) -> dict[str, Pattern]:
    """Return the pattern of each weight, by name. The keys of a mapping match as `rank_pattern` does in PEFT.

    Raises:
        ValueError: a key matches no weight or is no regular expression, the mapping is empty, or a pattern is invalid.
    """
    if not isinstance(pattern, Mapping):
        return dict.fromkeys(weights, parse_pattern(pattern))
    return values_by_name({key: parse_pattern(value) for key, value in pattern.items()}, weights, "pattern")


def values_by_name(values: Mapping[str, Value], weights: Mapping[str, WeightView], argument: str) -> dict[str, Value]:
    """Return a value for each of `weights` whose name a key matches. The first matching key counts, as in PEFT.

    Raises:
        ValueError: see `patterns_by_name`. The message names `argument`.
    """
    if not values:
        raise ValueError(f"`{argument}` is an empty dict, which prunes nothing. Give at least one layer.")
    keys = {key: _compiled(key, argument) for key in values}
    chosen: dict[str, Value] = {}
    used: set[str] = set()
    # One key is enough for all experts of a parameter.
    shared = {name: name if weight.expert is None else name.rpartition(".")[0] for name, weight in weights.items()}
    for name in weights:
        for key, expression in keys.items():
            if expression.fullmatch(name) or expression.fullmatch(shared[name]):
                chosen[name] = values[key]
                used.add(key)
                break
    if idle := [key for key in keys if key not in used]:
        endings = list(dict.fromkeys(name.rpartition(".")[2] for name in shared.values()))[:8]
        raise ValueError(
            f"{idle[0]!r} in `{argument}` matches no weight, or only weights that an earlier key matches. Keys are "
            f"names, name endings or regular expressions for the whole name; weights here end in {', '.join(endings)}."
        )
    return chosen


def _compiled(key: str, argument: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})")
    except re.error as error:
        raise ValueError(
            f"{key!r} in `{argument}` is no regular expression ({error}). Write '.*' for any characters. A name or "
            "name ending needs no special characters."
        ) from None


def spelled_pattern(pattern: PatternLike | Mapping[str, PatternLike]) -> str:
    if isinstance(pattern, Mapping):
        return ", ".join(f"{key}: {parse_pattern(value)}" for key, value in pattern.items())
    return str(parse_pattern(pattern))
