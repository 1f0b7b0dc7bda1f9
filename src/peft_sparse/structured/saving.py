"""Makes `save_pretrained` and `from_pretrained` work for models with changed widths or additional biases.

First the configuration of the model's own family is tried. A model is built from it on the meta device, and its shapes
are compared with those of the pruned model. If no configuration of the family gives these shapes, the classes of the
configuration and the model become subclasses that store the width of every layer. They are registered with
Transformers by its public `AutoConfig.register` and `AutoModel.register`.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..model.blocks import find_blocks
from .cutting import Cuts
from .experts import Experts, known_experts
from .filter_cutting import has_convolutions
from .filter_saving import narrow_layers, width_changes, widths_beside
from .novices import ExpertsAndNovices, install
from .units import Units, units_or_none


# Transformers has a `per_layer_config`, but none of the families that are pruned here builds its layers from it.
MODEL_TYPE = "peft_sparse_compact"

# The names that families use for the width of their MLP, and for the switches of biases in attention and MLP.
_NEURONS = ("intermediate_size", "ffn_dim", "n_inner")
_SWITCHES = ("attention_bias", "mlp_bias")
_AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}
# Maps each configuration or model class of a family to its compact subclass. Entries are made on first use.
_CLASSES: dict[Any, Any] = {}


class CompactConfig(PreTrainedConfig):
    """The entry point by which Transformers reads the configuration of a compact model.

    The JSON holds the fields of the model's family and two more:
        dense_model_type: `model_type` of the family.
        layer_widths: one dict per block. "heads", "key_value_heads" and "neurons" are numbers. "biases" lists the
            layers of the block that have a bias which the family would not give them. "experts" maps the name of each
            mixture of experts to its number of experts, and "novices" to the shape of the constants that took the
            place of other experts.
    It may have a third:
        filter_widths: the sizes of each convolution, linear layer and normalisation that lost channels with filters,
            by name, such as {"out_channels": 12}.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration, in a subclass of its family's class, and register the model classes.

        Raises:
            ValueError: `dense_model_type` is missing or unknown to the installed Transformers.
        """
        family = config_dict.get("dense_model_type")
        if family not in transformers.CONFIG_MAPPING:
            raise ValueError(
                f"Expected `dense_model_type` to be a model type of Transformers, got {family!r}. Restore the "
                "config.json that `save_pretrained` wrote, or upgrade Transformers."
            )
        dense = type(AutoConfig.for_model(family))
        return compact_config_class(dense).from_dict(config_dict, **kwargs)


def compact_config_class(dense: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the compact subclass of a family's configuration class, and register its model classes."""
    if dense in _CLASSES:
        return _CLASSES[dense]
    config = _CLASSES[dense] = type(
        f"Compact{dense.__name__}", (dense,), {"model_type": MODEL_TYPE, "__module__": __name__}
    )
    for auto, mapping in _AUTO_CLASSES.items():
        model = getattr(transformers, mapping).get(dense, None)
        # A model class that several configurations share belongs to the one that it names.
        if isinstance(model, type) and getattr(model, "config_class", None) is dense:
            getattr(transformers, auto).register(config, _model_class(model, config))
    return config


def compact_model_class(dense: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the compact subclass of a family's model class, which builds every layer with its stored width."""
    return _model_class(dense, compact_config_class(dense.config_class))


def _model_class(dense: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    if dense in _CLASSES:
        return _CLASSES[dense]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        dense.__init__(self, config, *args, **kwargs)
        _narrow(self, config.layer_widths)
        narrow_layers(self, getattr(config, "filter_widths", {}))

    namespace = {"__init__": __init__, "config_class": config_class, "dense_class": dense, "__module__": __name__}
    _CLASSES[dense] = type(f"Compact{dense.__name__}", (dense,), namespace)
    return _CLASSES[dense]


def __getattr__(name: str) -> Any:
    """Return the compact class with this name. Pickle finds the class of a model in this way.

    Raises:
        AttributeError: the name is not "Compact" followed by the name of a configuration or model class of
            Transformers.
    """
    dense = getattr(transformers, name.removeprefix("Compact"), None) if name.startswith("Compact") else None
    if isinstance(dense, type) and issubclass(dense, PreTrainedConfig):
        return compact_config_class(dense)
    if isinstance(dense, type) and issubclass(dense, PreTrainedModel):
        return compact_model_class(dense)
    raise AttributeError(
        f"Expected a name of this module or Compact<class of Transformers>, got {name!r}. Upgrade Transformers if the "
        "class was added later."
    )


def make_savable(model: PreTrainedModel) -> None:
    """Change the configuration and class of `model` so that `from_pretrained` builds its shapes. In place.

    Where a family has biases in all layers of an attention or MLP or in none, the missing ones are added as zeros.
    """
    dense: type[PreTrainedModel] = getattr(type(model), "dense_class", type(model))
    units, experts = units_or_none(model), known_experts(model)
    for changes in _candidates(model, dense, units, experts):
        if _builds(dense, model, changes):
            _become_plain(model, dense, changes)
            return
    config = _own_config(model)
    if type(model) is dense:
        config.dense_model_type = config.model_type
        config.__class__ = compact_config_class(type(config))
        # A configuration that was loaded holds the type of its family beside that of its class.
        config.__dict__.pop("model_type", None)
        model.__class__ = compact_model_class(dense)
        # The files of some families have one tensor per expert. Those of a compact model are as the model itself.
        model.__dict__.pop("_weight_conversions", None)
    config.layer_widths = _widths(model, dense, units, experts)
    config.__dict__.pop("filter_widths", None)
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(config))
    if widths := widths_beside(model, built):
        config.filter_widths = widths


@contextlib.contextmanager
def put_back_unless_finished(model: PreTrainedModel) -> Iterator[None]:
    """Put back what `make_savable` changed within the context, if the context ends with an error."""
    kind, conversions = type(model), model.__dict__.get("_weight_conversions")
    configs = [(module, module.__dict__["config"]) for module in model.modules() if "config" in module.__dict__]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.bias is None]
    try:
        yield
    except BaseException:
        model.__class__ = kind
        if conversions is not None:
            cast(Any, model)._weight_conversions = conversions
        for module, config in configs:
            cast(Any, module).config = config
        for layer in layers:
            layer.bias = None
        raise


def _own_config(model: PreTrainedModel) -> Any:
    """Give all modules of `model` a copy of its configuration, and return it. Other models may share the original."""
    shared, own = model.config, copy.deepcopy(model.config)
    copies = {id(shared): own}
    # Parts of a model that takes images too have configurations of their own inside of its configuration.
    copies |= {id(part): getattr(own, name) for name, part in _parts_of(shared).items()}
    for module in model.modules():
        if (mine := copies.get(id(module.__dict__.get("config")))) is not None:
            cast(Any, module).config = mine
    return own


def _parts_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """Return the configurations inside `config`, by name."""
    return {name: part for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}


def _candidates(
    model: PreTrainedModel, dense: type[PreTrainedModel], units: list[Units], experts: list[Experts]
) -> list[dict[str, Any]]:
    """Return changes to the configuration that may describe the model, those with the fewest changes first."""
    config = model.config
    heads = {(u.count * u.heads_per_unit, u.count, u.head_dim) for u in units if u.kind == "attention"}
    neurons = {u.count for u in units if u.kind == "mlp"}
    if len(heads) > 1 or len(neurons) > 1:
        return []
    widths: dict[str, int] = {}
    for query, key_value, _ in heads:
        widths |= {"num_attention_heads": query, "num_key_value_heads": key_value}
    for width in neurons:
        widths |= dict.fromkeys(_NEURONS, width)
    changes = {name: value for name, value in widths.items() if getattr(config, name, None) not in (None, value)}
    if {"num_attention_heads", "num_key_value_heads"} & set(changes):
        changes["head_dim"] = next(head_dim for _, _, head_dim in heads)
    changes = {config.attribute_map.get(name, name): value for name, value in changes.items()}
    if has_convolutions(model):
        with torch.device("meta"):
            changes |= width_changes(config, model, dense(_dense_config(model, {})))
    switches = [name for name in _SWITCHES if getattr(config, name, None) is False]
    subsets = [[], *[[name] for name in switches], switches] if len(switches) > 1 else [[], switches]
    counts = _expert_counts(config, experts)
    return [changes | count | dict.fromkeys(subset, True) for count in counts for subset in subsets]


def _expert_counts(config: PreTrainedConfig, experts: list[Experts]) -> list[dict[str, Any]]:
    """Return changes of the one number of the configuration that may be that of experts, the first of them none.

    The name of a number in a configuration inside of `config` is that of both, with a dot between.
    """
    counts = {mixture.count for mixture in experts}
    if len(counts) != 1:
        return [{}]
    (count,) = counts
    names = [
        f"{inside}{name}"
        for inside, part in {"": config, **{f"{name}.": part for name, part in _parts_of(config).items()}}.items()
        for name, value in part.to_dict().items()
        if type(value) is int and value > count and "expert" in name.lower()
    ]
    return [{}, *[{name: count} for name in names]]


def _builds(dense: type[PreTrainedModel], model: PreTrainedModel, changes: dict[str, Any]) -> bool:
    """Return whether the family builds the shapes of `model` under `changes`. It may build more biases."""
    try:
        config = _dense_config(model, changes)
        with torch.device("meta"):
            built = dense(config)
    except Exception:
        # Some families refuse values, in many ways: Llama's refuses heads that do not divide the hidden size.
        return False
    wanted, found = _shapes(model), _shapes(built)
    return all(found.get(name) == shape for name, shape in wanted.items()) and all(
        name in wanted or name.endswith(".bias") for name in found
    )


def _dense_config(model: PreTrainedModel, changes: dict[str, Any]) -> PreTrainedConfig:
    """Return a copy of the configuration with `changes`, in the configuration class of the family."""
    values = model.config.to_dict()
    for name, value in changes.items():
        part, _, leaf = name.rpartition(".")
        (values[part] if part else values)[leaf] = value
    dense: type[PreTrainedConfig] = getattr(type(model), "dense_class", type(model)).config_class
    for name in ("model_type", "layer_widths", "filter_widths", "dense_model_type"):
        values.pop(name, None)
    return dense.from_dict(values)


def _become_plain(model: PreTrainedModel, dense: type[PreTrainedModel], changes: dict[str, Any]) -> None:
    config = _own_config(model)
    if type(model) is not dense:
        model.__class__ = dense
        config.__class__ = dense.config_class
        config.__dict__.pop("model_type", None)
        del config.layer_widths, config.dense_model_type
        config.__dict__.pop("filter_widths", None)
    for name, value in changes.items():
        part, _, leaf = name.rpartition(".")
        setattr(getattr(config, part) if part else config, leaf, value)
    if any(name in _SWITCHES for name in changes):
        for units in units_or_none(model):
            for layer in units.named_layers().values():
                wanted = changes.get("attention_bias" if units.kind == "attention" else "mlp_bias", False)
                if wanted and layer.bias is None:
                    _add_bias(layer)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in (*model.state_dict().items(), *model.named_buffers())}


def _widths(
    model: PreTrainedModel, dense: type[PreTrainedModel], units: list[Units], experts: list[Experts]
) -> list[dict[str, Any]]:
    """Return the entry of `layer_widths` of every block."""
    with torch.device("meta"):
        built = set(dense(_dense_config(model, {})).state_dict())
    widths: dict[str, dict[str, Any]] = {block: {"biases": []} for block in find_blocks(model)}
    for part in units:
        entry = widths[part.block]
        if part.kind == "attention":
            entry |= {"heads": part.count * part.heads_per_unit, "key_value_heads": part.count}
        else:
            entry["neurons"] = part.count
        for name, layer in part.named_layers().items():
            if layer.bias is not None and f"{name}.bias" not in built:
                entry["biases"].append(name.removeprefix(f"{part.block}."))
    for mixture in experts:
        inside = mixture.name.removeprefix(f"{mixture.block}.")
        widths[mixture.block].setdefault("experts", {})[inside] = mixture.count
    for block, module in find_blocks(model).items():
        for name, part in module.named_modules():
            if isinstance(part, ExpertsAndNovices):
                widths[block].setdefault("novices", {})[name] = list(part.novices.shape)
    return list(widths.values())


def _narrow(model: PreTrainedModel, widths: list[dict[str, Any]]) -> None:
    """Give the layers of a newly built model of the family the stored widths and biases. Loading writes the values."""
    blocks = find_blocks(model)
    entries = dict(zip(blocks, widths, strict=True))
    for units in units_or_none(model):
        entry = entries[units.block]
        # On the CPU: while a checkpoint is loaded the weights are on the meta device, and the mask needs values.
        kept = torch.zeros(units.count, units.heads_per_unit, dtype=torch.bool, device="cpu")
        if units.kind == "attention":
            heads, groups = entry.get("heads", kept.numel()), entry.get("key_value_heads", units.count)
            kept[:groups, : heads // groups] = True
        else:
            kept[: entry.get("neurons", units.count)] = True
        if not kept.all():
            units.cut(kept, Cuts())
    for mixture in known_experts(model):
        _narrow_experts(mixture, entries[mixture.block])
    for name, block in blocks.items():
        for layer in entries[name]["biases"]:
            _add_bias(cast(nn.Linear, block.get_submodule(layer)))


def _narrow_experts(experts: Experts, entry: dict[str, Any]) -> None:
    inside = experts.name.removeprefix(f"{experts.block}.")
    removed, hidden = entry.get("novices", {}).get(inside, (0, 0))
    left = experts.count - removed if removed else entry.get("experts", {}).get(inside, experts.count)
    kept = torch.arange(experts.count, device="cpu") < left
    if removed:
        weight = next(experts.module.parameters())
        install(experts, kept, weight.new_zeros(removed, hidden), Cuts())
    elif left < experts.count:
        experts.cut(kept, Cuts())


def _add_bias(layer: nn.Linear) -> None:
    weight = layer.weight
    layer.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), weight.requires_grad)


AutoConfig.register(MODEL_TYPE, CompactConfig)
