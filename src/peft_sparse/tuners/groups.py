"""The parameters that PERP trains beside the adapters: norms, biases, output head.

Zimmer et al. 2023 (PERP), arXiv:2312.15230. `SparseLoraModel` calls `select_groups` before PEFT adds the adapters.
"""

from functools import partial

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..model.blocks import base_layer, base_model, norm_names, output_head, tied_to_embedding
from ..model.stacks import find_blocks
from ..model.tree import walk
from ..model.weights import WeightView
from .config import SparseLoraConfig


def select_groups(model: nn.Module, config: SparseLoraConfig) -> None:
    """Find the norms and the head that `train_norms` and `train_head` mean, and write their names into `config`.

    Norms are trained as a whole, so they are added to `modules_to_save`. A head is added there too if
    `train_head="full"`. If `train_head="adapter"`, it gets an adapter.

    Args:
        model: the base model.
        config: the configuration. It is changed in place.

    Raises:
        ValueError: `train_head` is not "none", and the model has neither an output head nor a classifier; the head
            shares its weight with the embedding; or `train_head` is "adapter", and `modules_to_save` has the head.
    """
    if config.train_norms:
        config.modules_to_save = sorted(set(config.modules_to_save or ()) | _norm_targets(model))
    config._heads = ()
    if config.train_head == "none":
        return
    names = _heads(model)
    if not names:
        raise ValueError(
            f"`train_head` needs a model with an output head or a classifier, and none was found in this "
            f'{type(base_model(model)).__name__}. Use `train_head="none"`, and name the head in `modules_to_save`.'
        )
    views = {name: WeightView(base_layer(base_model(model).get_submodule(name))) for name in names}
    for name in tied_to_embedding(model, views):
        raise ValueError(
            f"The output head {name!r} shares its weight with the embedding, so training it would change both. Load "
            'the model with `tie_word_embeddings=False` and copy the weight, or use `train_head="none"`.'
        )
    # For some values of `task_type`, PEFT has put the classifier there.
    whole = {name: field for name in names if (field := _trained_whole(name, config)) is not None}
    if config.train_head == "full":
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *(set(names) - whole.keys())})
        return
    for name, field in whole.items():
        raise ValueError(
            f"The output head {name!r} is trained as a whole, because `modules_to_save` has {field!r}. PEFT adds the "
            'classifier for `task_type="SEQ_CLS"` and similar tasks. Use `train_head="none"`, or another `task_type`.'
        )
    config._heads = names


def trainable_shares(model: nn.Module) -> dict[str, float]:
    """Return how many parameters are trainable in each group, as fractions of the base model's parameters.

    The tables of Zimmer et al. 2023 (PERP), arXiv:2312.15230, give these fractions in percent.

    Args:
        model: a model with adapters of any of PEFT's methods that adapt layers, or without adapters.

    Returns:
        The fractions of "adapters", "norms", "biases" and "other", and their sum "all". The bias of a norm counts in
        "norms". The base model's parameters are counted without adapters and without the copies that PEFT makes for
        `modules_to_save`.
    """
    counts = dict.fromkeys(("adapters", "norms", "biases", "other"), 0)
    norms = tuple(f"{name}." for name in norm_names(model))
    base = base_model(model)
    total = 0
    of_adapters = {
        id(parameter)
        for module in base.modules()
        if isinstance(module, BaseTunerLayer)
        for part in map(partial(getattr, module), module.adapter_layer_names)
        for parameter in (part.parameters() if isinstance(part, nn.Module) else ())
    }
    for name, parameter in base.named_parameters():
        adapter = id(parameter) in of_adapters
        copied = ".modules_to_save." in name
        total += 0 if adapter or copied else parameter.numel()
        if not parameter.requires_grad:
            continue
        if adapter:
            group = "adapters"
        elif name.replace(".modules_to_save", "").startswith(norms):
            group = "norms"
        else:
            group = "biases" if name.endswith("bias") else "other"
        counts[group] += parameter.numel()
    shares = {group: count / total for group, count in counts.items()}
    return shares | {"all": sum(shares.values())}


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Return the name of the output head. Without one, those of the layers that give one output for each label.

    These are linear layers outside of the blocks. Some models have two, such as DeiT.
    """
    name = output_head(model)
    if name is not None:
        return (name,)
    base = base_model(model)
    labels = getattr(getattr(base, "config", None), "num_labels", None)
    blocks = tuple(f"{block}." for block in find_blocks(base))
    return tuple(
        name
        for name, module in walk("", base)
        if isinstance(layer := base_layer(module), nn.Linear)
        and layer.out_features == labels
        and not name.startswith(blocks)
    )


def _trained_whole(name: str, config: SparseLoraConfig) -> str | None:
    """Return the entry of `modules_to_save` by which the module `name`, or one around it, is trained. None without."""
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    entries = config.modules_to_save or ()
    return next((entry for entry in entries if any(each.endswith(entry) for each in around)), None)


def _norm_targets(model: nn.Module) -> set[str]:
    """Return names for `modules_to_save` that match the norms of `model` and nothing else.

    PEFT compares the ends of names. The last parts of the norms' names are used, unless another name ends with one.
    """
    norms = norm_names(model)
    endings = {name.rpartition(".")[2] for name in norms}
    others = {name for name, _ in base_model(model).named_modules()} - set(norms)
    return set(norms) if any(name.endswith(tuple(endings)) for name in others) else endings
