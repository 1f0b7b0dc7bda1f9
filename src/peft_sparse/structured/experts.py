"""Finds the experts of mixtures that can be removed, and cuts them out together with their entries in the router.

They are found from the module tree. Experts must be stored in parameters with one matrix per expert, in one module,
beside a router with one output per expert. `find_experts` refuses other constructions, and `known_experts` leaves
them out. Whether a model also uses them as expected is shown by `routing`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..model.blocks import Targets, base_model, find_blocks, matching_names
from ..model.experts import Fused, find_mixtures
from .cutting import Cuts


# A tensor with an entry for each expert: the module that holds it, its name there, the dimension of the experts.
Place = tuple[nn.Module, str, int]


@dataclass(frozen=True)
class Experts:
    """The experts of one mixture.

    Args:
        block: name of the block.
        name: name of `module`.
        module: the module that holds the weights of all experts.
        around: the module that holds `module`, with its name.
        routers: the modules that choose among the experts, by name.
        weights: the parameters that hold one matrix per expert, by name.
        count: number of experts.
    """

    block: str
    name: str
    module: nn.Module
    around: tuple[str, nn.Module]
    routers: dict[str, nn.Module]
    weights: dict[str, Fused]
    count: int

    @property
    def output(self) -> nn.Module:
        """The module whose call shows that an input reaches the experts."""
        return self.module

    @property
    def label(self) -> str:
        """The name in reports: that of the MLP, or that of the experts where the block holds them itself."""
        return self.name if self.around[0] == self.block else self.around[0]

    @property
    def names(self) -> set[str]:
        """The names by which these experts are chosen."""
        return {self.name, self.around[0], *self.routers, *self.weights}

    @property
    def groups(self) -> int:
        """Number of groups of experts that the router chooses among before it chooses experts; 1 if it does not."""
        found = {
            value
            for module in (*self.routers.values(), self.around[1])
            for key, value in vars(module).items()
            if type(value) is int and 1 < value < self.count and re.search("group", key) and "top" not in key
        }
        return next((value for value in sorted(found) if self.count % value == 0), 1)

    def own(self) -> list[Place]:
        """Return the tensors of the experts themselves."""
        return list(_with_entries([self.module], self.count))

    def chosen_by(self) -> list[Place]:
        """Return the tensors of the router: its rows, and biases that take part in the choice."""
        modules = [below for router in self.routers.values() for below in router.modules()]
        return list(_with_entries([*modules, self.around[1]], self.count))

    def cost(self, with_router: bool) -> int:
        """Return the number of parameters of one expert, with or without its entries in the router."""
        places = self.own() + (self.chosen_by() if with_router else [])
        tensors = [getattr(module, name) for module, name, _ in places]
        return sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter)) // self.count

    def cut(self, kept: Tensor, cuts: Cuts, *, with_router: bool = True) -> None:
        """Cut out the experts that are False in `kept` (count,), and their entries in the router. In place."""
        places = self.own() + (self.chosen_by() if with_router else [])
        for module, name, dim in places:
            cuts.cut_tensor(module, name, dim, kept)
        modules = [self.module]
        if with_router:
            routers = [below for router in self.routers.values() for below in router.modules()]
            modules += [*routers, self.around[1]]
            for module in routers:
                if isinstance(module, nn.Linear) and module.out_features == self.count:
                    cuts.set_existing(module, {"out_features": int(kept.sum())})
        for module in modules:
            set_count(module, self.count, int(kept.sum()), cuts)


def set_count(module: nn.Module, before: int, after: int, cuts: Cuts) -> None:
    """Change the attributes of `module` that say that there are `before` experts."""
    cuts.set_existing(module, dict.fromkeys(_counting(module, before), after))


def _counting(module: nn.Module, count: int) -> list[str]:
    # The number of experts that a token is sent to is smaller wherever an expert can be removed.
    names = [key for key, value in vars(module).items() if type(value) is int and value == count]
    return [name for name in names if "expert" in name.lower() and not re.search("shared|per_tok", name)]


def find_experts(model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None) -> list[Experts]:
    """Return the chosen mixtures of experts, block by block.

    Args:
        model: a model without adapters.
        target_modules: None or "all-linear" for all of them, a list of names or name endings, or a regular expression
            for the whole name: that of the MLP, of the module of its experts, of the router or of a parameter.
        exclude_modules: a list of names or name endings, or a regular expression for the whole name.

    Raises:
        ValueError: the model has no blocks, no experts or has adapters; a listed name matches nothing; nothing is
            chosen; experts of a chosen mixture cannot be removed.
    """
    parts = _parts(model)
    if not parts:
        raise ValueError(
            'Expected a model with experts for `metric="reap"`, got one without. Use another metric, which removes '
            "heads and neurons."
        )
    candidates = [name for part in parts for name in sorted(part.names)]
    targeted = set(matching_names(candidates, target_modules, None))
    allowed = set(matching_names(candidates, None, exclude_modules))
    chosen = [part for part in parts if targeted & part.names and part.names <= allowed]
    if not chosen:
        raise ValueError(
            f"`target_modules={target_modules!r}` with `exclude_modules={exclude_modules!r}` leaves no experts to "
            "remove. Experts are left out if `exclude_modules` matches the name of their MLP, of their router or of "
            "one of their parameters. Change one of the two arguments."
        )
    for part in chosen:
        if isinstance(part, _Unknown):
            raise ValueError(
                f"The experts of {part.name!r} cannot be removed: expected {part.expected}. Leave them out with "
                "`exclude_modules`, or call `prune`, which writes zeros into each expert."
            )
    return [part for part in chosen if isinstance(part, Experts)]


def known_experts(model: nn.Module) -> list[Experts]:
    """Return the mixtures whose experts can be cut out by what the module tree tells, and leave out the others."""
    return [part for part in _parts(model) if isinstance(part, Experts)]


def check_experts(sets: list[Experts]) -> None:
    """Raise ValueError unless all tensors of `sets` are loaded, and those of experts floating-point numbers."""
    for experts in sets:
        for module, name, _ in (*experts.own(), *experts.chosen_by()):
            tensor: Tensor = getattr(module, name)
            if tensor.is_meta or not (tensor.is_floating_point() or module is not experts.module):
                raise ValueError(
                    f"Removing experts needs loaded floating-point weights, and {name!r} of {experts.name!r} is "
                    f"{tensor.dtype} on {tensor.device}. Load the model before pruning it, and prune it before "
                    "quantising it."
                )


@dataclass(frozen=True)
class _Unknown:
    """Experts that cannot be removed, and what would have been needed."""

    name: str
    names: set[str]
    expected: str


def _parts(model: nn.Module) -> list[Experts | _Unknown]:
    inner = base_model(model)
    names = {id(module): name for name, module in inner.named_modules()}
    if adapted := [name for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise ValueError(
            f"Expected a model without adapters, but layer {adapted[0]!r} has an adapter, which would not fit its "
            "base layer after experts are cut out. Call `merge_and_unload()` first, or attach the adapter afterwards."
        )
    users: dict[int, set[str]] = {}
    for name, module in inner.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            users.setdefault(id(tensor), set()).add(name)
    parts: list[Experts | _Unknown] = []
    for block_name, block in find_blocks(inner).items():
        found = find_mixtures(block_name, block)
        fused: dict[str, dict[str, Fused]] = {}
        for key, weight in found.fused.items():
            fused.setdefault(names[id(weight.module)], {})[key] = weight
        parents = {id(child): module for module in block.modules() for child in module.children()}
        for name, weights in fused.items():
            around, routers = _surroundings(next(iter(weights.values())).module, parents, found.routers)
            routers_by_name = {names[id(router)]: router for router in routers}
            parts.append(_checked(block_name, name, (names[id(around)], around), routers_by_name, weights, users))
        parts += _listed(block, found.experts - {id(weight.module) for weight in found.fused.values()}, names)
    return parts


def _checked(
    block: str,
    name: str,
    around: tuple[str, nn.Module],
    routers: dict[str, nn.Module],
    weights: dict[str, Fused],
    users: dict[int, set[str]],
) -> Experts | _Unknown:
    """Return the experts, or the reason why they cannot be removed."""
    module = next(iter(weights.values())).module
    counts = {weight.count for weight in weights.values()}
    known = {name, around[0], *weights}
    if len(counts) > 1 or any(weight.stacked for weight in weights.values()):
        shapes = ", ".join(str(tuple(getattr(module, key.rpartition(".")[2]).shape)) for key in weights)
        return _Unknown(name, known, f"parameters (experts, ., .) with one matrix per expert, got shapes {shapes}")
    (count,) = counts
    choosing = {
        key: router
        for key, router in routers.items()
        if any(parameter.dim() == 2 and parameter.shape[0] == count for parameter in router.parameters())
    }
    if not choosing:
        return _Unknown(name, known, f"a router with {count} outputs in {around[0]!r}, one for each expert")
    experts = Experts(block, name, module, around, choosing, weights, count)
    for holder, leaf, _ in (*experts.own(), *experts.chosen_by()):
        if len(shared := users[id(getattr(holder, leaf))]) > 1:
            return _Unknown(name, experts.names, f"tensors of their own, got {leaf!r}, which is in {sorted(shared)}")
    return experts


def _listed(block: nn.Module, experts: set[int], names: dict[int, str]) -> list[Experts | _Unknown]:
    """Return the lists in which each expert is a module of its own."""
    lists = {
        names[id(holder)]: [names[id(child)] for child in holder.children() if id(child) in experts]
        for holder in block.modules()
        if id(holder) not in experts and any(id(child) in experts for child in holder.children())
    }
    wanted = "parameters with one matrix per expert, got a module for each expert"
    return [_Unknown(name, {name, *inside}, wanted) for name, inside in lists.items()]


def _surroundings(
    module: nn.Module, parents: dict[int, nn.Module], routers: set[int]
) -> tuple[nn.Module, list[nn.Module]]:
    """Return the nearest module that holds `module` and routers, and these; or the one that holds it, and none."""
    around = nearest = parents.get(id(module), module)
    while not (found := [root for root in _roots(around, routers) if root is not module]) and id(around) in parents:
        around = parents[id(around)]
    return (around, found) if found else (nearest, [])


def _roots(around: nn.Module, routers: set[int]) -> Iterator[nn.Module]:
    """Yield the modules inside `around` that belong to routers and gates, without those inside of others."""
    if id(around) in routers:
        yield around
        return
    for child in around.children():
        yield from _roots(child, routers)


def _with_entries(modules: list[nn.Module], count: int) -> Iterator[Place]:
    """Yield the tensors that the modules hold themselves and that have one entry per expert."""
    for module in modules:
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.dim() and count in (tensor.shape[0], tensor.shape[-1] if tensor.numel() == count else 0):
                yield module, name, 0 if tensor.shape[0] == count else tensor.dim() - 1
