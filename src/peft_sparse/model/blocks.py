"""What there is to know of model architectures: where the blocks are, which layers are prunable, which are norms.

Everything is read off the module tree, never off a model's name. Adapters are looked through: a name is the one the
layer had before PEFT wrapped it.
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
    """Return the model inside PEFT, DDP and `torch.compile` wrappers."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    while isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        model = model.model if isinstance(model, BaseTuner) else model.base_model
    return model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether `model` is an encoder-decoder, as its configuration says."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def base_layer(module: nn.Module) -> nn.Module:
    """Return the layer that holds the weight: the base layer of a PEFT tuner layer, else `module` itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def active_copy(wrapper: ModulesToSaveWrapper) -> nn.Module:
    """Return the copy that the active adapter trains in place of a module of `modules_to_save`, else that module."""
    copies = [wrapper.modules_to_save[name] for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return copies[0] if copies else wrapper.original_module


def called_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return what is called to run each layer, by the layer's id: the PEFT wrapper around it, or the layer itself."""
    called: dict[int, nn.Module] = {}
    for module in base_model(model).modules():
        called.setdefault(id(base_layer(module)), module)
    return called


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of `model` by name, in the order they are registered, which is the order they run.

    A block is an entry of an outermost `nn.ModuleList` whose every entry holds a prunable layer and is not one itself.
    """
    return dict(_blocks_below("", base_model(model)))


def prunable_layers(
    model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None
) -> dict[str, nn.Module]:
    """Return the modules whose weights are pruned, by name; a module wrapped by a PEFT tuner comes as the wrapper.

    By default every linear layer inside a block: never embeddings, output head, norms or MoE routers.

    Args:
        target_modules: as in PEFT: None or "all-linear" for the default, a list of names or name endings, or a regular
            expression for the whole name. Names may lie outside the blocks.
        exclude_modules: as in PEFT, a list of names or name endings, or a regular expression.

    Raises:
        ValueError: nothing matches, or a listed name matches nothing.
    """
    if target_modules is not None and target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        candidates = {name: module for name, module in _walk("", base_model(model)) if _is_prunable(module)}
    else:
        candidates = dict(_layers_in_blocks(model))
    return {name: candidates[name] for name in _matching(list(candidates), target_modules, exclude_modules)}


def prunable_weights(
    model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None
) -> dict[str, WeightView]:
    """Return the prunable weights as matrices, by name: those of `prunable_layers`, and every fused expert's.

    The experts of a block that are stored in one parameter (experts, ., .) come as one weight each, named
    `<parameter>.<expert>`. They are part of the default, and are matched by the parameter's name; "all-linear" leaves
    them out, as in PEFT.

    Args, Raises: as for `prunable_layers`.
    """
    experts = {} if target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND else fused_experts(model)
    if not experts:
        layers = prunable_layers(model, target_modules, exclude_modules)
        return {name: WeightView(base_layer(layer)) for name, layer in layers.items()}
    if target_modules is None:
        layers = dict(_layers_in_blocks(model))
    else:
        layers = {name: module for name, module in _walk("", base_model(model)) if _is_prunable(module)}
    names = _matching([*layers, *experts], target_modules, exclude_modules)
    weights = {}
    for name in names:
        if name in layers:
            weights[name] = WeightView(base_layer(layers[name]))
        else:
            module, parameter = experts[name]
            count = whole_shape(getattr(module, parameter))[0]
            weights |= {f"{name}.{expert}": WeightView(module, parameter, expert) for expert in range(count)}
    return weights


def fused_experts(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the parameters (experts, ., .) that hold the weights of all experts of a block: (module, parameter)."""
    return {
        f"{name}.{parameter}": (base_layer(module), parameter)
        for block_name, block in find_blocks(model).items()
        for name, module in _walk(block_name, block)
        for parameter, value in base_layer(module).named_parameters(recurse=False)
        if _is_fused(base_layer(module), value)
    }


def find_stacks(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the blocks of `model` by stack: one for a decoder, encoder and decoder apart, in the order they run."""
    stacks: dict[str, dict[str, nn.Module]] = {}
    for name, block in find_blocks(model).items():
        stacks.setdefault(name.rpartition(".")[0], {})[name] = block
    return list(stacks.values())


def block_of(name: str, blocks: dict[str, nn.Module]) -> str | None:
    """Return the name of the block that the layer or weight called `name` lies in, None outside all blocks."""
    while name and name not in blocks:
        name = name.rpartition(".")[0]
    return name or None


def tied_to_embedding(model: nn.Module, weights: dict[str, WeightView]) -> list[str]:
    """Return the names among `weights` that are also the weight of an `nn.Embedding`."""
    embeddings = {id(module.weight) for _, module in _walk("", base_model(model)) if isinstance(module, nn.Embedding)}
    return [name for name, weight in weights.items() if id(weight.storage) in embeddings]


def output_head(model: nn.Module) -> str | None:
    """Return the name of the output head, as transformers' `get_output_embeddings` tells, None if there is none."""
    model = base_model(model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def is_norm(module: nn.Module) -> bool:
    """Tell whether `module` is a normalisation layer: torch's own, or a leaf called ...Norm... with 1-D parameters."""
    if next(module.children(), None) is not None:
        return False
    parameters = dict(module.named_parameters(recurse=False))
    named_so = "norm" in type(module).__name__.lower() or isinstance(module, nn.modules.batchnorm._NormBase)
    return named_so and "weight" in parameters and all(p.dim() <= 1 for p in parameters.values())


def norm_names(model: nn.Module) -> list[str]:
    """Return the names of all normalisation layers of `model`, inside and outside the blocks."""
    return [name for name, module in _walk("", base_model(model)) if is_norm(module)]


def attention_and_mlp(block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the children of `block` that hold weights: those of its attention, and the others, which make its MLP.

    A child is attention if it is called so, or its class is; an MLP may be several children (OPT's two layers).
    """
    attention: list[nn.Module] = []
    mlp: list[nn.Module] = []
    for name, child in block.named_children():
        if any(_is_prunable(m) or any(p.dim() == 3 for p in m.parameters(recurse=False)) for m in child.modules()):
            called_so = re.search("attn|attention", f"{name} {type(child).__name__}", re.IGNORECASE)
            (attention if called_so else mlp).append(child)
    return attention, mlp


def hidden_size(model: nn.Module) -> int:
    """Return the width of the hidden states between blocks: that of the widest norm of the first block.

    Raises:
        ValueError: the blocks have no norm.
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
    """Return the share of fused experts that one token goes through, as the model's configuration tells; else 1."""
    config = getattr(base_model(model), "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    counts = {whole_shape(getattr(module, parameter))[0] for module, parameter in fused_experts(model).values()}
    return chosen / counts.pop() if chosen and len(counts) == 1 else 1.0


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield `module` and all below it with the names they had before PEFT; what adapters add is left out.

    Of a module that an adapter has a copy of, the one that runs.
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


def _layers_in_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for block_name, block in find_blocks(model).items():
        routers: set[int] = set()
        for name, module in _walk(block_name, block):
            routers.update(map(id, _routers_of(module)))
            if _is_prunable(module) and id(module) not in routers:
                yield name, module


def _routers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the linear layers beside a set of experts that have one output, or one output per expert."""
    counts = {count for child in module.children() if (count := _expert_count(base_layer(child)))}
    for child in module.children():
        if counts and isinstance(base_layer(child), nn.Linear) and base_layer(child).out_features in counts | {1}:
            yield child


def _is_fused(module: nn.Module, parameter: nn.Parameter) -> bool:
    # The layers of torch itself, such as the short convolutions of state-space models, hold no experts.
    shape = whole_shape(parameter)
    return len(shape) == 3 and 1 not in shape[1:] and not type(module).__module__.startswith("torch.nn")


def _expert_count(module: nn.Module) -> int:
    if isinstance(module, nn.ModuleList):
        same = len({type(child) for child in module}) == 1
        return len(module) if same and len(module) > 1 and all(map(_holds_prunable, module)) else 0
    fused = [whole_shape(p)[0] for p in module.parameters(recurse=False) if _is_fused(module, p)]
    return fused[0] if fused else 0


def _matching(candidates: list[str], targets: Targets, excluded: Targets) -> list[str]:
    """Return those of `candidates` that PEFT's rules choose, having checked that every name is of use."""
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
