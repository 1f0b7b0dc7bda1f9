"""Runs a model on one batch and notes which channels each layer makes and reads.

This is neither `torch.fx` nor a table of architectures. The model runs as it is, torch's dispatcher shows every
operation between its layers, and hooks show the layers. An operation without a rule pins the channels that reach it.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..calibration.inputs import tensors_in
from .channels import Channels, Labels, channels_after


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
# The layers whose channels are known. Others are operations.
TRACED_LAYERS = (nn.Conv2d, nn.Linear, *_NORMS)


@dataclass
class Traced:
    """What a run of a model showed. Modules are named; labels are those of `labels`.

    Args:
        labels: all labels.
        rows: the labels (out,) of the outputs of each convolution and linear layer that ran.
        columns: the labels of its inputs, (in,); of a convolution with groups those of one group, (in / groups,).
            Layers that read no channels, such as the first one, have none. Nor have depthwise convolutions: their
            inputs have the labels of their outputs.
        norms: the labels of the channels of each batch or instance normalisation.
    """

    labels: Labels = field(default_factory=Labels)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)
    norms: dict[str, tuple[int, ...]] = field(default_factory=dict)


def traced(model: nn.Module, batch: dict[str, Any]) -> Traced:
    """Run `model` on `batch`, and return what channels its layers make and read."""
    trace = _ChannelTrace()
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, TRACED_LAYERS):
                hooks.enter_context(_watched(trace, name, module))
        with torch.no_grad(), trace:
            outputs = model(**batch)
    values = list(outputs.to_tuple()) if hasattr(outputs, "to_tuple") else outputs
    for tensor in (*tensors_in(values), *(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))):
        trace.pin([tensor], "the model returns them")
    _pin_shared(model, trace.found)
    return trace.found


@contextlib.contextmanager
def _watched(trace: "_ChannelTrace", name: str, module: nn.Module) -> Iterator[None]:
    before = module.register_forward_pre_hook(trace.enter, prepend=True)
    after = module.register_forward_hook(partial(trace.leave, name))
    try:
        yield
    finally:
        before.remove()
        after.remove()


class _ChannelTrace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = Traced()
        self.marks: Any = WeakIdKeyDictionary()
        # Number of layers that are running. What happens inside of them is known.
        self.inside = 0

    def of(self, value: Any) -> Channels | None:
        return self.marks.get(value) if isinstance(value, Tensor) else None

    def pin(self, tensors: Any, reason: str) -> None:
        for tensor in tensors:
            if (own := self.of(tensor)) is not None:
                self.found.labels.pin(own.labels, reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.inside:
            given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
            if any(self.of(tensor) is not None for tensor in given):
                self._follow(func, args, given, output)
        return output

    def _follow(self, func: Any, args: Any, given: list[Tensor], output: Any) -> None:
        labels, known = self.found.labels, False
        for result in (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            # A write into a part of another tensor is not followed.
            written = bool(args) and result is args[0] and self.of(result) is None
            channels = None if written else channels_after(func, args, result, self.of, labels)
            if channels is None:
                known = False
                break
            self.marks[result], known = channels, True
        if not known:
            self.pin(given, f"they reach the operation `{func.overloadpacket.__name__}`, which may mix them")

    def enter(self, module: nn.Module, args: Any) -> None:
        self.inside += 1

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.inside -= 1
        if self.inside or not args or not isinstance(output, Tensor):
            return
        given = self.of(args[0])
        if isinstance(module, nn.Conv2d):
            self._conv(name, module, args[0], given, output)
        elif isinstance(module, nn.Linear):
            given = self._at(args[0], given, args[0].dim() - 1, name)
            self._note(self.found.columns, name, None if given is None else given.labels)
            self.marks[output] = Channels(output.dim() - 1, self._rows(name, module.out_features))
        else:
            given = self._at(args[0], given, 1, name)
            self._note(self.found.norms, name, None if given is None else given.labels)
            if given is not None:
                self.marks[output] = given

    def _conv(self, name: str, conv: nn.Conv2d, x: Tensor, given: Channels | None, output: Tensor) -> None:
        labels, rows = self.found.labels, self._rows(name, conv.out_channels)
        self.marks[output] = Channels(output.dim() - 3, rows)
        given = self._at(x, given, x.dim() - 3, name)
        groups, own = conv.groups, None if given is None else given.labels
        if groups > 1 and conv.in_channels == groups:
            if own is None:
                labels.pin(rows, "they are made from single channels that no layer makes")
            else:
                labels.unite((label for label in own for _ in range(conv.out_channels // groups)), rows)
            return
        # Groups stay equally large if the same places are removed from each of them.
        rows_of_group, columns = conv.out_channels // groups, conv.in_channels // groups
        labels.unite(rows, rows[:rows_of_group] * groups)
        if own is not None:
            labels.unite(own, own[:columns] * groups)
        self._note(self.found.columns, name, None if own is None else own[:columns])

    def _at(self, x: Tensor, given: Channels | None, dim: int, name: str) -> Channels | None:
        """Return `given` if it is at `dim`. Otherwise the layer mixes these channels, or is one for each of them."""
        if given is not None and given.dim != dim:
            self.pin([x], f"they are no channels for {name!r}, which reads them")
            return None
        return given

    def _rows(self, name: str, count: int) -> tuple[int, ...]:
        if name not in self.found.rows:
            self.found.rows[name] = self.found.labels.fresh(count)
        return self.found.rows[name]

    def _note(self, noted: dict[str, tuple[int, ...]], name: str, labels: tuple[int, ...] | None) -> None:
        """Note what a layer reads, () if no layer makes it. What it reads when it runs again belongs together."""
        first, labels = noted.setdefault(name, labels or ()), labels or ()
        if len(first) == len(labels):
            self.found.labels.unite(first, labels)
            return
        self.found.labels.pin((*first, *labels), f"{name!r} also reads inputs that no layer makes")
        noted[name] = first or labels


def _pin_shared(model: nn.Module, found: Traced) -> None:
    """Pin the channels of layers that share a parameter with another module."""
    modules = dict(model.named_modules())
    users = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    for name in {*found.rows, *found.norms}:
        if any(users[id(p)] > 1 for p in modules[name]._parameters.values() if p is not None):
            for parts in (found.rows, found.columns, found.norms):
                found.labels.pin(parts.get(name, ()), f"{name!r} shares a parameter with another layer")
