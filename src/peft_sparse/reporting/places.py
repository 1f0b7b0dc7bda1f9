"""Where a weight is in its model: in which stack of blocks, how deep, and of which kind."""

import re
from collections.abc import Iterable


def place_of(name: str) -> tuple[str, int, str]:
    """Return the stack, the block and the kind of the layer `name`. The experts of one parameter are of one kind.

    A name without the number of a block is a kind of its own, in block 0 of the stack "".
    """
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.*?)(\.\d+)?", name)
    return (found[1], int(found[2]), found[3]) if found else ("", 0, name)


def by_place(values: Iterable[tuple[str, float | None]]) -> dict[str, dict[str, dict[int, float]]]:
    """Return {stack: {kind: {block: mean value}}} of pairs (name of a layer, value). None is left out.

    The experts of one block are one value, their mean.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name, value in values:
        stack, depth, kind = place_of(name)
        if value is not None:
            found.setdefault(stack, {}).setdefault(kind, {}).setdefault(depth, []).append(value)
    return {
        stack: {kind: {depth: sum(v) / len(v) for depth, v in blocks.items()} for kind, blocks in kinds.items()}
        for stack, kinds in found.items()
    }


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """Return for each kind the shortest ending of its name that no other kind has."""
    kinds = list(kinds)
    found = {}
    for kind in kinds:
        parts = kind.split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [f".{other}" for other in kinds if other != kind]
        found[kind] = next((e for e in endings if not any(o.endswith(f".{e}") for o in others)), kind)
    return found
