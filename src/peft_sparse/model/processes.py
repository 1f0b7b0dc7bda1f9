"""Shares work among the processes of a `torch.distributed` group, and adds up their results.

Without a process group, this process does all the work: nothing is sent and nothing waits. With one, every process
must make the same calls in the same order. If one process fails within `working_together`, the others raise an error
at their next call.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed


Item = TypeVar("Item")

# Up to this number of elements are copied and sent together. With so many, the cost of a call does not matter.
_BUCKET = 1 << 22


class OtherProcessError(RuntimeError):
    """Another process failed. Its own error says why."""


def place() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share_of(items: Sequence[Item]) -> list[Item]:
    """Return the `items` of this process: numbers r, r + n, r + 2n, ... in process r of n. The list may be empty."""
    rank, processes = place()
    return list(items[rank::processes])


def exchange(value: Any) -> list[Any]:
    """Return the `value` of every process, in the order of their ranks. Values must be picklable.

    Raises:
        OtherProcessError: another process raised an error within `working_together`.
    """
    if place()[1] == 1:
        return [value]
    met = _gathered((value, None))
    failed = [(rank, failure) for rank, (_, failure) in enumerate(met) if failure is not None]
    if failed:
        rank, failure = failed[0]
        raise OtherProcessError(
            f"Expected all processes to reach this step, but process {rank} stopped with {failure}. Correct the error "
            "there. This process did not fail."
        )
    return [value for value, _ in met]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each of `tensors` by its sum over all processes. In place.

    The sums are bit for bit the same in every process. All processes must give the same number of tensors, of the same
    shapes and dtypes. Small tensors are sent together.

    Raises:
        OtherProcessError: another process raised an error within `working_together`.
    """
    if place()[1] == 1:
        return
    # A process that failed takes part in the next exchange, but never in a sum: the others would wait for ever.
    exchange(None)
    for bucket in _buckets(tensors):
        # A single tensor is not copied.
        flat = torch.cat([tensor.flatten() for tensor in bucket]) if len(bucket) > 1 else bucket[0].flatten()
        parts = total_of(flat).split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def total_of(tensor: Tensor, group: Any = None) -> Tensor:
    """Return the sum of `tensor` over the processes of `group`, by default all. `tensor` may be overwritten."""
    sums = tensor.to(_where_sums_are_made(tensor.device, group))
    distributed.all_reduce(sums, group=group)
    return sums.to(tensor.device)


def spread(tensor: Tensor, rank: int) -> None:
    """Replace `tensor` in every process by that of process `rank`. In place.

    All processes must give tensors of the same shape and dtype, and have met in `exchange` before.
    """
    sent = tensor.detach().to(_where_sums_are_made(tensor.device, None)).contiguous()
    distributed.broadcast(sent, rank)
    tensor.copy_(sent)


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """Within the context, an error in one process stops all: the others raise `OtherProcessError`.

    All processes must enter the context together. Contexts of this kind must not be nested.

    Raises:
        OtherProcessError: another process raised an error within the context.
    """
    try:
        yield
    except OtherProcessError:
        raise
    except Exception as error:
        if place()[1] > 1:
            _gathered((None, f"{type(error).__name__}: {error}"))
        raise
    exchange(None)


@contextlib.contextmanager
def working_together(call: str) -> Iterator[None]:
    """Within the context, an error in one process stops all: the others raise `OtherProcessError`.

    All processes must enter the context together.

    Args:
        call: the work and its arguments, in words. It must be the same in all processes.

    Raises:
        ValueError: another process gave another `call`.
        OtherProcessError: another process raised an error within the context.
    """
    with stopping_together():
        agree(call)
        yield


def agree(call: str) -> None:
    """Check that all processes do the same work. It is called within `stopping_together`.

    Args:
        call: the work and its arguments, in words. It must be the same in all processes.

    Raises:
        ValueError: another process gave another `call`.
    """
    calls = exchange(call)
    for rank, other in enumerate(calls):
        if other != calls[0]:
            raise ValueError(
                f"Expected the same call in all {len(calls)} processes, got {calls[0]!r} in process 0 and {other!r} "
                f"in process {rank}. Give all processes the same model, arguments and calibration, because they share "
                "the work."
            )


def _gathered(item: tuple[Any, str | None]) -> list[tuple[Any, str | None]]:
    met: list[Any] = [None] * place()[1]
    distributed.all_gather_object(met, item)
    return met


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Split `tensors` into lists of one dtype and device, each of at most `_BUCKET` elements or a single tensor."""
    buckets: list[list[Tensor]] = []
    kind, size = None, 0
    for tensor in tensors:
        own = (tensor.dtype, tensor.device)
        if own != kind or size + tensor.numel() > _BUCKET:
            buckets.append([])
            kind, size = own, 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets


def _where_sums_are_made(device: torch.device, group: Any) -> torch.device:
    """Return `device` if the backend can send tensors from there, or else a device it can send from."""
    kinds = [pair.partition(":")[0] for pair in str(distributed.get_backend_config(group)).split(",")]
    return device if device.type in kinds else torch.device(kinds[0])
