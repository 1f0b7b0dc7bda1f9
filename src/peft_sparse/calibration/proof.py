"""Proves, before any weight changes, that running blocks one by one computes what the model computes.

For the first batch of each kind, the calls of the blocks are recorded while every block returns slightly other values
than it computes. Then the model runs once as it is. Beside each call of a block, the same call is made from the
record. Its arguments, what it returns, and the number of inputs that each weight gets must be the same.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import base_model, called_layers, find_stacks
from ..model.experts import expert_layers
from ..model.offload import execution_device
from ..model.weights import WeightView, input_rows, to_host
from .inputs import copied, model_arguments
from .observing import (
    InputObserver,
    ProductObserver,
    Sight,
    eager_experts,
    is_over_tokens,
    rows_unknown,
    tokens_in,
)
from .padding import RowsUnknown, TokenMasks, align, marks_padding
from .recording import Call, Link, Returned, is_cache, leaves_of, map_leaves, returned_by, tensors_of
from .runner import Batch, BlockRunner, Residence, Trait, restore_forward, run_there, to_device


Order = list[tuple[str, list[Link]]]


@dataclass
class Proof:
    """What was found out about a model while it was compared with its blocks.

    Args:
        traits: how each block behaves, by name.
        sight: how inputs are seen that the calls of layers do not show.
        orders: for each stack, by the name of its first block, the calls on one batch of each kind: (name of the
            block, links to what earlier calls returned).
    """

    traits: dict[str, Trait] = field(default_factory=dict)
    sight: Sight = field(default_factory=Sight)
    orders: dict[str, list[Order]] = field(default_factory=dict)


@torch.no_grad()
def prove(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    inside: Callable[[str], dict[str, WeightView]],
    residence: Residence,
    *,
    every_expert: bool = False,
) -> Proof:
    """Compare blocks that run one by one with the model itself, on the first batch of each kind. No weight changes.

    Args:
        model: the model, in evaluation mode.
        inputs: model inputs, as `as_inputs` returns them.
        inside: name of a block -> the weights in it whose inputs will be measured, by name.
        residence: (name, block) -> a context within which the block's weights are on the device that computes.
        every_expert: refuse if some weight of an expert gets no token on all batches.

    Raises:
        ValueError: what a block receives depends on other blocks in a way that its arguments do not show; a block
            returns something else when it is called alone; a weight is never used, or used in a way that cannot be
            observed; some inputs cannot be told from padding; a mask of the calibration data fits no stack.
    """
    proving = _Proving(model, inside, residence)
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        proved = [proving.prove(batch) for batch in _first_of_each_kind(inputs)]
        # Other batches may run blocks that these did not run.
        for batch in inputs:
            if not proving.missing():
                break
            if not any(batch is other for other in proved) and proving.reaches_missing(batch):
                proving.prove(batch)
        if every_expert:
            for batch in inputs:
                if proving.unreached_experts() and not any(batch is other for other in proved):
                    proving.prove(batch)
    proving.check_complete(every_expert)
    return Proof(proving.traits, proving.sight, proving.orders)


def _first_of_each_kind(inputs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the first batch of each kind: with the same inputs, and with or without padding."""
    seen = set()
    for batch in inputs:
        dims = ((name, value.dim() if isinstance(value, Tensor) else value is None) for name, value in batch.items())
        kind = (*sorted(dims), *marks_padding(batch))
        if kind not in seen:
            seen.add(kind)
            yield batch


class _Proving:
    """Compares one batch after the other, and collects what is found out."""

    def __init__(
        self,
        model: nn.Module,
        inside: Callable[[str], dict[str, WeightView]],
        residence: Residence,
    ) -> None:
        self.model = model
        self.residence = residence
        self.stacks = find_stacks(model)
        self.weights = {name: inside(name) for stack in self.stacks for name in stack}
        self.all_weights = {name: weight for weights in self.weights.values() for name, weight in weights.items()}
        experts = expert_layers(model)
        self.of_experts = {
            name for name, w in self.all_weights.items() if w.expert is not None or id(w.layer) in experts
        }
        self.traits: dict[str, Trait] = {}
        self.sight = Sight(experts=frozenset(self.of_experts))
        self.orders: dict[str, list[Order]] = {}
        # Number of entries of the inputs that each weight got: in the model's own pass, and in calls of its block.
        self.reached: dict[str, int] = {}
        # The sum of the sizes of these inputs.
        self.sizes: dict[str, Tensor] = {}

    def prove(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compare on one batch, which is returned."""
        with eager_experts(self.model):
            called, runners = self._recorded(batch)
            products = {n for n in self.all_weights if n not in called and n not in self.of_experts}
            self.sight = replace(self.sight, products=self.sight.products - called | (products - set(self.reached)))
            shadow = _Shadow(self, batch, runners)
            shadow.run()
        for name, count in shadow.counts["model"].items():
            self.reached[name] = self.reached.get(name, 0) + count
        return batch

    def _recorded(self, batch: dict[str, Any]) -> tuple[set[str], dict[int, BlockRunner]]:
        """Record the calls of each stack with perturbed states. Return the names of layers that were called, too."""
        called: set[str] = set()
        runners = {}
        with contextlib.ExitStack() as hooks:
            for name, layer in self._layers().items():
                note = partial(_note_call, called, name)
                hooks.callback(layer.register_forward_pre_hook(note).remove)
            for number, stack in enumerate(self.stacks):
                if any(self.weights[name] for name in stack):
                    torch.manual_seed(0)
                    runner = BlockRunner(self.model, stack, [batch], residence=self.residence, traits={}, perturb=True)
                    if runner.batches:
                        runners[number] = runner
                        self._add_traits(runner)
                        order = [(runner.names[call.block], call.links) for call in runner.batches[0].calls]
                        self.orders.setdefault(runner.names[0], []).append(order)
        return called, runners

    def _add_traits(self, runner: BlockRunner) -> None:
        for index, trait in runner.traits.items():
            name = runner.names[index]
            known = self.traits.get(name, trait)
            mirrored = trait.mirrored if trait.mirrored == known.mirrored else None
            self.traits[name] = Trait(trait.tree, mirrored, trait.writes or known.writes, known.states)

    def _layers(self) -> dict[str, nn.Module]:
        """Return the modules that are called to run the layers of the weights that are matrices of their own."""
        called = called_layers(self.model)
        return {
            name: called.get(id(weight.layer), weight.layer)
            for name, weight in self.all_weights.items()
            if weight.expert is None
        }

    def missing(self) -> list[str]:
        """Return the names of weights that no batch has reached yet.

        Of experts that are chosen from, one at least must be reached.
        """
        reached = {self._chosen_from(name) for name in self.of_experts if self.reached.get(name)}
        return [
            name
            for name in self.all_weights
            if not self.reached.get(name) and (name not in self.of_experts or self._chosen_from(name) not in reached)
        ]

    def _chosen_from(self, name: str) -> str:
        """Return what the weights of an expert have in common with those of the others: their name without its own."""
        if self.all_weights[name].expert is not None:
            return name.rpartition(".")[0]
        parts = name.split(".")
        model = base_model(self.model)
        for end in reversed(range(1, len(parts))):
            if isinstance(model.get_submodule(".".join(parts[:end])), (nn.ModuleList, nn.ModuleDict)):
                return ".".join(parts[:end] + parts[end + 1 :])
        return name

    def reaches_missing(self, batch: dict[str, Any]) -> bool:
        """Return whether the model calls a layer on `batch` that no batch has reached yet."""
        called: set[str] = set()
        missing = set(self.missing())
        with contextlib.ExitStack() as hooks:
            for name, layer in self._layers().items():
                if name in missing:
                    hooks.callback(layer.register_forward_pre_hook(partial(_note_call, called, name)).remove)
            device = execution_device(self.model)
            self.model(**map_leaves(partial(to_device, device), model_arguments(self.model, batch)))
        return bool(called)

    def unreached_experts(self) -> list[str]:
        """Return the names of weights of experts that no batch has reached yet."""
        return [name for name in self.all_weights if name in self.of_experts and not self.reached.get(name)]

    def check_complete(self, every_expert: bool) -> None:
        """Raise ValueError if no batch reaches some weight, or with inputs that say nothing."""
        if every_expert and (names := self.unreached_experts()):
            raise ValueError(
                f"No calibration token reaches {len(names)} weights of experts, the first of them {names[0]!r}. Use "
                'more calibration sequences, or `on_unreached="magnitude"` to prune such experts by magnitude.'
            )
        check_sizes(self.sizes)
        missing = set(self.missing())
        for stack in self.stacks:
            of_stack = [name for block in stack for name in self.weights[block]]
            if of_stack and missing.issuperset(of_stack):
                raise ValueError(
                    f"No calibration batch runs the blocks of {next(iter(stack)).rpartition('.')[0]!r}. Give batches "
                    "that do, such as some with images, or leave these layers out: use `target_modules` or "
                    "`exclude_modules`, or give the language model alone."
                )
        if missing:
            names = sorted(missing)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"No calibration batch multiplies {names[0]!r}{more} with inputs that can be observed: either its "
                "block or its layer does not run, or the model uses the weight in another way. Leave such weights "
                f"out with `exclude_modules={_endings(missing, set(self.all_weights))}`, or prune without calibration."
            )


def check_sizes(sizes: dict[str, Tensor]) -> None:
    """Check that no weight has inputs that are all zero or not finite, by the sums of their sizes.

    Raises:
        ValueError: the inputs of a weight are all zero, or not finite.
    """
    for name, total in zip(sizes, to_host(list(sizes.values())), strict=True):
        if not total < float("inf"):
            raise ValueError(
                f"Expected finite inputs, but those of layer {name!r} hold NaN or infinity. Check the calibration "
                "data, or run the model in float32 or bfloat16."
            )
        if total == 0:
            raise ValueError(
                f"All inputs of layer {name!r} are zero, so they say nothing about its weights. Check the calibration "
                "data and the layer before it, or add the layer to `exclude_modules`."
            )


def _note_call(called: set[str], name: str, module: nn.Module, args: Any) -> None:
    called.add(name)


def _endings(chosen: set[str], names: set[str]) -> list[str]:
    """Return name endings that match all `chosen` and no other of `names`, as few as possible."""
    endings: list[str] = []
    for name in sorted(chosen):
        if not any(name == ending or name.endswith(f".{ending}") for ending in endings):
            parts = name.split(".")
            candidates = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
            fits = (c for c in candidates if not any(n == c or n.endswith(f".{c}") for n in names - chosen))
            endings.append(next(fits, name))
    return endings


class _Shadow:
    """Runs the model once as it is, and beside each call of a block the same call from its record."""

    def __init__(self, proving: _Proving, batch: dict[str, Any], runners: dict[int, BlockRunner]) -> None:
        self.proving = proving
        self.model = proving.model
        self.batch = batch
        self.runners = runners
        self.masks = {n: TokenMasks(self.model, list(stack)) for n, stack in enumerate(proving.stacks)}
        # The states that calls from the record return, by stack.
        self.states: dict[int, dict[Link, Tensor]] = {number: {} for number in runners}
        self.made: dict[int, int] = dict.fromkeys(runners, 0)
        self.phase = "model"
        # Number of the stack whose block is called.
        self.present = 0
        # The inputs that weights got in the latest call from a record, while it is asked which of them are padding.
        self.looking = False
        self.seen: dict[str, list[Tensor]] = {}
        self.counts: dict[str, dict[str, int]] = {"model": {}, "engine": {}}
        self.products: ProductObserver | None = None

    def run(self) -> None:
        model = self.model
        device = execution_device(model)
        arguments = map_leaves(partial(to_device, device), model_arguments(model, self.batch))
        with contextlib.ExitStack() as undo:
            self._replace_blocks(undo)
            for masks in self.masks.values():
                masks.start(self.batch)
                undo.enter_context(masks.watching())
            self._count_inputs(undo)
            torch.manual_seed(0)
            model(**arguments)
        for number, runner in self.runners.items():
            calls = len(runner.batches[0].calls)
            if self.made[number] != calls:
                raise ValueError(
                    f"The model calls the blocks of {runner.names[0].rpartition('.')[0]!r} {self.made[number]} times, "
                    f"and {calls} times if its blocks return slightly other values: which blocks run depends on the "
                    f"hidden states. {_WITHOUT}"
                )
        self._check_counts()
        self._check_masks()

    def _replace_blocks(self, undo: contextlib.ExitStack) -> None:
        for number, stack in enumerate(self.proving.stacks):
            for index, (name, block) in enumerate(stack.items()):
                undo.callback(restore_forward, block, block.__dict__.get("forward"))
                block.forward = partial(self._call, number, index, name, block, block.forward)

    def _count_inputs(self, undo: contextlib.ExitStack) -> None:
        proving = self.proving
        watched = {
            name: weight
            for name, weight in proving.all_weights.items()
            if weight.expert is not None or name in proving.sight.products
        }
        for name, layer in proving._layers().items():
            if name not in watched:
                hook = partial(self._on_layer, name)
                undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if watched:
            self.products = ProductObserver(watched, self._on_product)
            self.products.locate_all()
            undo.enter_context(self.products.watching())

    def _on_layer(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._count(name, tensors_of((args, kwargs))[0])

    def _on_product(self, name: str, layer: nn.Module, inputs: Tensor) -> None:
        self._count(name, inputs)

    def _count(self, name: str, inputs: Tensor) -> None:
        if self.phase in self.counts:
            counts = self.counts[self.phase]
            counts[name] = counts.get(name, 0) + inputs.numel()
        if self.phase == "engine" and inputs.numel():
            sizes = self.proving.sizes
            size = inputs.detach().float().abs().sum()
            sizes[name] = sizes[name] + size if name in sizes else size
        if self.phase != "model" and self.looking:
            self.seen.setdefault(name, []).append(inputs)

    def _call(
        self,
        number: int,
        index: int,
        name: str,
        block: nn.Module,
        forward: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Take the place of a block's `forward`."""
        if self.phase != "model":
            return forward(*args, **kwargs)
        self.masks[number].at_call(block, args, kwargs)
        with self.proving.residence(name, block):
            if self.products is not None:
                self.products.locate_all()
            if number not in self.runners:
                return run_there(block, forward, args, kwargs).tree
            runner, call = self.runners[number], self._next_call(number, index)
            self.present = number
            filled, constants = runner.filled(runner.batches[0], call, self.states[number])
            self._compare_arguments(runner, call, leaves_of((args, kwargs)), filled)
            generator = torch.get_rng_state()
            returned = run_there(block, forward, args, kwargs)
            after = torch.get_rng_state()
            torch.set_rng_state(generator)
            self.seen, self.looking = {}, runner.batches[0].padding.keep is not None
            own = self._make(runner, filled, "engine")
            self._compare_returned(name, returned, own)
            self._find_states(runner, call, own)
            self._find_padding(runner, call, constants, own)
            self.states[number] |= runner.batches[0].taken(call, own.tensors)
            self.seen = {}
            torch.set_rng_state(after)
        return returned.tree

    def _make(self, runner: BlockRunner, call: Call, phase: str) -> Returned:
        """Make a call from a record."""
        self.phase = phase
        # A block appends to a cache, and the record is used again.
        args, kwargs = map_leaves(
            lambda leaf: copied(leaf) if is_cache(leaf) else leaf, (call.args, call.kwargs), keep=True
        )
        try:
            # The model may be collecting what its blocks return, and keeps the list of it in a context variable.
            return contextvars.Context().run(returned_by, runner.blocks[call.block], args, kwargs)
        finally:
            self.phase = "model"

    def _next_call(self, number: int, index: int) -> int:
        runner, call = self.runners[number], self.made[number]
        self.made[number] += 1
        calls = runner.batches[0].calls
        if call >= len(calls) or calls[call].block != index:
            raise ValueError(
                f"The model calls {runner.names[index]!r}, and another block or none in its place if its blocks "
                f"return slightly other values: which blocks run depends on the hidden states. {_WITHOUT}"
            )
        return call

    def _compare_arguments(self, runner: BlockRunner, number: int, given: list[Any], filled: Call) -> None:
        """Raise ValueError if a call from the record does not get what the model gives."""
        calls = runner.batches[0].calls
        recorded, own = calls[number].leaves, filled.leaves
        name = runner.names[calls[number].block]
        before = f"Between {runner.names[calls[number - 1].block]!r} and" if number else "Before"
        alike = len(given) == len(own) == len(recorded)
        for place, leaf, mine in zip(recorded, given, own, strict=False):
            if alike and isinstance(leaf, Tensor) != isinstance(mine, Tensor):
                alike = False
            if isinstance(leaf, (bool, int, float, str)) and leaf != mine:
                alike = False
            if alike and isinstance(leaf, Tensor) and not _close(leaf, mine):
                if isinstance(place, Link) or place.is_floating_point():
                    raise ValueError(
                        f"{before} {name!r} the model changes the hidden states, or computes something "
                        f"from them that {name!r} receives, and blocks that run one by one would miss that. {_WITHOUT}"
                    )
                alike = False
        if not alike:
            raise ValueError(
                f"What {name!r} receives beside the hidden states depends on what earlier blocks computed, and blocks "
                f"that run one by one would miss that. {_WITHOUT}"
            )

    def _compare_returned(self, name: str, returned: Returned, own: Returned) -> None:
        same = len(returned.tensors) == len(own.tensors)
        if not same or not all(map(_close, returned.tensors, own.tensors)):
            raise ValueError(
                f"Called alone, {name!r} returns something else than within the model: it depends on more than its "
                f"arguments and its weights. {_WITHOUT}"
            )

    def _check_counts(self) -> None:
        for name, count in self.counts["model"].items():
            seen = self.counts["engine"].get(name, 0)
            if seen != count:
                raise ValueError(
                    f"The model multiplies {name!r} with {count} entries of inputs, and calls of its block with "
                    f"{seen}: the model also uses this layer outside of its block. {_WITHOUT}"
                )

    def _check_masks(self) -> None:
        marked = marks_padding(self.batch)
        paddings = [masks.padding() for masks in self.masks.values() if masks.shape is not None]
        if marked and paddings and all(p.keep is None and p.keep_context is None for p in paddings):
            shapes = ", ".join(str(tuple(masks.shape or ())) for masks in self.masks.values() if masks.shape)
            raise ValueError(
                f"{marked[0]!r} of shape {tuple(self.batch[marked[0]].shape)} marks padding, but fits the tokens of "
                f"no stack of blocks, whose hidden states have the shapes {shapes}. Give batches without padding, or "
                "say which tokens count with `token_mask` of shape (sequences, tokens)."
            )

    def _find_states(self, runner: BlockRunner, call: int, own: Returned) -> None:
        """Find out which of the tensors that a block returns depend on what earlier calls returned."""
        name = runner.names[runner.batches[0].calls[call].block]
        if len(own.tensors) > 1:
            filled, _ = runner.filled(runner.batches[0], call, self.states[self.present])
            linked = self._linked_leaves(runner, call, filled)

            def tracked(leaf: Any) -> Any:
                return leaf.detach().requires_grad_() if id(leaf) in linked and leaf.is_floating_point() else leaf

            with torch.enable_grad():
                # Blocks may write into what they get, which is refused for leaves of autograd.
                args, kwargs = map_leaves(
                    lambda leaf: tracked(leaf).clone() if id(leaf) in linked else leaf, (filled.args, filled.kwargs)
                )
                again = self._make(runner, Call(filled.block, args, kwargs), "again")
            states = tuple(number for number, tensor in enumerate(again.tensors) if tensor.requires_grad)
            self.proving.traits[name] = replace(self.proving.traits[name], states=states)

    def _linked_leaves(self, runner: BlockRunner, call: int, filled: Call) -> set[int]:
        places = zip(runner.batches[0].calls[call].leaves, filled.leaves, strict=True)
        return {id(leaf) for place, leaf in places if isinstance(place, Link)}

    def _find_padding(self, runner: BlockRunner, call: int, constants: list[Tensor], own: Returned) -> None:
        """Find out how padding is left out of the inputs of the weights of a block.

        Raises:
            ValueError: inputs of a weight cannot be told from padding.
        """
        batch = runner.batches[0]
        keep, name = batch.padding.keep, runner.names[batch.calls[call].block]
        weights = self.proving.weights[name]
        if keep is None or not weights:
            return
        experts = {n: w for n, w in weights.items() if n in self.proving.of_experts}
        if experts and not experts.keys() <= self.proving.sight.filters.keys():
            self._find_filters(runner, call, experts, own)
        unaligned = [
            n
            for n, tensors in self.seen.items()
            if n not in experts and not self._aligned(n, tensors, batch, constants)
        ]
        if unaligned:
            self._check_independent(runner, call, unaligned)

    def _aligned(self, name: str, tensors: list[Tensor], batch: Batch, constants: list[Tensor]) -> bool:
        layer = self.proving.all_weights[name].layer
        for tensor in tensors:
            tokens = tokens_in(layer, tensor)
            if isinstance(layer, nn.Conv2d):
                rows = input_rows(layer, tensor).shape[-2]
                tokens = torch.Size((len(tensor), rows // len(tensor)))
            try:
                batch.padding.of_rows(tokens, any(tensor is constant for constant in constants))
            except RowsUnknown:
                return False
        return True

    def _find_filters(self, runner: BlockRunner, call: int, experts: dict[str, WeightView], own: Returned) -> None:
        """Find for each expert the innermost module that gets all tokens. Check that padding may be removed there."""
        block, keep = runner.blocks[runner.batches[0].calls[call].block], runner.batches[0].padding.keep
        assert keep is not None
        over_tokens: dict[int, bool] = {}

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            over_tokens[id(module)] = any(is_over_tokens(tensor, keep) for tensor in tensors_of((args, kwargs)))

        with contextlib.ExitStack() as hooks:
            for module in block.modules():
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            self._run(runner, call)
        around = {
            name: [module for module in _around(block, weight.layer) if over_tokens.get(id(module))]
            for name, weight in experts.items()
            # Other experts got no token.
            if any(id(module) in over_tokens for module in weight.layer.modules())
        }
        if not around:
            return
        # The innermost may get as many rows as there are tokens, but sorted: then the one around it is tried.
        for outwards in range(1, 1 + max(map(len, around.values()))):
            filters = {name: modules[-min(outwards, len(modules))] for name, modules in around.items() if modules}
            if len(filters) == len(around) and self._is_harmless(runner, call, filters, own):
                sight = self.proving.sight
                self.proving.sight = replace(sight, filters=sight.filters | filters)
                return
        raise ValueError(rows_unknown(next(iter(around)), keep.numel()))

    def _is_harmless(self, runner: BlockRunner, call: int, filters: dict[str, nn.Module], own: Returned) -> bool:
        """Return whether the block computes the same for all tokens that count if padding is removed there."""
        keep, sight = runner.batches[0].padding.keep, self.proving.sight
        assert keep is not None
        experts = {name: self.proving.all_weights[name] for name in filters}
        sight = replace(sight, filters=sight.filters | filters)
        observer = InputObserver(self.model, experts, _ignore, _ignore, sight=sight)
        try:
            with observer.hooks():
                filtered = self._run(runner, call, observer)
        except Exception:
            # Modules that do not get one row per token fail in ways of their own.
            return False
        for tensor, other in zip(own.tensors, filtered.tensors, strict=True):
            rows = align(keep, tensor.shape[:-1])
            if rows is not None and not _close(tensor.flatten(0, -2)[rows], other.flatten(0, -2)[rows], 1e-3):
                return False
        return True

    def _check_independent(self, runner: BlockRunner, call: int, names: list[str]) -> None:
        """Check that the inputs of the weights `names` do not depend on padding, so that all their rows count."""
        before = {name: self.seen[name] for name in names}
        self._run(runner, call, noise=True)
        for name in names:
            after = self.seen.get(name, [])
            if len(after) != len(before[name]) or not all(map(torch.equal, before[name], after)):
                raise ValueError(rows_unknown(name, before[name][0].shape[:-1].numel()))
        self.proving.sight = replace(self.proving.sight, unpadded=self.proving.sight.unpadded | set(names))

    def _run(
        self, runner: BlockRunner, call: int, observer: InputObserver | None = None, noise: bool = False
    ) -> Returned:
        """Make a call from the record once more; `noise` is put on states of padding."""
        batch = runner.batches[0]
        filled, constants = runner.filled(batch, call, self.states[self.present])
        if noise:
            keep = batch.padding.keep
            links = self._linked_leaves(runner, call, filled)
            filled.args, filled.kwargs = map_leaves(
                lambda leaf: _with_noise(leaf, keep) if id(leaf) in links else leaf, (filled.args, filled.kwargs)
            )
        if observer is not None:
            observer.before_call(batch, constants)
        self.seen = {}
        return self._make(runner, filled, "again")


_WITHOUT = "Prune by a criterion that needs no calibration, or give batches for which the model does not do this."


def _around(block: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """Return the modules in `block` that get all tokens and not those of one expert, from the outermost one.

    These are the modules around a layer, and itself; or those around the list of experts that it lies in.
    """
    path = next(name for name, module in block.named_modules() if module is layer).split(".")
    modules = [block.get_submodule(".".join(path[:end])) for end in range(1, len(path) + 1)]
    lists = [n for n, module in enumerate(modules) if isinstance(module, (nn.ModuleList, nn.ModuleDict))]
    return modules[: lists[-1]] if lists else modules


def _with_noise(state: Tensor, keep: Tensor | None) -> Tensor:
    rows = None if keep is None or not state.is_floating_point() else align(keep, state.shape[:-1])
    if rows is None:
        return state
    noisy = state.clone()
    noisy.view(-1, state.shape[-1])[~rows] += torch.randn(1)
    return noisy


def _ignore(*args: Any) -> None:
    """Record nothing."""


def _close(one: Tensor, other: Tensor, precision: float | None = None) -> bool:
    """Return whether two tensors are equal, or differ by rounding alone."""
    if one.shape != other.shape:
        return False
    other = other.to(one.device)
    if torch.equal(one, other):
        return True
    if not one.is_floating_point() or not other.is_floating_point():
        return bool((one == other).all())
    if precision is None:
        precision = 1e-4 if one.dtype in (torch.float32, torch.float64) else 0.02
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return bool((one - other).norm() <= precision * other.norm())
