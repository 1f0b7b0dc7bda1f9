"""Lists the matrices inside the blocks that are not pruned, with the reason for each."""

from collections.abc import Iterator

from torch import nn

from .blocks import Targets, excluded_names, find_blocks, layers_in, storage_of
from .experts import find_mixtures
from .kinds import packed_layers
from .sharding import whole_shape
from .tree import base_layer, is_prunable, walk
from .weights import WeightView


NO_PATTERN = "no key of `pattern` matches it"


def left_out(
    model: nn.Module,
    weights: dict[str, WeightView],
    chosen: dict[str, WeightView],
    target_modules: Targets = None,
    exclude_modules: Targets = None,
) -> dict[str, str]:
    """Return the matrices inside the blocks that are not in `weights`, by name, each with its reason.

    A matrix is a parameter with at least two dimensions of more than one entry. Embeddings are not listed.

    Args:
        model: the model.
        weights: the weights that are pruned.
        chosen: the weights that `target_modules` and `exclude_modules` choose.
        target_modules, exclude_modules: as in `prunable_weights`.
    """
    listed = {storage_of(weight.layer, weight.parameter) for weight in weights.values()}
    skipped = {storage_of(weight.layer, weight.parameter) for weight in chosen.values()} - listed
    found: dict[str, str] = {}
    for block_name, block in find_blocks(model).items():
        reasons = {name: reason for name, _, reason in layers_in(block_name, block)}
        excluded = set(excluded_names([*reasons, *find_mixtures(block_name, block).fused], exclude_modules))
        for name, storage, reason in _matrices(block_name, block, reasons):
            if storage in listed:
                continue
            listed.add(storage)
            if storage in skipped:
                reason = NO_PATTERN
            elif name in excluded:
                reason = "excluded"
            found[name] = reason or (
                "excluded under another name" if target_modules is None else "not in `target_modules`"
            )
    return found


def _matrices(
    block_name: str, block: nn.Module, reasons: dict[str, str | None]
) -> Iterator[tuple[str, int, str | None]]:
    """Yield (name, storage, reason) of each matrix inside a block; without a reason, targets and exclusions decide."""
    mixtures = find_mixtures(block_name, block)
    packed = set(packed_layers(block_name, block))
    for name, module in walk(block_name, block):
        layer = base_layer(module)
        if is_prunable(module):
            yield name, storage_of(layer), reasons[name]
        elif name in packed:
            yield name, id(layer), "packed by a quantiser"
        elif not isinstance(layer, nn.Embedding):
            for key, value in layer.named_parameters(recurse=False):
                if sum(size > 1 for size in whole_shape(value)) < 2:
                    continue
                full = f"{name}.{key}"
                if full in mixtures.fused:
                    yield full, id(value), None
                    continue
                reason = "a router" if id(layer) in mixtures.routers else _why_no_layer(layer, key)
                yield name if key == "weight" else full, id(value), reason


def _why_no_layer(layer: nn.Module, parameter: str) -> str:
    kind = type(layer).__name__
    if isinstance(layer, nn.MultiheadAttention):
        return f"nn.MultiheadAttention.{parameter}, which holds projections that are not called as layers"
    if type(layer).__module__.startswith("torch.nn"):
        return f"a layer of a kind that is not pruned: {kind}"
    return f"no layer: a parameter of 2 or more dimensions of {kind}"
