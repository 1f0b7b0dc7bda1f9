"""Runs a model on tensors that have shapes and no values, and counts the bytes that are allocated at the same time.

A model whose parameters are fake tensors on the CPU runs the same code, and chooses the same kernels, as with values.
Its tensors are therefore freed at the same moments as in the run, and no formulas are needed. Only token ids have
values, because models read them, for example to find out whether sequences were packed.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from ..model.blocks import base_model
from ..model.empty import configuration_of, empty_model


Described: TypeAlias = nn.Module | PretrainedConfig | str | Path
Whole = TypeVar("Whole")
GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create within the context, until they are freed.

    Args:
        known: tensors that exist already. They and their views are not counted.
        gradient_share: number of devices among which a finished gradient is divided. This device keeps one part of it.
        units: groups of parameters whose gradients are reduced together. The reduction of a group makes a copy of its
            gradients, which is freed at the reduction of the next group.
    """

    def __init__(
        self, known: Iterable[Tensor] = (), gradient_share: int = 1, units: Iterable[list[nn.Parameter]] = ()
    ) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_beside_gradients = 0
        self.gradient_share = gradient_share
        self._units = {id(parameter): unit for unit in units for parameter in unit}
        self._waiting: dict[int, list[Tensor]] = {}
        self._underway = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._finished: set[int] = set()
        self._known: dict[int, Any] = {}
        self.know(known)

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Do not count `tensors` from now on."""
        # The storages are held, so that no other storage gets the same id.
        self._known |= {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = _run(func, args, dict(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def finished(self, parameter: Tensor) -> None:
        """Count the gradient of `parameter` as finished. This is a hook for after the accumulation."""
        if id(parameter) not in self._units:
            self._reduce([parameter])
            return
        unit = self._units[id(parameter)]
        waiting = self._waiting.setdefault(id(unit), [])
        waiting.append(parameter)
        if len(waiting) == len(unit):
            self._reduce(waiting)

    def finish(self) -> None:
        """Reduce the gradients whose group is incomplete. To be called at the end of the backward pass."""
        for waiting in self._waiting.values():
            self._reduce(waiting)

    def _reduce(self, waiting: list[Tensor]) -> None:
        if len(waiting) > 1:
            copied = sum(tensor.nbytes for tensor in waiting)
            # A gradient of an earlier batch has been divided already, and that of this batch is added to it.
            again = sum(tensor.nbytes for tensor in waiting if self._storage_of(tensor) in self._finished)
            self.peak = max(self.peak, self.live + self._underway + copied + again)
            self._underway = copied
        for tensor in waiting:
            self._shard(self._storage_of(tensor))
        waiting.clear()

    def _storage_of(self, parameter: Tensor) -> int:
        assert parameter.grad is not None
        return id(parameter.grad.untyped_storage())

    def _shard(self, key: int) -> None:
        if key in self._finished or key not in self._sizes:
            return
        self._finished.add(key)
        size = self._sizes[key]
        self._sizes[key] = size // self.gradient_share
        self.live -= size - self._sizes[key]
        self.gradients += self._sizes[key]

    def _add(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _: self._free(key))
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        self.peak_beside_gradients = max(self.peak_beside_gradients, self.live - self.gradients)

    def _free(self, key: int) -> None:
        self.live -= self._sizes[key]
        if key in self._finished:
            self.gradients -= self._sizes[key]
            self._finished.remove(key)
        del self._sizes[key], self._references[key]


def described(model: Described, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a model on the meta device.

    Args:
        model: a model, of which a copy is made; a configuration; or the folder or name of a saved model.
        dtype: dtype of the parameters. None keeps their own.

    Raises:
        ValueError: the configuration does not name exactly one class of transformers, or parameters are quantised.
    """
    if isinstance(model, nn.Module):
        copied = replaced(model, [model], lambda tensor: tensor.to("meta"), {})
    else:
        copied = empty_model(configuration_of(model))
    for name, parameter in copied.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"Expected floating-point parameters, got {parameter.dtype} for {name!r}: quantised layers cannot be "
                "simulated. Plan the model in half precision, which gives an upper bound."
            )
    return copied if dtype is None else copied.to(dtype)


class Simulation:
    """Replaces tensors by fake tensors, which have no values. A tensor or module always gets the same replacement."""

    def __init__(self, mode: FakeTensorMode | None = None) -> None:
        self.mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.memo: dict[int, Any] = {}

    def of(self, whole: Whole, *modules: nn.Module) -> Whole:
        """Return a copy of `whole` in which the parameters and buffers of `modules` are fake."""
        return replaced(whole, modules, self.fake, self.memo)

    def fake(self, tensor: Tensor) -> Tensor:
        """Return a fake of the shape and dtype of `tensor`, on the CPU."""
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


@contextlib.contextmanager
def refusing(model: nn.Module) -> Iterator[None]:
    """Turn any error that leaves the context into a ValueError which says that `model` cannot be simulated."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        raise ValueError(
            f"{type(base_model(model)).__name__} cannot be run on tensors without values ({reason}). Pass a language "
            "model with its head. If there are several implementations of attention or experts, choose one that does "
            'not read values, such as `experts_implementation="grouped_mm"`.'
        ) from error


def replaced(
    whole: Whole, modules: Iterable[nn.Module], by: Callable[[Tensor], Tensor], memo: dict[int, Any]
) -> Whole:
    """Return a copy of `whole` with `by(tensor)` for every parameter and buffer of `modules`. Tied tensors stay tied.

    Args:
        whole: a module, or any object that holds modules.
        modules: the modules whose tensors are replaced.
        by: tensor -> its replacement.
        memo: the replacement of each tensor and module, by the id of the original. It is extended in place.
    """
    for module in modules:
        for parameter in module.parameters():
            if id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(by(parameter.detach()), requires_grad=parameter.requires_grad)
        for buffer in module.buffers():
            if id(buffer) not in memo:
                memo[id(buffer)] = by(buffer)
    return copy.deepcopy(whole, memo)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return how many bytes `tensors` hold. A tensor that is listed twice is counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # torch computes the shapes of grouped products only in bfloat16. The shapes are the same in other dtypes.
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)
