"""Sees the inputs of a block's weights while it runs, those of fused experts included."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..model.blocks import base_model, called_layers
from ..model.weights import PRUNABLE_LAYERS, WeightView, input_rows, input_view
from .runner import Batch, Call, EnoughSeen


@contextlib.contextmanager
def observed(
    model: nn.Module,
    weights: dict[str, WeightView],
    record: Callable[[str, str, Callable[[], Tensor]], None],
    record_outputs: Callable[[str, Callable[[], Tensor]], None],
    stopping: nn.Module | None = None,
) -> Iterator[Callable[[Batch, Call], None]]:
    """Call `record(name, leader, rows)` for the inputs of each weight whenever its block runs.

    `leader` is the weight that was given the same inputs first, `name` itself if none was; `rows()` returns them as
    (tokens, in) without padding. `record_outputs(name, rows)` is called where a layer's outputs are seen, for those
    whose `rows()` (tokens, out) are W X and a bias. Yields what `runner.run` calls before each batch.

    Args:
        stopping: the block that is run, if nobody needs what comes out of it: `EnoughSeen` is raised in it when no
            weight is left to be seen.
    """
    batch: Batch
    contexts: list[Tensor] = []
    seen: list[tuple[Tensor, tuple[Any, ...], str]] = []

    def before_batch(next_batch: Batch, call: Call) -> None:
        nonlocal batch
        batch = next_batch
        stop.before_batch()
        contexts[:] = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
        seen.clear()

    def see(name: str, layer: nn.Module, inputs: Tensor) -> None:
        view = input_view(layer)
        leader = next((other for known, same, other in seen if known is inputs and same == view), None)
        if leader is None:
            seen.append((inputs, view, name))
        keep = batch.keep_context if any(inputs is context for context in contexts) else batch.keep

        def rows() -> Tensor:
            return unpadded(name, input_rows(layer, inputs), keep)

        record(name, leader or name, rows)
        kept[name] = keep
        stop.saw(name)

    def unpadded(name: str, found: Tensor, keep: Tensor | None) -> Tensor:
        # Some models flatten sequences and tokens; experts are given no padding.
        if name in experts or keep is None or keep.numel() != found.shape[0]:
            return found
        return found[keep.flatten().to(found.device)]

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, module, args[0])

    def output_hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: record_outputs(
            name, lambda: unpadded(name, _output_rows(module, output), kept[name])
        )

    kept: dict[str, Tensor | None] = {}
    experts = {name: weight for name, weight in weights.items() if weight.expert is not None}
    stop = _Stop(len(weights), None if experts else stopping)
    expert_inputs = _ExpertInputs(experts, see)
    called = called_layers(model)
    with contextlib.ExitStack() as undo:
        for name, weight in weights.items():
            if weight.expert is None:
                layer = called.get(id(weight.layer), weight.layer)
                undo.callback(layer.register_forward_pre_hook(hook(name)).remove)
                if layer is weight.layer and type(layer) in PRUNABLE_LAYERS and _is_plain(layer):
                    undo.callback(layer.register_forward_hook(output_hook(name)).remove)
        for layer in {id(weight.layer): weight.layer for weight in experts.values()}.values():
            undo.callback(layer.register_forward_pre_hook(expert_inputs.locate).remove)
            undo.enter_context(_without_padding(layer, lambda: batch.keep))
        if experts:
            undo.enter_context(_eager_experts(model))
            undo.enter_context(expert_inputs)
        yield before_batch


class _Stop:
    """Ends the run of a block once each of `count` weights was seen; what follows would be computed for nothing.

    Only where a whole run before has called no layer twice, and where no one else waits for a module to return.
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
    """Tell whether nothing but its own class has a say in what `module` returns."""
    return not module._forward_hooks and "forward" not in module.__dict__


def _output_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the outputs of `layer` as (tokens, out), the tokens in the order of `input_rows`."""
    return output.flatten(2).mT.flatten(0, 1) if isinstance(layer, nn.Conv2d) else output.flatten(0, -2)


@contextlib.contextmanager
def _without_padding(experts: nn.Module, keep: Callable[[], Tensor | None]) -> Iterator[None]:
    """Hand `experts` no padding: inside, tokens are sorted by expert, and padding cannot be told any more."""
    kept: Tensor | None = None

    def drop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal kept
        mask = keep()
        fits = mask is not None and mask.numel() == args[0].shape[0]
        kept = mask.flatten().to(args[0].device) if mask is not None and fits else None
        return None if kept is None else tuple(arg[kept] for arg in args)

    def refill(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if kept is None:
            return output
        filled = output.new_zeros(len(kept), *output.shape[1:])
        filled[kept] = output
        return filled

    hooks = [experts.register_forward_pre_hook(drop), experts.register_forward_hook(refill)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _ExpertInputs(TorchFunctionMode):
    """Sees the inputs of fused experts: whatever is multiplied by a slice of a parameter that holds them."""

    def __init__(self, experts: dict[str, WeightView], see: Callable[[str, nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self.layers: dict[int, dict[str, dict[int | None, str]]] = {}
        for name, weight in experts.items():
            self.layers.setdefault(id(weight.layer), {}).setdefault(weight.parameter, {})[weight.expert] = name
        self.located: dict[int, tuple[nn.Module, Tensor, dict[int | None, str]]] = {}

    def locate(self, layer: nn.Module, args: Any) -> None:
        """Find the parameters of `layer`, which is about to run: an adapter puts others in their place meanwhile."""
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
                    self.see(names[expert], layer, args[0])
        return func(*args, **(kwargs or {}))


_PRODUCTS = {nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


@contextlib.contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Have the experts multiplied one by one, not by one grouped kernel that shows no single expert's inputs."""
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
