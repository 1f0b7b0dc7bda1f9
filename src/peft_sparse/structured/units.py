"""Finds the attention heads and MLP neurons of each block, and the rows and columns that belong to them.

They are found from the module tree. An attention must have separate query, key, value and output projections. An MLP
must consist of linear layers, of which the last reads what all the others produce. `find_units` refuses other
constructions, and `known_units` leaves them out.
"""

from dataclasses import dataclass
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..model.blocks import Targets, attention_and_mlp, base_model, find_blocks, holders, matching_names
from .cutting import Cuts


Kind = Literal["attention", "mlp"]

# The attributes in which attention modules store their sizes. Their names differ between families.
_HEADS = ("num_heads", "num_attention_heads")
_KV_HEADS = ("num_key_value_heads",)
_WIDTHS = ("embed_dim", "all_head_size")


@dataclass(frozen=True)
class Units:
    """The units of one attention or one MLP. A unit can be removed without changing what the other units compute.

    A unit of an MLP is one neuron. A unit of an attention is one KV group: a key head, its value head and all query
    heads that read them. Grouped-query attention needs equally many query heads for each key head, so single query
    heads are no units. The parameters of a unit are consecutive rows of each layer in `rows`, with their biases, and
    consecutive columns of `output`. Every unit has equally many of them.

    Args:
        block: name of the block.
        name: name of the attention or MLP.
        kind: "attention" or "mlp".
        module: the module that stores the sizes as attributes: the attention or a module inside it; for an MLP the
            module that holds its layers, which is the block itself where the block holds them directly.
        rows: the layers whose rows belong to units, by name; for an attention query, key and value, in this order.
        output_name: name of the layer whose columns belong to units.
        output: that layer, W (out, in).
        count: number of units.
        head_dim: rows of one head; 1 for an MLP.
    """

    block: str
    name: str
    kind: Kind
    module: nn.Module
    rows: dict[str, nn.Linear]
    output_name: str
    output: nn.Linear
    count: int
    head_dim: int = 1

    @property
    def cost(self) -> int:
        """Number of parameters of one unit, biases included."""
        rows = sum(layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel()) for layer in self.layers)
        return (rows + self.output.weight.numel()) // self.count

    @property
    def layers(self) -> list[nn.Linear]:
        """The layers of `rows`."""
        return list(self.rows.values())

    def named_layers(self) -> dict[str, nn.Linear]:
        """Return all layers by name, the output last."""
        return {**self.rows, self.output_name: self.output}

    @property
    def heads_per_unit(self) -> int:
        """Number of query heads of one KV group; 1 for an MLP."""
        return self.output.in_features // (self.count * self.head_dim)

    def rows_of(self, layer: nn.Linear, kept: Tensor) -> Tensor:
        """Return the mask (out,) of the rows of `layer` that belong to the units in the mask `kept` (count,)."""
        return kept.repeat_interleave(layer.out_features // self.count)

    def columns_of(self, kept: Tensor) -> Tensor:
        """Return the mask (in,) of the columns of `output` that belong to the units in the mask `kept` (count,)."""
        return kept.repeat_interleave(self.output.in_features // self.count)

    def cut(self, kept: Tensor, cuts: Cuts) -> None:
        """Cut out the parameters of all heads or neurons that are False in `kept`. In place.

        Args:
            kept: mask (count, heads_per_unit), True = kept. Units that keep any head must all keep equally many. The
                mask must hold values; the model may be on the meta device.
            cuts: what can put them back.
        """
        heads, units = kept.cpu().flatten(), kept.cpu().any(1)
        for index, layer in enumerate(self.layers):
            # The first layer is the query, which has `heads_per_unit` heads per unit; keys and values have one.
            own = heads if index == 0 else units
            cuts.cut(layer, 0, own.repeat_interleave(layer.out_features // own.numel()))
        cuts.cut(self.output, 1, heads.repeat_interleave(self.head_dim))
        if self.kind == "attention":
            count, groups = int(heads.sum()), int(units.sum())
            sizes = dict.fromkeys(_WIDTHS, count * self.head_dim) | dict.fromkeys(_HEADS, count)
            sizes |= dict.fromkeys(_KV_HEADS, groups) | {"num_key_value_groups": count // groups}
        else:
            sizes = {"intermediate_size": int(heads.sum())}
        cuts.set_existing(self.module, sizes)


def find_units(model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None) -> list[Units]:
    """Return the units of the chosen attentions and MLPs, block by block, the attention first.

    An attention or MLP is chosen if its own name or the name of one of its linear layers matches `target_modules`, and
    none of these names matches `exclude_modules`.

    Args:
        model: a model without adapters.
        target_modules: None or "all-linear" for all of them, a list of names or name endings, or a regular expression
            for the whole name.
        exclude_modules: a list of names or name endings, or a regular expression for the whole name.

    Raises:
        ValueError: the model has no blocks or has adapters; a listed name matches nothing; nothing is chosen; the
            heads or neurons of a chosen attention or MLP cannot be found.
    """
    parts = _parts(model)
    candidates = [name for part in parts for name in part.own] + [name for part in parts for name in part.layers]
    targeted = set(matching_names(candidates, target_modules, None))
    allowed = set(matching_names(candidates, None, exclude_modules))
    chosen = [part for part in parts if targeted & part.names and part.names <= allowed]
    if not chosen:
        raise ValueError(
            f"`target_modules={target_modules!r}` with `exclude_modules={exclude_modules!r}` leaves no attention and "
            "no MLP to prune. An attention or MLP is left out if `exclude_modules` matches its own name or the name "
            "of one of its layers. Change one of the two arguments."
        )
    for part in chosen:
        if isinstance(part.units, str):
            raise ValueError(
                f"{part.units} Leave it out with `exclude_modules`, or call `prune` with a sparsity or n:m, which "
                "needs no heads or neurons."
            )
    return [part.units for part in chosen if isinstance(part.units, Units)]


def known_units(model: nn.Module) -> list[Units]:
    """Return the units of every attention and MLP whose heads or neurons can be found, and leave out the others.

    Raises:
        ValueError: the model has no blocks or has adapters; no heads and no neurons can be found.
    """
    found = units_or_none(model)
    if not found:
        raise ValueError(f"{_parts(model)[0].units} This model has none that can be cut out.")
    return found


def units_or_none(model: nn.Module) -> list[Units]:
    """Return what `known_units` does, and an empty list where no heads and no neurons can be found.

    Convolutional networks may have no blocks that could hold any.
    """
    return [part.units for part in _parts(model) if isinstance(part.units, Units)] if find_blocks(model) else []


def check_loaded(units: list[Units]) -> None:
    """Raise ValueError unless all weights of `units` are loaded floating-point numbers."""
    for part in units:
        for name, layer in part.named_layers().items():
            if layer.weight.is_meta or not layer.weight.is_floating_point():
                raise ValueError(
                    f"Structured pruning needs loaded floating-point weights, and the weight of {name!r} is "
                    f"{layer.weight.dtype} on {layer.weight.device}. Load the model before pruning it, and prune it "
                    "before quantising it."
                )


@dataclass(frozen=True)
class _Part:
    """The names by which an attention or MLP is chosen, and its units or the reason why it has none."""

    own: tuple[str, ...]
    layers: tuple[str, ...]
    units: Units | str

    @property
    def names(self) -> set[str]:
        return {*self.own, *self.layers}


def _parts(model: nn.Module) -> list[_Part]:
    model = base_model(model)
    names = {id(module): name for name, module in model.named_modules()}
    if adapted := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise ValueError(
            f"Expected a model without adapters, but layer {adapted[0]!r} has an adapter, which would not fit its "
            "base layer after heads or neurons are cut out. Call `merge_and_unload()` first, or attach the adapter "
            "afterwards."
        )

    def layers(modules: list[nn.Module]) -> tuple[str, ...]:
        return tuple(names[id(m)] for part in modules for m in part.modules() if isinstance(m, nn.Linear))

    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    blocks = find_blocks(model)
    held = holders(blocks)
    parts: list[_Part] = []
    for block_name, block in blocks.items():
        attention, mlp = attention_and_mlp(block)
        if len(attention) != 1 or not mlp:
            children = tuple(names[id(child)] for child in (*attention, *mlp))
            expected = f"one attention and an MLP, got {len(attention)} attentions and {len(mlp)} other parts"
            parts.append(_Part(children, layers([block]), _reason(block_name, expected)))
            continue
        mlp_name = names[id(mlp[0])] if len(mlp) == 1 else f"{block_name}.mlp"
        heads = _of_its_own(_heads(block_name, attention[0], names), users, held)
        parts.append(_Part((names[id(attention[0])],), layers(attention), heads))
        neurons = _neurons(block_name, mlp_name, mlp[0] if len(mlp) == 1 else block, mlp, names)
        neurons = _of_its_own(neurons, users, held)
        parts.append(_Part((mlp_name,), layers(mlp), neurons))
    if not parts:
        raise ValueError(
            "Expected a model with blocks (an nn.ModuleList whose entries hold linear layers), found none. Structured "
            "pruning removes heads and neurons of such blocks only."
        )
    return parts


def _heads(block: str, attention: nn.Module, names: dict[int, str]) -> Units | str:
    name = names[id(attention)]
    linear = [module for module in attention.modules() if isinstance(module, nn.Linear)]
    roles = {names[id(layer)].rpartition(".")[2][0]: layer for layer in linear}
    query, key, value = (roles.pop(letter, None) for letter in "qkv")
    if len(linear) != 4 or query is None or key is None or value is None or len(roles) != 1:
        leaves = ", ".join(names[id(module)].rpartition(".")[2] for module in attention.modules() if _is_leaf(module))
        return _reason(name, f"separate query, key, value and output projections, got {leaves} (fused or unknown)")
    (output,) = roles.values()
    sized, head_dim = _head_dim(attention)
    if not head_dim or key.out_features % head_dim or query.out_features % key.out_features:
        return _reason(name, f"a `head_dim` that divides {key.out_features} key rows, got {head_dim}")
    if key.out_features != value.out_features or query.out_features != output.in_features:
        given = f"{query.out_features}, {output.in_features}, {key.out_features} and {value.out_features}"
        return _reason(name, f"as many query rows as output columns, and as many key rows as value rows, got {given}")
    unknown = _in_the_way([attention], [query, key, value], output, names, head_dim)
    if unknown or any(isinstance(module, nn.ModuleList) for module in attention.modules()):
        what = unknown or "a list of modules"
        return _reason(
            name, f"no parameters except projections, norms of single heads and norms of the output, got {what}"
        )
    rows = {names[id(layer)]: layer for layer in (query, key, value)}
    count = key.out_features // head_dim
    return Units(block, name, "attention", sized, rows, names[id(output)], output, count, head_dim)


def _neurons(block: str, name: str, module: nn.Module, mlp: list[nn.Module], names: dict[int, str]) -> Units | str:
    inside = [below for part in mlp for below in part.modules()]
    parameters = [parameter for part in mlp for parameter in part.parameters()]
    if any(parameter.dim() > 2 for parameter in parameters) or any(isinstance(m, nn.ModuleList) for m in inside):
        return _reason(name, "a dense MLP, got experts")
    linear = [m for m in inside if isinstance(m, nn.Linear)]
    unknown = _in_the_way(mlp, linear[:-1], linear[-1], names) if linear else None
    if unknown:
        return _reason(name, f"an MLP of nn.Linear layers, with norms after its output at most, got {unknown}")
    if len(linear) < 2:
        return _reason(name, f"an MLP of at least two nn.Linear layers, got {len(linear)} of these layers")
    *rows, output = linear
    shape = (output.in_features, output.out_features)
    if any((layer.out_features, layer.in_features) != shape for layer in rows):
        given = ", ".join(str(layer.out_features) for layer in rows)
        return _reason(name, f"layers of {output.in_features} rows before the output layer, got {given} (fused?)")
    above = {names[id(layer)]: layer for layer in rows}
    return Units(block, name, "mlp", module, above, names[id(output)], output, output.in_features)


def _head_dim(attention: nn.Module) -> tuple[nn.Module, int | None]:
    """Return the module of an attention that stores its sizes, and the rows of one head."""
    for module in attention.modules():
        for name in ("head_dim", "attention_head_size"):
            if isinstance(size := getattr(module, name, None), int) and size:
                return module, size
    return attention, None


def _in_the_way(
    parts: list[nn.Module],
    rows: list[nn.Linear],
    output: nn.Linear,
    names: dict[int, str],
    head_dim: int | None = None,
) -> str | None:
    """Return the name and the class of a parameter of `parts` that may have entries for single heads or neurons.

    The projections have such entries. The norms of single heads have none. Nor have those parameters that are as wide
    as the output and lie outside of the modules that hold `rows`: they belong to norms before or after.
    """
    known = {id(parameter) for layer in (*rows, output) for parameter in layer.parameters()}
    holders = tuple(f"{names[id(layer)].rpartition('.')[0]}." for layer in rows)
    for module in (below for part in parts for below in part.modules()):
        name = f"{names[id(module)]}."
        for leaf, parameter in module.named_parameters(recurse=False):
            # Parameters of the attention itself, such as sinks, would have to be cut, and their shape does not tell:
            # there may be as many heads as a head has entries.
            width = output.out_features if not name.startswith(holders) else None if name in holders else head_dim
            if id(parameter) not in known and parameter.shape != (width,):
                return f"{name}{leaf} of {type(module).__name__}"
    return None


def _of_its_own(units: Units | str, users: dict[int, list[str]], held: dict[int, list[str]]) -> Units | str:
    """Return `units`, or the reason why they cannot be removed if another layer or block has one of their weights."""
    if isinstance(units, str):
        return units
    for name, layer in units.named_layers().items():
        others = [user for parameter in layer.parameters() for user in users[id(parameter)] if user != name]
        others += [block for block in held[id(layer)] if block != units.block]
        if others:
            return _reason(
                units.name, f"weights that no other layer has, got that of {name!r}, which {others[0]!r} has too"
            )
    return units


def _reason(name: str, expected: str) -> str:
    return f"Structured pruning cannot find the heads or neurons of {name!r}: expected {expected}."


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None
