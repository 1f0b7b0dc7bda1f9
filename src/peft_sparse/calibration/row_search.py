"""Finds out which inputs of a weight are padding, where the mask of the tokens alone does not tell."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.weights import WeightView, input_rows
from .batch import Batch
from .comparing import close, linked_leaves
from .findings import Findings
from .observing import InputObserver, is_over_tokens, refuse_rows, tokens_in
from .padding import RowsUnknown, align
from .recording import Call, Link, Returned, map_leaves, tensors_of
from .runner import BlockRunner


class RowSearch:
    """Finds out how padding is left out of the inputs of the weights of one block after the other.

    Args:
        findings: what is known of the model. It grows.
        make: makes a call from its record once more.
    """

    def __init__(self, findings: Findings, make: Callable[[BlockRunner, Call], Returned]) -> None:
        self.findings = findings
        self.make = make
        self.states: dict[Link, Tensor] = {}
        # The inputs that weights got in the latest call from a record, while it is asked which of them are padding.
        self.looking = False
        self.seen: dict[str, list[Tensor]] = {}

    def start(self, looking: bool) -> None:
        """Forget the inputs seen before; note the next ones if `looking`."""
        self.seen, self.looking = {}, looking

    def note(self, name: str, inputs: Tensor) -> None:
        """Note inputs of a weight."""
        if self.looking:
            self.seen.setdefault(name, []).append(inputs)

    def find(
        self,
        runner: BlockRunner,
        call: int,
        states: dict[Link, Tensor],
        constants: list[Tensor],
        own: Returned,
    ) -> None:
        """Find out how padding is left out of the inputs of the weights of a block.

        Args:
            runner: the stack, with one batch.
            call: number of the call of the block.
            states: what earlier calls returned.
            constants: the tensors that the block gets beside the states.
            own: what the block returned.

        Raises:
            ValueError: inputs of a weight cannot be told from padding.
        """
        self.states = states
        batch = runner.batches[0]
        keep, name = batch.padding.keep, runner.names[batch.calls[call].block]
        weights = self.findings.weights[name]
        if keep is None or not weights:
            return
        experts = {n: w for n, w in weights.items() if n in self.findings.of_experts}
        seen = self.seen
        sight = self.findings.sight
        if not experts.keys() <= {*sight.filters, *sight.traced}:
            self._find_filters(runner, call, experts, own)
        # Rows within a module before which padding is removed are those of tokens that count.
        others = {
            n: tensors
            for n, tensors in seen.items()
            if n not in (*self.findings.sight.filters, *self.findings.sight.traced)
        }
        self.seen = seen
        in_one = [
            n for n, tensors in others.items() if all(tensor.shape[:-1] == (keep.numel(),) for tensor in tensors)
        ]
        if in_one:
            self._find_order(runner, call, in_one)
        unaligned = {
            name: [n for n, tensor in enumerate(tensors) if not self._aligned(name, tensor, batch, constants)]
            for name, tensors in others.items()
        }
        if any(unaligned.values()):
            self._check_independent(runner, call, {name: places for name, places in unaligned.items() if places})

    def _aligned(self, name: str, inputs: Tensor, batch: Batch, constants: list[Tensor]) -> bool:
        layer = self.findings.all_weights[name].layer
        tokens = tokens_in(layer, inputs)
        if isinstance(layer, nn.Conv2d):
            rows = input_rows(layer, inputs).shape[-2]
            tokens = torch.Size((len(inputs), rows // len(inputs)))
        try:
            batch.padding.of_rows(tokens, any(inputs is constant for constant in constants))
        except RowsUnknown:
            return False
        return True

    def _find_filters(self, runner: BlockRunner, call: int, experts: dict[str, WeightView], own: Returned) -> None:
        """Find for each expert the innermost module that gets all tokens. Check that padding may be removed there."""
        block, keep = runner.blocks[runner.batches[0].calls[call].block], runner.batches[0].padding.keep
        assert keep is not None
        over_tokens: dict[int, bool] = {}
        # Modules that get sequences and tokens in dimensions of their own, so that rows are surely in their order.
        in_order: set[int] = set()

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = tensors_of((args, kwargs))
            over_tokens[id(module)] = any(is_over_tokens(tensor, keep) for tensor in tensors)
            in_order.update({id(module)} if any(tensor.shape[:2] == keep.shape for tensor in tensors) else ())

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
        alike: dict[tuple[int, ...], list[str]] = {}
        for name, modules in around.items():
            alike.setdefault(tuple(map(id, modules)), []).append(name)
        unfiltered = [n for names in alike.values() if not self._filter(runner, call, names, around[names[0]], own)
                      for n in names]  # fmt: skip
        traced = {n: [m for m in around[n] if id(m) in in_order][-1:] for n in unfiltered}
        for name, modules in traced.items():
            if not modules or not self._can_be_traced(runner, call, {n: m[0] for n, m in traced.items() if m}):
                refuse_rows(name, keep.numel())
        sight = self.findings.sight
        self.findings.sight = replace(sight, traced=sight.traced | {n: m[0] for n, m in traced.items()})

    def _filter(
        self, runner: BlockRunner, call: int, names: list[str], around: list[nn.Module], own: Returned
    ) -> bool:
        """Remove padding before the innermost module of `around` that allows it. Return whether one does."""
        # The innermost may get as many rows as there are tokens, but sorted: then the one around it is tried.
        for module in reversed(around):
            if self._is_harmless(runner, call, dict.fromkeys(names, module), own):
                inside = set(map(id, module.modules()))
                weights = self.findings.weights[runner.names[runner.batches[0].calls[call].block]]
                filters = {name: module for name, weight in weights.items() if id(weight.layer) in inside}
                sight = self.findings.sight
                self.findings.sight = replace(sight, filters=filters | sight.filters | dict.fromkeys(names, module))
                return True
        return False

    def _can_be_traced(self, runner: BlockRunner, call: int, traced: dict[str, nn.Module]) -> bool:
        """Return whether all rows of the experts are copies of inputs of their modules in `traced`, or follow such."""
        experts = {name: self.findings.all_weights[name] for name in traced}
        sight = replace(self.findings.sight, traced=traced)
        observer = InputObserver(self.findings.model, experts, _read, _ignore, sight=sight)
        try:
            with observer.hooks():
                self._run(runner, call, observer)
        except (ValueError, KeyError):
            return False
        return True

    def _is_harmless(self, runner: BlockRunner, call: int, filters: dict[str, nn.Module], own: Returned) -> bool:
        """Return whether the block computes the same for all tokens that count if padding is removed there."""
        keep, sight = runner.batches[0].padding.keep, self.findings.sight
        assert keep is not None
        experts = {name: self.findings.all_weights[name] for name in filters}
        sight = replace(sight, filters=sight.filters | filters)
        observer = InputObserver(self.findings.model, experts, _ignore, _ignore, sight=sight)
        try:
            with observer.hooks():
                filtered = self._run(runner, call, observer)
        except Exception:
            # Modules that do not get one row per token fail in ways of their own.
            return False
        for tensor, other in zip(own.tensors, filtered.tensors, strict=True):
            rows = align(keep, tensor.shape[:-1])
            if rows is not None and not close(tensor.flatten(0, -2)[rows], other.flatten(0, -2)[rows], 1e-3):
                return False
        return True

    def _find_order(self, runner: BlockRunner, call: int, names: list[str]) -> None:
        """Find out whether rows in one dimension are those of the first sequence first, or of the first token first.

        Noise on padding must change no row that counts.
        """
        keep, before = runner.batches[0].padding.keep, {name: self.seen[name] for name in names}
        assert keep is not None
        others = self.seen
        self._run(runner, call, noise=True)
        after, self.seen = self.seen, others
        for name in names:
            pairs = zip(before[name], after.get(name, []), strict=False)
            changed = [(one != other).any(1) for one, other in pairs if one.shape == other.shape]
            rows = torch.stack(changed or [~keep.flatten()]).any(0)
            if (rows & keep.flatten()).any() and not (rows & keep.T.flatten()).any():
                sight = self.findings.sight
                self.findings.sight = replace(sight, tokens_first=sight.tokens_first | {name})

    def _check_independent(self, runner: BlockRunner, call: int, unaligned: dict[str, list[int]]) -> None:
        """Check that inputs which are no tokens do not depend on padding, so that all their rows count.

        Args:
            runner: the stack.
            call: number of the call.
            unaligned: name of a weight -> the numbers of such inputs among those that it gets in the call.
        """
        before = {name: self.seen[name] for name in unaligned}
        self._run(runner, call, noise=True)
        for name, places in unaligned.items():
            after = self.seen.get(name, [])
            same = len(after) == len(before[name]) and all(torch.equal(before[name][n], after[n]) for n in places)
            if not same:
                refuse_rows(name, before[name][places[0]].shape[:-1].numel())
        unpadded = self.findings.sight.unpadded | set(unaligned)
        self.findings.sight = replace(self.findings.sight, unpadded=unpadded)

    def _run(
        self, runner: BlockRunner, call: int, observer: InputObserver | None = None, noise: bool = False
    ) -> Returned:
        """Make a call from the record once more; `noise` is put on states of padding."""
        batch = runner.batches[0]
        filled, constants = runner.filled(batch, call, self.states)
        if noise:
            keep = batch.padding.keep
            links = linked_leaves(runner, call, filled)
            filled.args, filled.kwargs = map_leaves(
                lambda leaf: _with_noise(leaf, keep) if id(leaf) in links else leaf, (filled.args, filled.kwargs)
            )
        if observer is not None:
            observer.before_call(batch, constants)
        self.seen = {}
        return self.make(runner, filled)


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
    noisy.view(-1, state.shape[-1])[~rows] += torch.randn_like(noisy.view(-1, state.shape[-1])[~rows])
    return noisy


def _read(name: str, leader: str, rows: Callable[[], Tensor]) -> None:
    """Record nothing, but ask for the rows."""
    rows()


def _ignore(*args: Any) -> None:
    """Record nothing."""
