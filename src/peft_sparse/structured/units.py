"""Where the attention heads and MLP neurons of a block are, and how to cut them out.

Read off the module tree: the one attention of a block with its query, key, value and output projections, and an MLP
whose last linear layer takes what all others give. What is built otherwise is refused.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..model.blocks import attention_and_mlp, base_model, find_blocks


Kind = Literal["attention", "mlp"]

# How attention modules call the numbers of their heads, where they keep them.
_HEADS = ("num_heads", "num_attention_heads")
_KV_HEADS = ("num_key_value_heads",)
_WIDTHS = ("embed_dim", "all_head_size")


@dataclass(frozen=True)
class Units:
    """What can be removed of one attention or one MLP: units that no other part of the block computes with.

    A unit is a neuron; or a KV group, one key and value head with all query heads that read it, since grouped-query
    attention computes with equally many query heads for each. Its parameters are consecutive rows of `rows`, with
    their biases, and consecutive columns of `output`, as many of each layer for every unit.

    Args:
        block: name of the block.
        name: of the attention, or of the MLP.
        kind: "attention" or "mlp".
        module: the attention module; for an MLP what holds its layers, the block itself where it has them directly.
        rows: the layers whose rows belong to units, by name; of an attention query, key and value, in this order.
        output_name, output: the layer whose columns belong to units.
        count: number of units.
        head_dim: rows of one head, 1 for an MLP.
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
        """Parameters of one unit, biases included."""
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
        """Query heads of one KV group, 1 for an MLP."""
        return self.output.in_features // (self.count * self.head_dim)

    def rows_of(self, layer: nn.Linear, kept: Tensor) -> Tensor:
        """Return which rows of `layer` remain if the units `kept` (count,) do, (out,)."""
        return kept.repeat_interleave(layer.out_features // self.count)

    def columns_of(self, kept: Tensor) -> Tensor:
        """Return which columns of the output layer remain if the units `kept` (count,) do, (in,)."""
        return kept.repeat_interleave(self.output.in_features // self.count)

    @torch.no_grad()
    def cut(self, kept: Tensor) -> None:
        """Keep the parameters of `kept`, (count, query heads of a unit), and no others. In place.

        Every unit that keeps a head must keep equally many. The model may be on the meta device, `kept` may not.
        """
        heads, units = kept.cpu().flatten(), kept.cpu().any(1)
        for index, layer in enumerate(self.layers):
            # Query heads come first, keys and values have one head per unit.
            own = heads if index == 0 else units
            _cut(layer, own.repeat_interleave(layer.out_features // own.numel()), None)
        _cut(self.output, None, heads.repeat_interleave(self.head_dim))
        if self.kind == "attention":
            count, groups = int(heads.sum()), int(units.sum())
            _set_existing(self.module, _WIDTHS, count * self.head_dim)
            _set_existing(self.module, _HEADS, count)
            _set_existing(self.module, _KV_HEADS, groups)
            _set_existing(self.module, ("num_key_value_groups",), count // groups)
        else:
            _set_existing(self.module, ("intermediate_size",), int(heads.sum()))


def find_units(model: nn.Module) -> list[Units]:
    """Return the attention and the MLP of every block, in this order.

    Raises:
        ValueError: no blocks; adapters; a block with experts, with fused projections, or otherwise built.
    """
    model = base_model(model)
    names = {id(module): name for name, module in model.named_modules()}
    if adapted := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise ValueError(
            f"Expected a model without adapters, but layer {adapted[0]!r} has one, and units are cut out of the layer "
            "below it. Call `merge_and_unload()` first, or attach the adapter afterwards."
        )
    found: list[Units] = []
    for block_name, block in find_blocks(model).items():
        attention, mlp = attention_and_mlp(block)
        if len(attention) != 1 or not mlp:
            raise _refusal(
                block_name, f"one attention and an MLP, got {len(attention)} attentions and {len(mlp)} other parts"
            )
        found.append(_heads(block_name, attention[0], names))
        found.append(_neurons(block_name, block, mlp, names))
    if not found:
        raise ValueError(
            "Expected a model with blocks (an nn.ModuleList whose entries hold linear layers), found none. Structured "
            "pruning removes heads and neurons of such blocks only."
        )
    return found


def check_loaded(units: list[Units]) -> None:
    """Raise ValueError unless all weights of `units` are loaded floating-point numbers."""
    for part in units:
        for name, layer in part.named_layers().items():
            if layer.weight.is_meta or not layer.weight.is_floating_point():
                raise ValueError(
                    f"The weight of {name!r} is {layer.weight.dtype} on {layer.weight.device}; structured pruning "
                    "needs loaded floating-point weights. Prune before quantising, and load the model before pruning."
                )


def _heads(block: str, attention: nn.Module, names: dict[int, str]) -> Units:
    name = names[id(attention)]
    linear = [module for module in attention.modules() if isinstance(module, nn.Linear)]
    roles = {names[id(layer)].rpartition(".")[2][0]: layer for layer in linear}
    query, key, value = (roles.pop(letter, None) for letter in "qkv")
    if len(linear) != 4 or query is None or key is None or value is None or len(roles) != 1:
        leaves = ", ".join(names[id(module)].rpartition(".")[2] for module in attention.modules() if _is_leaf(module))
        raise _refusal(name, f"separate query, key, value and output projections, got {leaves} (fused or unknown)")
    (output,) = roles.values()
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    if not head_dim or key.out_features % head_dim or query.out_features % key.out_features:
        raise _refusal(name, f"a `head_dim` that divides {key.out_features} key rows, got {head_dim}")
    if key.out_features != value.out_features or query.out_features != output.in_features:
        raise _refusal(name, "query rows for every output column, and value rows for every key row")
    known = {id(parameter) for layer in linear for parameter in layer.parameters()}
    other = [n for n, p in attention.named_parameters() if id(p) not in known and p.shape != (head_dim,)]
    if other or any(isinstance(module, nn.ModuleList) for module in attention.modules()):
        raise _refusal(name, f"nothing that acts across heads, got {(other or ['a list of modules'])[0]}")
    rows = {names[id(layer)]: layer for layer in (query, key, value)}
    count = key.out_features // head_dim
    return Units(block, name, "attention", attention, rows, names[id(output)], output, count, head_dim)


def _neurons(block_name: str, block: nn.Module, mlp: list[nn.Module], names: dict[int, str]) -> Units:
    module = mlp[0] if len(mlp) == 1 else block
    name = names[id(module)] if len(mlp) == 1 else f"{block_name}.mlp"
    inside = [below for part in mlp for below in part.modules()]
    parameters = [parameter for part in mlp for parameter in part.parameters()]
    if any(parameter.dim() > 2 for parameter in parameters) or any(isinstance(m, nn.ModuleList) for m in inside):
        raise _refusal(name, "a dense MLP, got experts")
    linear = [m for m in inside if isinstance(m, nn.Linear)]
    known = {id(parameter) for layer in linear for parameter in layer.parameters()}
    if len(linear) < 2 or any(id(parameter) not in known for parameter in parameters):
        raise _refusal(name, f"an MLP of nn.Linear layers alone, two at least, got {len(linear)} and other parameters")
    *rows, output = linear
    shape = (output.in_features, output.out_features)
    if any((layer.out_features, layer.in_features) != shape for layer in rows):
        given = ", ".join(str(layer.out_features) for layer in rows)
        raise _refusal(name, f"layers of {output.in_features} rows before the output layer, got {given} (fused?)")
    return Units(
        block_name,
        name,
        "mlp",
        module,
        {names[id(layer)]: layer for layer in rows},
        names[id(output)],
        output,
        output.in_features,
    )


def _refusal(name: str, expected: str) -> ValueError:
    return ValueError(
        f"Structured pruning cannot tell the units of {name!r}: expected {expected}. Use `prune` with a sparsity or "
        "n:m, which needs no units."
    )


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _cut(layer: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> None:
    weight = layer.weight
    for dim, kept in enumerate((rows, columns)):
        if kept is not None:
            weight = weight.index_select(dim, kept.nonzero().squeeze(1).to(weight.device))
    if rows is not None and layer.bias is not None:
        bias = layer.bias.index_select(0, rows.nonzero().squeeze(1).to(weight.device))
        layer.bias = nn.Parameter(bias, layer.bias.requires_grad)
    layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape


def _set_existing(module: nn.Module, names: tuple[str, ...], value: int) -> None:
    for name in names:
        if isinstance(module.__dict__.get(name), int):
            setattr(module, name, value)
