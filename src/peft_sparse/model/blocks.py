"""What other folders ask of a model: its blocks, its prunable weights, its norms, its experts.

All names are those that modules have without adapters: `layers.0.q_proj`, also if PEFT has wrapped that layer.
`tree` walks the modules, `stacks` finds the blocks and `experts` finds experts and routers.
"""

import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedModel

from .experts import expert_layers, find_mixtures, fused_experts
from .kinds import QUANTISED, packed_layers
from .offload import note_loaders
from .stacks import block_of, find_blocks, find_stacks, is_embedding
from .tree import (
    active_copy,
    base_layer,
    base_model,
    called_layers,
    holders,
    is_norm,
    is_prunable,
    layers_of_weights,
    walk,
)
from .weights import WeightView, stored_weight


__all__ = [
    "Targets",
    "active_copy",
    "active_experts",
    "attention_and_mlp",
    "base_layer",
    "base_model",
    "block_of",
    "called_layers",
    "check_packed",
    "excluded_names",
    "expert_layers",
    "find_blocks",
    "find_stacks",
    "fused_experts",
    "hidden_size",
    "holders",
    "is_encoder_decoder",
    "is_norm",
    "layers_in",
    "layers_of_weights",
    "matching_names",
    "norm_names",
    "output_head",
    "prunable_weights",
    "storage_of",
    "tied_to_embedding",
]

# Names of layers, and no other expressions.
_NAME = re.compile(r"[\w.]+")

Targets = str | list[str] | set[str] | tuple[str, ...] | None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the configuration of `model` says that it is an encoder-decoder."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def prunable_weights(
    model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None
) -> dict[str, WeightView]:
    """Return the weights that are pruned as matrices (out, in), by name.

    The default is the weight of every `nn.Linear`, `Conv1D` and `nn.Conv2d`, and every fused expert, inside the
    blocks, except the MoE routers that are recognised. Embeddings, norms and layers outside the blocks, such as the
    output head, are not among them. Fused experts are a parameter that holds one matrix per expert. Each expert is a
    weight of its own, called `<parameter>.<expert>`. A weight with several names has the first one that is chosen, and
    is left out if one of its names is excluded.

    Args:
        model: the model, with or without adapters.
        target_modules: as in PEFT: a list of names or name endings, or a regular expression for the whole name. The
            name of fused experts is that of their parameter. None takes the default. "all-linear" leaves out fused
            experts, as in PEFT. A list or an expression may name layers outside the blocks, and routers.
        exclude_modules: as in PEFT: a list of names or name endings, or a regular expression for the whole name.

    Raises:
        ValueError: no weight is left, or an entry of a list matches no layer.
    """
    note_loaders(base_model(model))
    layers = _candidate_layers(model, target_modules)
    experts = {} if target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND else fused_experts(model)
    candidates = [*layers, *experts]
    known = [name for name, module in walk("", base_model(model)) if is_prunable(module)]
    chosen = matching_names(candidates, target_modules, exclude_modules, known)
    stored = {name: storage_of(base_layer(module)) for name, module in layers.items()}
    stored |= {name: storage_of(fused.module, fused.parameter) for name, fused in experts.items()}
    # A parameter with several names is pruned once, and not at all if one of its names is excluded.
    taken = {stored[name] for name in excluded_names(candidates, exclude_modules)}
    weights: dict[str, WeightView] = {}
    for name in chosen:
        if stored[name] in taken:
            continue
        taken.add(stored[name])
        weights |= {name: WeightView(base_layer(layers[name]))} if name in layers else experts[name].views(name)
    return weights


def tied_to_embedding(model: nn.Module, weights: dict[str, WeightView]) -> list[str]:
    """Return the names of those `weights` that are also the weight of an `nn.Embedding`."""
    embeddings = {id(module.weight) for _, module in walk("", base_model(model)) if isinstance(module, nn.Embedding)}
    return [name for name, weight in weights.items() if id(weight.storage) in embeddings]


def output_head(model: nn.Module) -> str | None:
    """Return the name of the module that transformers' `get_output_embeddings` returns, or None if there is none."""
    model = base_model(model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def norm_names(model: nn.Module) -> list[str]:
    """Return the names of all normalisation layers of `model`, inside and outside the blocks."""
    return [name for name, module in walk("", base_model(model)) if is_norm(module)]


def attention_and_mlp(block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the children of `block` that hold weights: those of its attention, and those of its MLP.

    A child belongs to the attention if its name or its class contains "attn" or "attention". The other children form
    the MLP. There may be several (OPT has `fc1` and `fc2`).
    """
    attention: list[nn.Module] = []
    mlp: list[nn.Module] = []
    for name, child in block.named_children():
        if any(is_prunable(m) or any(p.dim() == 3 for p in m.parameters(recurse=False)) for m in child.modules()):
            called_so = re.search("attn|attention", f"{name} {type(child).__name__}", re.IGNORECASE)
            (attention if called_so else mlp).append(child)
    return attention, mlp


def hidden_size(model: nn.Module) -> int:
    """Return the number of features of the hidden states between blocks: that of the first block's widest norm.

    Raises:
        ValueError: the first block has no norm, or there are no blocks.
    """
    sizes = [
        stored_weight(module).numel()
        for block in list(find_blocks(model).values())[:1]
        for _, module in walk("", block)
        if is_norm(module)
    ]
    if not sizes:
        raise ValueError("Expected blocks with a normalisation layer, which tells the hidden size, found none.")
    return max(sizes)


def active_experts(model: nn.Module) -> float:
    """Return the fraction of the fused experts that compute one token, by the model's configuration; 1 if unknown."""
    config = getattr(base_model(model), "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    counts = {fused.count for fused in fused_experts(model).values()}
    return chosen / counts.pop() if chosen and len(counts) == 1 else 1.0


def check_packed(model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None) -> None:
    """Check that no layer that the arguments may mean is packed in a way that has no weight matrix.

    Raises:
        ValueError: there is such a layer, or one that `torch.jit` has compiled. Without this check it would be passed
            over.
    """
    _check_names(target_modules, exclude_modules)
    for name, module in base_model(model).named_modules():
        if isinstance(module, torch.jit.ScriptModule) and any(p.dim() > 1 for p in module.parameters()):
            raise ValueError(
                f"{f'{name!r} was' if name else 'The model was'} compiled by `torch.jit`, and its layers cannot be "
                "seen. Prune the model first, and compile it afterwards."
            )
    packed = list(packed_layers("", base_model(model)))
    if target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        # If all layers of a model are packed, no blocks are found.
        blocks = find_blocks(model)
        packed = [name for name in packed if not blocks or block_of(name, blocks)]
    if names := _chosen(packed, target_modules, exclude_modules):
        raise ValueError(
            f"The weight of {names[0]!r} is packed by a quantiser, and its entries cannot be read ({len(names)} such "
            f"layers). {QUANTISED} Or add them to `exclude_modules`."
        )


def _candidate_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """Return the layers that `targets` may choose: those inside the blocks, or all prunable layers for named ones."""
    if targets not in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return {name: module for name, module in walk("", base_model(model)) if is_prunable(module)}
    return {
        name: module
        for block_name, block in find_blocks(model).items()
        for name, module, reason in layers_in(block_name, block)
        if reason is None
    }


def layers_in(block_name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield the prunable layers inside a block: (name, layer, why it is not pruned by default or None)."""
    routers = find_mixtures(block_name, block).routers
    embeddings: set[int] = set()
    for name, module in walk(block_name, block):
        if is_embedding(module):
            embeddings.update(id(below) for _, below in walk(name, module))
        if is_prunable(module):
            router = "a router" if id(base_layer(module)) in routers else None
            yield name, module, "an embedding" if id(module) in embeddings else router


def storage_of(layer: nn.Module, parameter: str = "weight") -> int:
    """Return what identifies a stored weight: its parameter, or its layer if the weight is computed."""
    return id(layer._parameters.get(parameter, layer))


def excluded_names(candidates: list[str], excluded: Targets) -> list[str]:
    """Return the `candidates` that `excluded` matches by PEFT's rules."""
    selector = SimpleNamespace(target_modules=".*", exclude_modules=excluded, target_parameters=None)
    return [name for name in candidates if isinstance(check_target_module_exists(selector, name), _ExcludedModule)]


def _chosen(candidates: list[str], targets: Targets, excluded: Targets = None) -> list[str]:
    selector = SimpleNamespace(
        target_modules=".*" if targets in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND) else targets,
        exclude_modules=excluded,
        target_parameters=None,
    )
    matches = {name: check_target_module_exists(selector, name) for name in candidates}
    return [name for name, hit in matches.items() if hit and not isinstance(hit, _ExcludedModule)]


def matching_names(candidates: list[str], targets: Targets, excluded: Targets, known: Sequence[str] = ()) -> list[str]:
    """Return the `candidates` that PEFT's rules choose. Raise ValueError if an entry of a list matches none.

    Args:
        candidates: the names to choose from.
        targets, excluded: `target_modules` and `exclude_modules`.
        known: further names that an entry of `excluded` may match, since they are not pruned anyway.
    """
    _check_names(targets, excluded)
    chosen = _chosen(candidates, targets, excluded)
    if not candidates and targets in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        raise ValueError(
            "Expected a model with blocks (an nn.ModuleList, nn.ModuleDict or nn.Sequential whose entries hold linear "
            "layers), found none. Name the layers to prune with `target_modules`."
        )
    for kind, names, others in (("target_modules", targets, ()), ("exclude_modules", excluded, known)):
        for wanted in names if isinstance(names, (list, set, tuple)) else ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name in (*candidates, *others)):
                raise ValueError(f"{wanted!r} in `{kind}` matches no prunable layer. {_examples(candidates)}")
    # A name where an expression was expected would leave out nothing, in silence.
    if isinstance(excluded, str) and _NAME.fullmatch(excluded) and excluded not in (*candidates, *known):
        raise ValueError(f"`exclude_modules={excluded!r}` matches no prunable layer. {_of_whole_names(excluded)}")
    if not chosen:
        raise ValueError(
            f"`target_modules={targets!r}` with `exclude_modules={excluded!r}` leaves no layer to prune. "
            f"{_of_whole_names(targets) + ' ' if isinstance(targets, str) else ''}{_examples(candidates)}"
        )
    return chosen


def _check_names(targets: Targets, excluded: Targets) -> None:
    """Raise TypeError or ValueError if an argument is no list of names and no regular expression."""
    for kind, names in (("target_modules", targets), ("exclude_modules", excluded)):
        if names is not None and not isinstance(names, (str, list, set, tuple)):
            raise TypeError(
                f"Expected `{kind}` as a list of names or name endings, or as a regular expression, got {names!r}."
            )
        try:
            re.compile(names if isinstance(names, str) else "")
        except re.error as error:
            raise ValueError(f"`{kind}={names!r}` is no regular expression: {error}.") from error


def _of_whole_names(expression: str) -> str:
    return f"A string is a regular expression for whole names. Give name endings as a list, such as [{expression!r}]."


def _examples(candidates: list[str]) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in candidates))[:8]
    return f"Prunable layers here end in {', '.join(endings)}." if endings else "This model has no prunable layer."
