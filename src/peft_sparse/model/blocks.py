"""Finds blocks, prunable weights and norms in a model.

They are found in the module tree. The name of the model is not read. All names are those that modules have without
adapters: `layers.0.q_proj`, also if PEFT has wrapped that layer.
"""

import re
from collections.abc import Iterator
from types import SimpleNamespace

from accelerate.utils import extract_model_from_parallel
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from .sharding import whole_shape
from .weights import PRUNABLE_LAYERS, WeightView, stored_weight


Targets = str | list[str] | set[str] | tuple[str, ...] | None


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of PEFT, DDP and `torch.compile`."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    while isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        model = model.model if isinstance(model, BaseTuner) else model.base_model
    return model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the configuration of `model` says that it is an encoder-decoder."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def base_layer(module: nn.Module) -> nn.Module:
    """Return the layer that holds the weight: the base layer of a PEFT tuner layer, or `module` itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def active_copy(wrapper: ModulesToSaveWrapper) -> nn.Module:
    """Return the copy of a module in `modules_to_save` that the active adapter trains, or the original module."""
    copies = [wrapper.modules_to_save[name] for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return copies[0] if copies else wrapper.original_module


def called_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the module that is called to run each layer, by the layer's id: its PEFT wrapper, or the layer itself."""
    called: dict[int, nn.Module] = {}
    for module in base_model(model).modules():
        called.setdefault(id(base_layer(module)), module)
    return called


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of `model` by name, in the order in which they are registered.

    A block is an entry of an `nn.ModuleList` in which every entry holds a prunable layer, and no entry is a prunable
    layer itself. Where such lists are nested, the entries of the outermost list are the blocks. Blocks are expected to
    run in the order in which they are registered.
    """
    return dict(_blocks_below("", base_model(model)))


def find_stacks(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the blocks of `model` by stack, in the order in which the stacks are registered.

    A stack is the blocks of one `nn.ModuleList`. A decoder has one stack. An encoder-decoder has two, and the encoder
    comes first.
    """
    stacks: dict[str, dict[str, nn.Module]] = {}
    for name, block in find_blocks(model).items():
        stacks.setdefault(name.rpartition(".")[0], {})[name] = block
    return list(stacks.values())


def block_of(name: str, blocks: dict[str, nn.Module]) -> str | None:
    """Return the name of the block that holds the layer or weight `name`, or None if it lies outside all blocks."""
    while name and name not in blocks:
        name = name.rpartition(".")[0]
    return name or None


def prunable_weights(
    model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None
) -> dict[str, WeightView]:
    """Return the weights that are pruned as matrices (out, in), by name.

    The default is the weight of every `nn.Linear`, `Conv1D` and `nn.Conv2d`, and every fused expert, inside the
    blocks, except the MoE routers that are recognised. Embeddings, norms and layers outside the blocks, such as the
    output head, are not among them. Fused experts are a parameter (experts, ., .) that holds one matrix per expert.
    Each expert is a weight of its own, called `<parameter>.<expert>`.

    Args:
        model: the model, with or without adapters.
        target_modules: as in PEFT: a list of names or name endings, or a regular expression for the whole name. The
            name of fused experts is that of their parameter. None takes the default. "all-linear" leaves out fused
            experts, as in PEFT. A list or an expression may name layers outside the blocks, and routers.
        exclude_modules: as in PEFT: a list of names or name endings, or a regular expression for the whole name.

    Raises:
        ValueError: no weight is left, or an entry of a list matches no layer.
    """
    layers = _candidate_layers(model, target_modules)
    experts = {} if target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND else fused_experts(model)
    weights = {}
    for name in matching_names([*layers, *experts], target_modules, exclude_modules):
        if name in layers:
            weights[name] = WeightView(base_layer(layers[name]))
        else:
            module, parameter = experts[name]
            count = whole_shape(getattr(module, parameter))[0]
            weights |= {f"{name}.{expert}": WeightView(module, parameter, expert) for expert in range(count)}
    return weights


def fused_experts(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the fused experts inside the blocks, by the name of their parameter: (module, name in the module).

    Fused experts are a parameter (experts, ., .) that holds one matrix per expert.
    """
    return {
        f"{name}.{parameter}": (base_layer(module), parameter)
        for block_name, block in find_blocks(model).items()
        for name, module in _walk(block_name, block)
        for parameter, value in base_layer(module).named_parameters(recurse=False)
        if _is_fused(base_layer(module), value)
    }


def tied_to_embedding(model: nn.Module, weights: dict[str, WeightView]) -> list[str]:
    """Return the names of those `weights` that are also the weight of an `nn.Embedding`."""
    embeddings = {id(module.weight) for _, module in _walk("", base_model(model)) if isinstance(module, nn.Embedding)}
    return [name for name, weight in weights.items() if id(weight.storage) in embeddings]


def output_head(model: nn.Module) -> str | None:
    """Return the name of the module that transformers' `get_output_embeddings` returns, or None if there is none."""
    model = base_model(model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def is_norm(module: nn.Module) -> bool:
    """Return whether `module` is a normalisation layer.

    It is one if its class has "norm" in its name or is a batch normalisation of torch, if it has no children, and if
    it has a weight and no parameter of two or more dimensions.
    """
    if next(module.children(), None) is not None:
        return False
    parameters = dict(module.named_parameters(recurse=False))
    named_so = "norm" in type(module).__name__.lower() or isinstance(module, nn.modules.batchnorm._NormBase)
    return named_so and "weight" in parameters and all(p.dim() <= 1 for p in parameters.values())


def norm_names(model: nn.Module) -> list[str]:
    """Return the names of all normalisation layers of `model`, inside and outside the blocks."""
    return [name for name, module in _walk("", base_model(model)) if is_norm(module)]


def attention_and_mlp(block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the children of `block` that hold weights: those of its attention, and those of its MLP.

    A child belongs to the attention if its name or its class contains "attn" or "attention". The other children form
    the MLP. There may be several (OPT has `fc1` and `fc2`).
    """
    attention: list[nn.Module] = []
    mlp: list[nn.Module] = []
    for name, child in block.named_children():
        if any(_is_prunable(m) or any(p.dim() == 3 for p in m.parameters(recurse=False)) for m in child.modules()):
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
        for _, module in _walk("", block)
        if is_norm(module)
    ]
    if not sizes:
        raise ValueError("Expected blocks with a normalisation layer, which tells the hidden size, found none.")
    return max(sizes)


def active_experts(model: nn.Module) -> float:
    """Return the fraction of the fused experts that compute one token, by the model's configuration; 1 if unknown."""
    config = getattr(base_model(model), "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    counts = {whole_shape(getattr(module, parameter))[0] for module, parameter in fused_experts(model).values()}
    return chosen / counts.pop() if chosen and len(counts) == 1 else 1.0


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield `module` and all modules below it, with the names they have without adapters.

    Modules that adapters add are left out. Of a module in `modules_to_save`, the copy that runs is yielded.
    """
    if isinstance(module, ModulesToSaveWrapper) and not module.disable_adapters:
        module = active_copy(module)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    yield name, module
    for child_name, child in base_layer(module).named_children():
        yield from _walk(f"{name}.{child_name}" if name else child_name, child)


def _is_prunable(module: nn.Module) -> bool:
    return isinstance(base_layer(module), PRUNABLE_LAYERS)


def _holds_prunable(module: nn.Module) -> bool:
    return any(_is_prunable(below) for _, below in _walk("", module))


def _is_block(entry: nn.Module) -> bool:
    return _holds_prunable(entry) and not _is_prunable(entry)


def _blocks_below(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    entries = {f"{name}.{key}": child for key, child in module.named_children()}
    if isinstance(module, nn.ModuleList) and entries and all(map(_is_block, entries.values())):
        yield from entries.items()
        return
    for key, child in entries.items():
        yield from _blocks_below(key.removeprefix("."), child)


def _candidate_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """Return the layers that `targets` may choose: those inside the blocks, or all prunable layers for named ones."""
    if targets in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return dict(_layers_in_blocks(model))
    return {name: module for name, module in _walk("", base_model(model)) if _is_prunable(module)}


def _layers_in_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for block_name, block in find_blocks(model).items():
        routers: set[int] = set()
        for name, module in _walk(block_name, block):
            routers.update(map(id, _routers_of(module)))
            if _is_prunable(module) and id(module) not in routers:
                yield name, module


def _routers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the linear layers that stand beside experts and have one output, or one output per expert."""
    counts = {count for child in module.children() if (count := _expert_count(base_layer(child)))}
    for child in module.children():
        if counts and isinstance(base_layer(child), nn.Linear) and base_layer(child).out_features in counts | {1}:
            yield child


def _is_fused(module: nn.Module, parameter: nn.Parameter) -> bool:
    # Layers of torch itself hold no experts: the short convolutions of state-space models have 3-D weights too.
    shape = whole_shape(parameter)
    return len(shape) == 3 and 1 not in shape[1:] and not type(module).__module__.startswith("torch.nn")


def _expert_count(module: nn.Module) -> int:
    if isinstance(module, nn.ModuleList):
        same = len({type(child) for child in module}) == 1
        return len(module) if same and len(module) > 1 and all(map(_holds_prunable, module)) else 0
    fused = [whole_shape(p)[0] for p in module.parameters(recurse=False) if _is_fused(module, p)]
    return fused[0] if fused else 0


def matching_names(candidates: list[str], targets: Targets, excluded: Targets) -> list[str]:
    """Return the `candidates` that PEFT's rules choose. Raise ValueError if an entry of a list matches none."""
    selector = SimpleNamespace(
        target_modules=".*" if targets in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND) else targets,
        exclude_modules=excluded,
        target_parameters=None,
    )
    matches = {name: check_target_module_exists(selector, name) for name in candidates}
    chosen = [name for name, hit in matches.items() if hit and not isinstance(hit, _ExcludedModule)]
    if not candidates and targets in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        raise ValueError(
            "Expected a model with blocks (an nn.ModuleList whose entries hold linear layers), found none. Name the "
            "layers to prune with `target_modules`."
        )
    for kind, names in (("target_modules", targets), ("exclude_modules", excluded)):
        for wanted in names if isinstance(names, (list, set, tuple)) else ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name in candidates):
                raise ValueError(f"{wanted!r} in `{kind}` matches no prunable layer. {_examples(candidates)}")
    if not chosen:
        raise ValueError(
            f"`target_modules={targets!r}` with `exclude_modules={excluded!r}` leaves no layer to prune. "
            f"{_examples(candidates)}"
        )
    return chosen


def _examples(candidates: list[str]) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in candidates))[:8]
    return f"Prunable layers here end in {', '.join(endings)}." if endings else "This model has no prunable layer."
