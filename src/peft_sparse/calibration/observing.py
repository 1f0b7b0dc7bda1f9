"""Observes the inputs of a block's weights while the block runs.

The inputs of a layer are those of its calls. A weight whose layer is never called, or that is a part of a parameter,
is observed in the products that it takes part in.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..model.blocks import called_layers, layers_of_weights
from ..model.weights import PRUNABLE_LAYERS, WeightView, input_rows, input_view
from .batch import Batch, EnoughSeen
from .padding import Padding, RowsUnknown
from .products import ProductObserver, eager_experts
from .recording import map_leaves, tensors_of
from .traces import RowTraces


@dataclass(frozen=True)
class Sight:
    """How the inputs of weights are seen, beyond the calls of their layers.

    Args:
        products: names of weights that are seen in products, because their layers are never called.
        filters: name of a weight of an expert -> the module before which padding is removed. Experts get picked
            tokens, among which padding can no longer be recognised. By default it is the module of fused experts.
        unpadded: names of weights that get inputs which are no tokens, and do not depend on padding: all rows count.
        experts: names of the weights of experts, which may get no token.
        tokens_first: names of weights that get rows of tokens and sequences in one dimension, those of the first token
            first. Others get those of the first sequence first.
        traced: name of a weight of an expert -> the module whose inputs its rows are copies of. Padding is recognised
            by these values, where the experts would compute something else without it.
        bases: names of weights whose layer is called by the adapter around it. It may get other inputs than the
            adapter, such as scaled or rotated ones.
    """

    products: frozenset[str] = frozenset()
    filters: dict[str, nn.Module] = field(default_factory=dict)
    unpadded: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    tokens_first: frozenset[str] = frozenset()
    traced: dict[str, nn.Module] = field(default_factory=dict)
    bases: frozenset[str] = frozenset()


class InputObserver:
    """Reports the inputs of each weight, and the outputs of some layers, while a block runs within `hooks()`.

    The caller runs the block batch by batch and calls `before_call` before each call.

    Args:
        model: the model that the weights belong to.
        weights: the weights to observe, by name. They lie in the block that is run.
        record: called as `record(name, leader, rows)` for each weight that gets inputs. `leader` is the first weight
            that got the same input tensor on this call; for that weight, it is `name` itself. `rows()` returns the
            inputs as (tokens, in) without padding.
        record_outputs: called as `record_outputs(name, rows)` for each layer whose output is W X plus its bias.
            `rows()` returns the outputs as (tokens, out) without padding.
        stopping: the block, if its output is not needed. `EnoughSeen` is then raised within the block as soon as all
            weights have been observed. None lets the block run to its end.
        sight: how inputs are seen that the calls of layers do not show.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, WeightView],
        record: Callable[[str, str, Callable[[], Tensor]], None],
        record_outputs: Callable[[str, Callable[[], Tensor]], None],
        stopping: nn.Module | None = None,
        sight: Sight | None = None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.record = record
        self.record_outputs = record_outputs
        self.sight = sight or Sight()
        fused = {name: weight.layer for name, weight in weights.items() if weight.expert is not None}
        filters = fused | {name: module for name, module in self.sight.filters.items() if name in weights}
        self.filters = {name: module for name, module in filters.items() if name not in self.sight.traced}
        self.traces = RowTraces()
        self.products = {n: w for n, w in weights.items() if w.expert is not None or n in self.sight.products}
        self.stop = _Stop(len(weights), None if self.products or self.filters else stopping)
        self.padding = Padding()
        # Tensors that the model passes to the block beside the hidden states, such as the encoder's states.
        self.contexts: list[Tensor] = []
        self.seen: list[tuple[Tensor, tuple[Any, ...], str]] = []
        self.from_context: dict[str, bool] = {}
        self._products: ProductObserver | None = None

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe within the context; leave no hook behind."""
        with contextlib.ExitStack() as undo:
            for name, layer in called_for(self.model, self.weights, self.sight.bases):
                weight = self.weights[name]
                if name not in self.products:
                    hook = partial(self._on_inputs, name)
                    undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
                    if layer is weight.layer and type(layer) in PRUNABLE_LAYERS and _is_plain(layer):
                        undo.callback(layer.register_forward_hook(partial(self._on_outputs, name)).remove)
            for module in {id(module): module for module in self.filters.values()}.values():
                padding = _PaddingFilter(self)
                undo.callback(module.register_forward_pre_hook(padding.drop, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(padding.refill).remove)
            traced = [module for name, module in self.sight.traced.items() if name in self.weights]
            for module in {id(module): module for module in traced}.values():
                undo.callback(module.register_forward_pre_hook(self._on_tokens, with_kwargs=True).remove)
            if self.products:
                undo.enter_context(eager_experts(self.model))
                self._products = ProductObserver(self.products, self._observe)
                undo.enter_context(self._products.watching())
            yield

    def before_call(self, batch: Batch, constants: list[Tensor]) -> None:
        """Prepare for the next call. `constants` are the arguments that do not come from the stack."""
        self.padding = batch.padding
        self.stop.before_batch()
        self.contexts = constants
        self.seen.clear()
        if self._products is not None:
            self._products.locate_all()

    def _on_inputs(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # `module` may be the adapter around the layer. How inputs become rows depends on the layer itself.
        self._observe(name, self.weights[name].layer, tensors_of((args, kwargs))[0])

    def _on_outputs(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        tokens = tokens_in(module, output)
        self.record_outputs(name, lambda: self._unpadded(name, _output_rows(module, output), tokens))

    def _observe(self, name: str, layer: nn.Module, inputs: Tensor) -> None:
        view = input_view(layer)
        leader = next((other for known, same, other in self.seen if known is inputs and same == view), None)
        if leader is None:
            self.seen.append((inputs, view, name))
        self.from_context[name] = any(inputs is context for context in self.contexts)
        observed = name in self.products
        rows = partial(_plain_rows if observed else input_rows, layer)
        self.record(name, leader or name, lambda: self._unpadded(name, rows(inputs), tokens_in(layer, inputs)))
        self.stop.saw(name)

    def _unpadded(self, name: str, rows: Tensor, shape: torch.Size) -> Tensor:
        # Experts get no padding, see `_PaddingFilter`.
        if name in self.filters:
            return rows
        if name in self.sight.traced and self.padding.keep is not None:
            return self._traced(name, rows)
        shape = shape if shape.numel() == rows.shape[-2] else torch.Size((shape[0], rows.shape[-2] // shape[0]))
        try:
            places = self.padding.places_of_rows(
                shape, self.from_context[name], name in self.sight.tokens_first, rows.device
            )
        except RowsUnknown:
            if name not in self.sight.unpadded:
                refuse_rows(name, rows.shape[-2])
            places = None
        return rows if places is None else rows.index_select(-2, places)

    def _on_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep = self.padding.keep
        states = [x for x in tensors_of((args, kwargs)) if keep is not None and x.shape[:2] == keep.shape]
        if states and keep is not None:
            self.traces.note(module, states[0], keep)

    def _traced(self, name: str, rows: Tensor) -> Tensor:
        """Return those of `rows` of an expert that are of tokens that count."""
        weight = self.weights[name]
        expert = name.rpartition(".")[0] if weight.expert is None else weight.expert
        try:
            return rows[self.traces.kept(self.sight.traced[name], expert, rows)]
        except RowsUnknown:
            refuse_rows(name, len(rows))


def called_for(
    model: nn.Module, weights: dict[str, WeightView], bases: Collection[str] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name of a weight, module that is called to use it): several where layers share the weight.

    Of weights that are a part of a parameter, none is yielded. Of those in `bases` it is the layer itself, and of
    others the adapter around it, if there is one.
    """
    called, layers = called_layers(model), layers_of_weights(model)
    for name, weight in weights.items():
        if weight.expert is None:
            users = {id(layer): layer for layer in (weight.layer, *layers.get(id(weight.storage), ()))}
            own = {} if name in bases else called
            yield from ((name, own.get(key, layer)) for key, layer in users.items())


def refuse_rows(name: str, rows: int) -> NoReturn:
    """Raise ValueError: it is not known which inputs of the weight `name` are padding."""
    raise ValueError(
        f"Some calibration tokens are padding, and {name!r} gets {rows} rows of which it is not known which are "
        f"padding. Give batches without padding, such as one sequence per batch, or add {name!r} to `exclude_modules`."
    )


class _Stop:
    """Ends the run of a block once each of its `count` weights was observed, which saves computing the rest.

    The run is ended only if no layer was called twice on the first batch, and if no hook or replaced forward waits
    for a module of the block to return.
    """

    def __init__(self, count: int, block: nn.Module | None) -> None:
        self.count = count
        self.calls: dict[str, int] = {}
        self.known = False
        self.allowed = block is not None and all(map(_is_plain, block.modules()))

    def before_batch(self) -> None:
        if self.calls and not self.known:
            self.known = True
            self.allowed &= max(self.calls.values()) == 1
        self.calls.clear()

    def saw(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.known and self.allowed and len(self.calls) == self.count:
            raise EnoughSeen


def _is_plain(module: nn.Module) -> bool:
    """Tell whether `module` has no forward hook and no forward of its own beside that of its class."""
    return not module._forward_hooks and "forward" not in module.__dict__


def _output_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the outputs of `layer` as (tokens, out), the tokens in the order of `input_rows`."""
    return output.flatten(2).mT.flatten(0, 1) if isinstance(layer, nn.Conv2d) else output.flatten(0, -2)


def _plain_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    # Of a convolution, its patches were observed.
    return inputs if isinstance(layer, nn.Conv2d) else inputs.flatten(0, -2)


def tokens_in(layer: nn.Module, tensor: Tensor) -> torch.Size:
    """Return the shape of the tokens in inputs or outputs of `layer`; only that of the images for a convolution."""
    return tensor.shape[:1] if isinstance(layer, nn.Conv2d) and tensor.dim() == 4 else tensor.shape[:-1]


class _PaddingFilter:
    """Removes padding before a module of experts runs, and puts zeros there after.

    Within the module, tokens are sorted by expert, so that padding can no longer be recognised.
    """

    def __init__(self, observer: InputObserver) -> None:
        self.observer = observer
        self.keep: Tensor | None = None

    def drop(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.keep = self.observer.padding.keep
        if self.keep is None:
            return args, kwargs
        if not any(is_over_tokens(tensor, self.keep) for tensor in tensors_of((args, kwargs))):
            name = next(name for name, other in self.observer.filters.items() if other is module)
            refuse_rows(name, tensors_of((args, kwargs))[0].shape[:-1].numel())
        there: tuple[tuple[Any, ...], dict[str, Any]] = map_leaves(self._without_padding, (args, kwargs))
        return there

    def refill(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output if self.keep is None else map_leaves(self._with_padding, output)

    def _without_padding(self, leaf: Any) -> Any:
        if self.keep is None or not is_over_tokens(leaf, self.keep):
            return leaf
        keep = self.keep.to(leaf.device)
        return leaf[keep][None] if leaf.shape[:2] == keep.shape else leaf[keep.flatten()]

    def _with_padding(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or self.keep is None:
            return leaf
        keep, kept = self.keep.to(leaf.device), int(self.keep.sum())
        if leaf.shape[:2] == (1, kept):
            filled = leaf.new_zeros(*keep.shape, *leaf.shape[2:])
            filled[keep] = leaf[0]
            return filled
        if leaf.shape[:1] == (kept,):
            filled = leaf.new_zeros(keep.numel(), *leaf.shape[1:])
            filled[keep.flatten()] = leaf
            return filled
        return leaf


def is_over_tokens(leaf: Any, keep: Tensor) -> bool:
    """Return whether `leaf` is a tensor whose first dimensions are those of the mask `keep`, or one for both."""
    return isinstance(leaf, Tensor) and (leaf.shape[:2] == keep.shape or leaf.shape[:1] == (keep.numel(),))
