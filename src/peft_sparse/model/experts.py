"""Finds the experts of a mixture, and the routers that choose among them, by what they are.

Experts are several matrices or modules of one shape of which each token uses a few. They are stored in one of these
ways:

- fused: a parameter (experts, ., .) with one matrix per expert. The module or its configuration has a number with
  "expert" in its name that is the first dimension, or a router beside it has that many outputs. Other parameters of
  three dimensions, such as the heads of an attention, are no experts.
- listed: an `nn.ModuleList` or `nn.ModuleDict` of modules of one class, beside a router with one output for each.
- stacked: parameters of one shape (experts · inner, hidden) of a module that says all three numbers. The last of them
  gives hidden states, and those before read them.

A router is a module beside the experts, at any depth, whose last linear layer has one output per expert. A linear
layer with one output beside a router is a gate of an expert that all tokens use, and is treated as a router.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .sharding import whole_shape
from .stacks import find_blocks
from .tree import base_layer, children_of, holds_prunable, unwrapped, walk
from .weights import WeightView


# How many levels above the experts a router is looked for.
_LEVELS = 3

Path = list[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Fused:
    """A parameter that holds one matrix per expert.

    Args:
        module: the module that has the parameter.
        parameter: its name in the module.
        count: the number of experts.
        transposed: whether the matrix of an expert is stored as (in, out).
        stacked: whether the parameter has two dimensions, the matrices one below the other.
    """

    module: nn.Module
    parameter: str
    count: int
    transposed: bool
    stacked: bool

    def views(self, name: str) -> dict[str, WeightView]:
        """Return the weights of all experts by name; `name` is that of the parameter."""
        stacked = self.count if self.stacked else None
        return {
            f"{name}.{expert}": WeightView(self.module, self.parameter, expert, self.transposed, stacked)
            for expert in range(self.count)
        }


@dataclass
class Mixtures:
    """The experts and routers inside one block.

    Args:
        fused: the parameters that hold one matrix per expert, by name.
        experts: ids of the modules that hold such parameters, and of all modules inside listed experts.
        routers: ids of the modules in routers and gates.
    """

    fused: dict[str, Fused] = field(default_factory=dict)
    experts: set[int] = field(default_factory=set)
    routers: set[int] = field(default_factory=set)


def find_mixtures(name: str, block: nn.Module) -> Mixtures:
    """Return the experts and routers inside the block called `name`."""
    found = Mixtures()
    for path in _paths([(name, unwrapped(block))]):
        key, module = path[-1]
        layer = base_layer(module)
        if entries := _listed(key, module):
            _note_list(found, path, entries)
        elif not type(layer).__module__.startswith("torch.nn"):
            _note_parameters(found, path, key, layer)
            _note_embedded(found, path)
    return found


def fused_experts(model: nn.Module) -> dict[str, Fused]:
    """Return the parameters inside the blocks that hold one matrix per expert, by name."""
    return {
        name: fused
        for block_name, block in find_blocks(model).items()
        for name, fused in find_mixtures(block_name, block).fused.items()
    }


def expert_layers(model: nn.Module) -> set[int]:
    """Return the ids of the modules that may get no token: those that hold experts, and those inside an expert."""
    return {module for name, block in find_blocks(model).items() for module in find_mixtures(name, block).experts}


def _paths(path: Path) -> Iterator[Path]:
    """Yield the way from the block to each module below it, as (name, module) pairs."""
    yield path
    for child in children_of(*path[-1]):
        yield from _paths([*path, child])


def _listed(name: str, module: nn.Module) -> Path:
    """Return the entries of a list that may be experts: modules of one class, beside some without parameters."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return []
    entries = [(key, child) for key, child in children_of(name, module) if next(child.parameters(), None) is not None]
    alike = len(entries) > 1 and len({type(base_layer(entry)) for _, entry in entries}) == 1
    return entries if alike and all(holds_prunable(entry) for _, entry in entries) else []


def _note_list(found: Mixtures, path: Path, entries: Path) -> None:
    routers = _routers_beside(path, {len(entries)})
    if routers or any(_says_itself(module, len(entries)) for _, module in path[-2:]):
        found.experts |= {id(base_layer(below)) for key, entry in entries for _, below in walk(key, entry)}
    found.routers |= routers


def _note_parameters(found: Mixtures, path: Path, name: str, layer: nn.Module) -> None:
    """Note the parameters of `layer` that hold one matrix per expert."""
    parent = path[-2][1] if len(path) > 1 else layer
    shapes = {key: whole_shape(value) for key, value in layer.named_parameters(recurse=False)}
    three = {key: shape for key, shape in shapes.items() if len(shape) == 3 and 1 not in shape[1:]}
    known = {
        count for count in {shape[0] for shape in three.values()} if _says(layer, count) or _says_itself(parent, count)
    }
    matrices = {key: shape for key, shape in three.items() if shape[0] in known or _routed(path, shape)}
    fused = {}
    if matrices:
        transposed = _is_transposed(layer, list(matrices.values()), _width(layer, path))
        fused = {key: Fused(layer, key, shape[0], transposed, False) for key, shape in matrices.items()}
    elif not three:
        stacked = _stacked_counts(layer, shapes)
        fused = {key: Fused(layer, key, count, key == list(stacked)[-1], True) for key, count in stacked.items()}
    if fused:
        found.fused |= {f"{name}.{key}": value for key, value in fused.items()}
        found.experts.add(id(layer))
        # The module around may give some choices of the router something else than an expert.
        choices = vars(parent).get("num_experts", 0)
        counts = {value.count for value in fused.values()}
        found.routers |= _routers_beside(path, counts | ({choices} if choices > max(counts) else set()))


def _says(module: nn.Module, count: int) -> bool:
    """Return whether `module`, or the configuration that it holds, has `count` as a number of experts."""
    config = getattr(module, "config", None)
    # The interface of Transformers for experts sets these two attributes.
    interface = {"is_transposed", "has_gate"} <= vars(module).keys()
    return interface or _says_itself(module, count) or (config is not None and _has_number(vars(config), count))


def _says_itself(module: nn.Module, count: int) -> bool:
    return _has_number(vars(module), count)


def _has_number(attributes: dict[str, Any], count: int) -> bool:
    return any(type(value) is int and value == count and "expert" in key.lower() for key, value in attributes.items())


def _stacked_counts(layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the number of experts in each of several parameters of one shape (experts · inner, hidden)."""
    numbers = {key: value for key, value in vars(layer).items() if type(value) is int and value > 1}
    experts = {value for key, value in numbers.items() if "expert" in key.lower()}
    sizes = {value for key, value in numbers.items() if "expert" not in key.lower()}
    found = {}
    for key, shape in shapes.items():
        counts = {count for count in experts for inner in sizes if shape[:1] == (count * inner,)}
        alike = list(shapes.values()).count(shape) > 1
        if len(shape) == 2 and shape[1] in sizes and len(counts) == 1 and alike:
            found[key] = counts.pop()
    return found


def _note_embedded(found: Mixtures, path: Path) -> None:
    """Note the routers of experts that are rows of embeddings. Product keys have 2 · √experts outputs."""
    name, layer = path[-1]
    children = [child for _, child in children_of(name, layer)]
    counts = {child.num_embeddings for child in children if isinstance(child, nn.Embedding)}
    for count in {count for count in counts if _says_itself(layer, count)}:
        outputs = {count, 2 * math.isqrt(count)}
        found.routers |= {
            id(base_layer(child))
            for child in children
            if isinstance(base_layer(child), nn.Linear) and base_layer(child).out_features in outputs
        }


def _routers_beside(path: Path, counts: set[int]) -> set[int]:
    """Return the ids of the modules of routers and gates beside the last module of `path`."""
    for beside in _beside(path):
        if chosen := [child for child in beside if _chooses(child, counts)]:
            gates = [child for child in beside if _last_outputs(child) == 1]
            return {id(base_layer(below)) for child in chosen + gates for _, below in walk("", child)}
    return set()


def _chooses(module: nn.Module, counts: set[int]) -> bool:
    """Return whether `module` ends in one output per expert, or says the number and has outputs for more choices."""
    outputs = _last_outputs(module)
    return outputs in counts or any(
        count < outputs < 2 * count and _says_itself(base_layer(module), count) for count in counts
    )


def _beside(path: Path) -> Iterator[list[nn.Module]]:
    """Yield the modules beside the last one of `path`: its own children, then those of the modules above it."""
    own = isinstance(path[-1][1], (nn.ModuleList, nn.ModuleDict))
    for level in range(len(path) - 1 - own, max(-1, len(path) - 2 - _LEVELS), -1):
        on_the_way = {id(module) for _, module in path[level + 1 :]}
        yield [child for _, child in children_of(*path[level]) if id(child) not in on_the_way]


def _last_outputs(module: nn.Module) -> int:
    """Return the number of outputs of the last linear layer in `module`, or of a layer with a bare matrix."""
    outputs = 0
    for _, below in walk("", module):
        layer = base_layer(below)
        if isinstance(layer, nn.Linear):
            outputs = layer.out_features
        elif not isinstance(layer, nn.Embedding):
            matrices = [whole_shape(value) for value in layer.parameters(recurse=False) if value.dim() == 2]
            # A single row behind a layer is a bias of its outputs.
            matrices = [shape for shape in matrices if not (shape[0] == 1 and shape[1] == outputs)]
            bare = layer is base_layer(module) or next(layer.children(), None) is None
            outputs = matrices[-1][0] if matrices and bare else outputs
    return outputs


def _routed(path: Path, shape: tuple[int, ...]) -> bool:
    """Return whether a linear layer beside has an output per expert and reads what experts of `shape` read or give."""
    layers = [base_layer(child) for beside in _beside(path) for child in beside]
    return any(
        isinstance(layer, nn.Linear) and layer.out_features == shape[0] and layer.in_features in shape[1:]
        for layer in layers
    )


def _width(layer: nn.Module, path: Path) -> int | None:
    """Return the number of features of the hidden states that experts read and give, if it is said anywhere."""
    config = getattr(layer, "config", None)
    for holder in (layer, config):
        for name in ("hidden_size", "hidden_dim"):
            if type(value := getattr(holder, name, None)) is int:
                return value
    for _, above in reversed(path):
        for _, child in children_of("", above):
            if isinstance(beside := base_layer(child), nn.Linear):
                return beside.in_features
    return None


def _is_transposed(layer: nn.Module, shapes: Sequence[tuple[int, ...]], width: int | None) -> bool:
    """Return whether fused experts are stored as (experts, in, out).

    A module that follows the interface of Transformers says it. Otherwise the first parameter of a module reads
    hidden states and the last one gives them, so that their shapes tell. If they do not, it is (experts, out, in).
    """
    if hasattr(layer, "is_transposed"):
        return bool(layer.is_transposed)
    first, last = shapes[0], shapes[-1]
    in_first = len(shapes) > 1 and first[1] == last[2] == width
    out_first = first[2] == last[1] == width
    return in_first and not out_first
