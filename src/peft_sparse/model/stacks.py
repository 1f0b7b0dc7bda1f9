"""Finds the blocks of a model: the modules that hidden states pass through one after the other.

They are found in the module tree. The name of the model is not read.
"""

import re
from collections.abc import Iterator
from itertools import groupby

from torch import nn
from transformers import PreTrainedModel

from .tree import base_model, children_of, holds_prunable, is_norm, is_prunable, unwrapped, walk


# Modules that return what they are given when the model is evaluated.
_PASSING_ON = (nn.Identity, nn.modules.dropout._DropoutNd)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of `model` by name, in the order in which they are registered.

    The blocks are the entries of lists of blocks. There are three kinds of such lists:

    - An `nn.ModuleList` or `nn.ModuleDict`. Every entry with parameters holds a prunable layer, and no entry is a
      prunable layer itself. If an entry is such a list too, and has no forward of its own, its entries are the blocks.
    - An `nn.Sequential`. At least one entry holds a prunable layer and is not an `nn.Sequential` of plain layers. What
      is called between two such entries is a block too.
    - Modules that are registered one by one under names with numbers, such as `s1`, `s2` or `Mixed_5b`, `Mixed_5c`.
      They count if the model has no other list, or if one of them holds several lists side by side.

    If one list of blocks lies inside another, the outer list counts. Embeddings, heads and necks are not blocks. They
    are recognised by their class, or as a projection by one convolution with a norm. In a model of Transformers, what
    lies outside of the base model or beside the backbone is not a block either. A block that is registered twice has
    its first name.
    """
    return {name: block for stack in find_stacks(model) for name, block in stack.items()}


def find_stacks(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the blocks of `model` by stack, in the order in which the stacks are registered.

    A stack is the blocks of one outermost list of blocks, see `find_blocks`. If it is a list of lists, and each of
    them holds blocks of one class, these lists are stages, and each is a stack. A decoder has one stack. An
    encoder-decoder has two, and the encoder comes first.
    """
    root = base_model(model)
    body = _body(root) if isinstance(root, PreTrainedModel) else root
    place = next((name for name, module in walk("", root) if module is body), "")
    # A body without blocks is not the body: then the blocks are elsewhere.
    found = list(_stacks_below(place, body)) or list(_stacks_below("", root))
    # One stack has no branch beside it, so most models are not searched again.
    if len(found) != 1:
        numbered = list(_numbered_below("", root))
        if not found or _are_branches(found, numbered):
            found = numbered
    known: set[int] = set()
    stacks = []
    for stack in found:
        fresh = {name: block for name, block in stack.items() if id(block) not in known}
        known.update(map(id, fresh.values()))
        stacks += [fresh] if fresh else []
    return stacks


def block_of(name: str, blocks: dict[str, nn.Module]) -> str | None:
    """Return the name of the block that holds the layer or weight `name`, or None if it lies outside all blocks."""
    while name and name not in blocks:
        name = name.rpartition(".")[0]
    return name or None


def is_embedding(module: nn.Module) -> bool:
    """Return whether the class of `module` says that it embeds its inputs, such as patches of an image."""
    return bool(re.search("Embed(s|der|ders|ding|dings)?$", type(module).__name__))


def _stacks_below(name: str, module: nn.Module, embedding: bool = False) -> Iterator[dict[str, nn.Module]]:
    """Yield the stacks at and below `module`; `embedding` says that it lies in an embedding."""
    if isinstance(module, nn.Sequential) and not embedding:
        blocks = _blocks_in_sequence(name, module)
    elif name and isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        blocks = _blocks_in_list(name, module)
    else:
        blocks = {}
    if blocks:
        if not all(map(_is_no_body, blocks.values())):
            yield from _stages_of(blocks)
        return
    for child_name, child in children_of(name, module):
        # An embedding may hold the encoder of another modality, and the sequence of its own layers is no stack.
        yield from _stacks_below(child_name, child, embedding or is_embedding(child))


def _stages_of(blocks: dict[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """Return the blocks of each list within a list, if these lists are stages; otherwise all blocks together.

    Between stages, models compute something, such as a pooling, that a stack must not miss. Lists of several classes
    are the parts of single layers.
    """
    stages = [dict(entries) for _, entries in groupby(blocks.items(), lambda entry: entry[0].rpartition(".")[0])]
    alike = all(len({type(block) for block in stage.values()}) == 1 for stage in stages)
    return stages if alike else [blocks]


def _numbered_below(name: str, module: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Yield the stacks at and below `module` whose blocks are registered one by one, under names with numbers."""
    blocks = _numbered_in(name, module)
    if len(blocks) > 1:
        stages = [_numbered_in(key, stage) for key, stage in blocks.items()]
        complete = all(inner and _holds_all(blocks[key], inner) for key, inner in zip(blocks, stages, strict=True))
        yield from stages if complete else [blocks]
        return
    for child_name, child in children_of(name, module):
        yield from _numbered_below(child_name, child)


def _numbered_in(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks among the children of `module` whose names differ in a number, with what is between them."""
    children = children_of(name, module)
    series: dict[str, list[int]] = {}
    for index, (key, child) in enumerate(children):
        numbered = re.fullmatch(r"(\D+)\d+[a-z]?", key.rpartition(".")[2])
        if numbered and _is_more_than_plain_layers(child):
            series.setdefault(numbered[1], []).append(index)
    marked = max(series.values(), key=len, default=[])
    found: dict[str, nn.Module] = {}
    for index in range(marked[0], marked[-1] + 1) if marked else ():
        key, child = children[index]
        # Such as a pooling. What has parameters of its own may be called elsewhere, such as a head for training.
        changes = next(child.parameters(), None) is None and not isinstance(child, _PASSING_ON)
        if index in marked or changes:
            found[key] = child
    return found


def _holds_all(module: nn.Module, parts: dict[str, nn.Module]) -> bool:
    """Return whether all parameters of `module` are in `parts`."""
    inside = {id(parameter) for part in parts.values() for parameter in part.parameters()}
    return all(id(parameter) in inside for parameter in module.parameters())


def _are_branches(stacks: list[dict[str, nn.Module]], numbered: list[dict[str, nn.Module]]) -> bool:
    """Return whether the stacks are branches of numbered blocks: all lie in one of these, and several in the same."""
    blocks = {name: block for stack in numbered for name, block in stack.items()}
    places = [block_of(next(iter(stack)), blocks) for stack in stacks]
    return None not in places and len(set(places)) < len(places)


def _body(model: PreTrainedModel) -> nn.Module:
    """Return the part of `model` that is no head or neck: its base model, or else its only backbone, or `model`."""
    if model.base_model is not model:
        body = unwrapped(model.base_model)
        return _body(body) if isinstance(body, PreTrainedModel) else body
    # What says which of its stages it gives is a backbone of Transformers.
    backbones = [child for child in model.children() if hasattr(type(child), "out_indices")]
    return backbones[0] if len(backbones) == 1 else model


def _blocks_in_list(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks in an `nn.ModuleList` or `nn.ModuleDict`, or nothing if it is no list of blocks."""
    blocks: dict[str, nn.Module] = {}
    for key, child in children_of(name, module):
        if next(child.parameters(), None) is None:
            continue
        if _is_never_called(child):
            inner = _blocks_in_list(key, child) or _blocks_beside_layers(key, child)
            if not inner:
                return {}
            blocks |= inner
        elif _is_block(child):
            blocks[key] = child
        else:
            return {}
    return blocks


def _blocks_beside_layers(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Return what is called in a list within a list: its blocks, and the plain layers between them."""
    entries = {key: child for key, child in children_of(name, module) if holds_prunable(child)}
    found = any(map(_is_block, entries.values())) and not any(map(_is_never_called, entries.values()))
    return entries if found else {}


def _blocks_in_sequence(name: str, module: nn.Sequential) -> dict[str, nn.Module]:
    """Return the first to the last block of an `nn.Sequential`, with what changes hidden states between them."""
    entries = children_of(name, module)
    marked = [index for index, (_, child) in enumerate(entries) if _is_more_than_plain_layers(child)]
    between = entries[marked[0] : marked[-1] + 1] if marked else []
    return {key: child for key, child in between if not isinstance(child, _PASSING_ON)}


def _is_never_called(module: nn.Module) -> bool:
    has_forward = type(module).forward is not nn.Module.forward
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not has_forward


def _is_block(entry: nn.Module) -> bool:
    return holds_prunable(entry) and not is_prunable(entry)


def _is_more_than_plain_layers(entry: nn.Module) -> bool:
    if not _is_block(entry) or _is_never_called(entry) or _is_no_body(entry):
        return False
    plain = type(entry).forward is nn.Sequential.forward
    return not plain or any(_is_more_than_plain_layers(child) for _, child in children_of("", entry))


def _is_no_body(entry: nn.Module) -> bool:
    """Return whether `entry` is an embedding, a head or a projection: by its class, or by what it consists of."""
    if is_embedding(entry) or re.search("Head$", type(entry).__name__):
        return True
    leaves = [below for _, below in walk("", entry) if next(below.children(), None) is None]
    projections = [leaf for leaf in leaves if isinstance(leaf, nn.Conv2d)]
    norms = [leaf for leaf in leaves if is_norm(leaf)]
    others = [leaf for leaf in leaves if not isinstance(leaf, _PASSING_ON)]
    return (
        len(projections) == 1
        and len(norms) > 0
        and len(others) == 1 + len(norms)
        and (max(projections[0].stride) > 1 or set(projections[0].kernel_size) == {1})
    )
