"""Proves, before any weight changes, that running blocks one by one computes what the model computes.

For the first batch of each kind, the calls of the blocks are recorded while every block returns slightly other values
than it computes. Then the model runs once as it is. Beside each call of a block, the same call is made from the
record. Its arguments, what it returns, and the number of inputs that each weight gets must be the same.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import base_model, called_layers, holders
from ..model.own_forward import multiplies_inputs, use_of_weight
from ..model.weights import WeightView, to_host
from .findings import Findings, Proof
from .padding import marks_padding
from .products import eager_experts
from .residence import Residence, run_in_residence
from .runner import BlockRunner
from .shadow import Shadow


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
    return Proof(proving.traits, proving.sight, proving.orders, proving.ran)


def _first_of_each_kind(inputs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the first batch of each kind: with the same inputs, and with or without padding."""
    seen = set()
    for batch in inputs:
        dims = ((name, value.dim() if isinstance(value, Tensor) else value is None) for name, value in batch.items())
        kind = (*sorted(dims), *marks_padding(batch))
        if kind not in seen:
            seen.add(kind)
            yield batch


class _Proving(Findings):
    """Compares one batch after the other, and collects what is found out."""

    def prove(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compare on one batch, which is returned."""
        with eager_experts(self.model):
            called, runners = self._recorded(batch)
            self._check_adapters(called)
            products = {n for n in self.all_weights if n not in called and n not in self.of_experts}
            self.sight = replace(self.sight, products=self.sight.products - called | (products - set(self.reached)))
            shadow = Shadow(self, batch, runners)
            shadow.run()
        uncounted = {
            name
            for runner in runners.values()
            if (keep := runner.batches[0].padding.keep) is not None and not keep.any()
            for block in runner.names
            for name in self.weights[block]
        }
        self.uncounted |= uncounted
        for name, count in shadow.counts["model"].items():
            if name not in uncounted:
                self.reached[name] = self.reached.get(name, 0) + count
        return batch

    def _recorded(self, batch: dict[str, Any]) -> tuple[set[str], dict[int, BlockRunner]]:
        """Record the calls of each stack with perturbed states. Return the names of layers that were called, too."""
        called: set[str] = set()
        bases: set[str] = set()
        runners = {}
        with contextlib.ExitStack() as hooks:
            for name, weight in self._adapted().items():
                hooks.callback(weight.layer.register_forward_pre_hook(partial(_note_call, bases, name)).remove)
            for name, layer in self.layers():
                # A layer may multiply its weight with other inputs than its own. These are seen in the product.
                if use_of_weight(self.all_weights[name].layer) == "plain":
                    note = partial(_note_call, called, name)
                    hooks.callback(layer.register_forward_pre_hook(note).remove)
            for number, stack in enumerate(self.stacks):
                if any(self.weights[name] for name in stack):
                    torch.manual_seed(0)
                    runner = BlockRunner(self.model, stack, [batch], residence=self.residence, traits={}, perturb=True)
                    if runner.batches:
                        runners[number] = runner
                        self.add_traits(runner)
                        self.orders.setdefault(runner.names[0], []).append(runner.order_of(runner.batches[0]))
        self.sight = replace(self.sight, bases=self.sight.bases | bases)
        return called, runners

    def _adapted(self) -> dict[str, WeightView]:
        """Return the weights whose layer has an adapter around it, by name."""
        around = called_layers(self.model)
        weights = {name: weight for name, weight in self.all_weights.items() if weight.expert is None}
        return {n: weight for n, weight in weights.items() if around.get(id(weight.layer)) is not weight.layer}

    def _check_adapters(self, called: set[str]) -> None:
        """Raise ValueError if an adapter multiplies a weight itself, and not with its own inputs."""
        around = called_layers(self.model)
        for name, weight in self._adapted().items():
            module = around.get(id(weight.layer), weight.layer)
            if name in called - self.sight.bases and not multiplies_inputs(module, weight.layer):
                raise ValueError(
                    f"The adapter of {name!r}, a {type(module).__name__}, multiplies the weight with other inputs "
                    "than it gets, which cannot be observed. Merge the adapter, switch it off, or prune without "
                    "calibration."
                )

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
            for name, layer in self.layers():
                if name in missing:
                    hooks.callback(layer.register_forward_pre_hook(partial(_note_call, called, name)).remove)
            run_in_residence(self.model, batch, self.residence)
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
        self._check_shared()
        missing = set(self.missing())
        for stack in self.stacks:
            of_stack = [name for block in stack for name in self.weights[block]]
            seen = next(iter(stack)) in self.orders and not self.uncounted.issuperset(of_stack)
            if of_stack and missing.issuperset(of_stack) and not seen:
                raise ValueError(
                    f"No calibration batch runs the blocks of {next(iter(stack)).rpartition('.')[0]!r}, or only on "
                    "tokens that a mask leaves out. Give batches that do, such as some with images, or leave these "
                    "layers out: use `target_modules` or `exclude_modules`, or give the language model alone."
                )
        if missing:
            names = sorted(missing)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"No calibration batch multiplies {names[0]!r}{more} with inputs that can be observed: either its "
                "block or its layer does not run, or the model uses the weight in another way. Leave such weights "
                f"out with `exclude_modules={_endings(missing, set(self.all_weights))}`, or prune without calibration."
            )

    def _check_shared(self) -> None:
        """Raise ValueError if a weight is also used where its inputs are not known when it is pruned.

        These are blocks of another stack, and blocks that run before the one that it is pruned with.
        """
        held = holders({name: block for stack in self.stacks for name, block in stack.items()})
        own = {name: block for block, weights in self.weights.items() for name in weights}
        places = {block: number for number, stack in enumerate(self.stacks) for block in stack}
        for name, weight in self.all_weights.items():
            users = {*held.get(id(weight.layer), ()), *held.get(id(weight.storage), ())}
            for other in sorted(users - {own[name]}):
                runs = [[block for block, _ in order] for order in self.orders.get(self._first_of(own[name]), ())]
                before = any(other in run and run.index(other) < (*run, own[name]).index(own[name]) for run in runs)
                if before or places[other] != places[own[name]]:
                    raise ValueError(
                        f"The weight of {name!r} is also used by block {other!r}, whose inputs are not known when it "
                        "is pruned. Leave it out with `exclude_modules`, or prune without calibration."
                    )

    def _first_of(self, block: str) -> str:
        return next(name for stack in self.stacks if block in stack for name in stack)


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
