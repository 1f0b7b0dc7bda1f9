"""Observes the inputs of a block's weights while the block runs, those of fused experts included."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..model.blocks import base_model, called_layers
from ..model.weights import PRUNABLE_LAYERS, WeightView, input_rows, input_view
from .runner import Batch, Call, EnoughSeen


class InputObserver:
    """Reports the inputs of each weight, and the outputs of some layers, while a block runs within `hooks()`.

    The caller runs the block batch by batch and calls `before_batch` before each batch.

    Args:
        model: the model that the weights belong to.
        weights: the weights to observe, by name. They lie in the block that is run.
        record: called as `record(name, leader, rows)` for each weight that gets inputs. `leader` is the first weight
            that got the same input tensor on this batch; for that weight, it is `name` itself. `rows()` returns the
            inputs as (tokens, in) without padding.
        record_outputs: called as `record_outputs(name, rows)` for each layer whose output is W X plus its bias.
            `rows()` returns the outputs as (tokens, out) without padding.
        stopping: the block, if its output is not needed. `EnoughSeen` is then raised within the block as soon as all
            weights have been observed. None lets the block run to its end.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, WeightView],
        record: Callable[[str, str, Callable[[], Tensor]], None],
        record_outputs: Callable[[str, Callable[[], Tensor]], None],
        stopping: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.record = record
        self.record_outputs = record_outputs
        self.experts = {name: weight for name, weight in weights.items() if weight.expert is not None}
        self.stop = _Stop(len(weights), None if self.experts else stopping)
        self.batch: Batch | None = None
        # Tensors that the model passes to the block beside the hidden states, such as the encoder's states.
        self.contexts: list[Tensor] = []
        self.seen: list[tuple[Tensor, tuple[Any, ...], str]] = []
        self.keep: dict[str, Tensor | None] = {}

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe within the context; leave no hook behind."""
        called = called_layers(self.model)
        with contextlib.ExitStack() as undo:
            for name, weight in self.weights.items():
                if weight.expert is None:
                    layer = called.get(id(weight.layer), weight.layer)
                    undo.callback(layer.register_forward_pre_hook(partial(self._on_inputs, name)).remove)
                    if layer is weight.layer and type(layer) in PRUNABLE_LAYERS and _is_plain(layer):
                        undo.callback(layer.register_forward_hook(partial(self._on_outputs, name)).remove)
            if self.experts:
                expert_inputs = _ExpertInputs(self.experts, self._observe)
                for layer in {id(weight.layer): weight.layer for weight in self.experts.values()}.values():
                    undo.callback(layer.register_forward_pre_hook(expert_inputs.locate).remove)
                    padding = _PaddingFilter(self)
                    undo.callback(layer.register_forward_pre_hook(padding.drop).remove)
                    undo.callback(layer.register_forward_hook(padding.refill).remove)
                undo.enter_context(_eager_experts(self.model))
                undo.enter_context(expert_inputs)
            yield

    def before_batch(self, batch: Batch, call: Call) -> None:
        """Prepare for the next batch: `call` holds the arguments that the block is about to get."""
        self.batch = batch
        self.stop.before_batch()
        self.contexts = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
        self.seen.clear()

    def _on_inputs(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # `module` may be the adapter around the layer. How inputs become rows depends on the layer itself.
        self._observe(name, self.weights[name].layer, args[0])

    def _on_outputs(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.record_outputs(name, lambda: self._unpadded(name, _output_rows(module, output)))

    def _observe(self, name: str, layer: nn.Module, inputs: Tensor) -> None:
        view = input_view(layer)
        leader = next((other for known, same, other in self.seen if known is inputs and same == view), None)
        if leader is None:
            self.seen.append((inputs, view, name))
        assert self.batch is not None, "`before_batch` was not called"
        from_context = any(inputs is context for context in self.contexts)
        self.keep[name] = self.batch.keep_context if from_context else self.batch.keep
        self.record(name, leader or name, lambda: self._unpadded(name, input_rows(layer, inputs)))
        self.stop.saw(name)

    def _unpadded(self, name: str, rows: Tensor) -> Tensor:
        keep = self.keep[name]
        # Some models flatten sequences and tokens. Experts get no padding, see `_PaddingFilter`.
        if name in self.experts or keep is None or keep.numel() != rows.shape[0]:
            return rows
        return rows[keep.flatten().to(rows.device)]


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


class _PaddingFilter:
    """Removes padding before a module of fused experts runs, and puts zeros there after.

    Within the module, tokens are sorted by expert, so that padding can no longer be recognised.
    """

    def __init__(self, observer: InputObserver) -> None:
        self.observer = observer
        self.keep: Tensor | None = None

    def drop(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        mask = None if self.observer.batch is None else self.observer.batch.keep
        fits = mask is not None and mask.numel() == args[0].shape[0]
        self.keep = mask.flatten().to(args[0].device) if mask is not None and fits else None
        return None if self.keep is None else tuple(arg[self.keep] for arg in args)

    def refill(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.keep is None:
            return output
        filled = output.new_zeros(len(self.keep), *output.shape[1:])
        filled[self.keep] = output
        return filled


class _ExpertInputs(TorchFunctionMode):
    """Observes the inputs of fused experts: each tensor that is multiplied by a slice of their parameter."""

    def __init__(self, experts: dict[str, WeightView], observe: Callable[[str, nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.observe = observe
        self.layers: dict[int, dict[str, dict[int | None, str]]] = {}
        for name, weight in experts.items():
            self.layers.setdefault(id(weight.layer), {}).setdefault(weight.parameter, {})[weight.expert] = name
        self.located: dict[int, tuple[nn.Module, Tensor, dict[int | None, str]]] = {}

    def locate(self, layer: nn.Module, args: Any) -> None:
        """Note where the parameters of `layer` are in memory: an adapter replaces them while `layer` runs."""
        for parameter, names in self.layers[id(layer)].items():
            stored = getattr(layer, parameter)
            self.located[stored.untyped_storage().data_ptr()] = layer, stored, names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            found = self.located.get(args[1].untyped_storage().data_ptr())
            if found is not None:
                layer, stored, names = found
                expert = (args[1].storage_offset() - stored.storage_offset()) // stored.stride(0)
                if expert in names:
                    self.observe(names[expert], layer, args[0])
        return func(*args, **(kwargs or {}))


_PRODUCTS = {nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


@contextlib.contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Multiply by one expert after the other; a grouped kernel would not show the inputs of a single expert."""
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel):
        yield
        return
    before = inner.get_experts_implementation()
    inner.set_experts_implementation("eager")
    try:
        yield
    finally:
        inner.set_experts_implementation(before)
