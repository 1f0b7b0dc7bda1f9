"""Several processes that prune one model together: what is shared out among them, and sums over what each one has.

Whoever has no process group is a group of one: nothing is sent and nothing waits. Every process makes the same calls
in the same order; where one fails, the others learn of it in their next call.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed


Item = TypeVar("Item")

# Elements that are sent together: enough to hide what a call costs, few enough to be held twice.
_BUCKET = 1 << 22


class OtherProcessError(RuntimeError):
    """Another process failed, and says itself why."""


def place() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share_of(items: Sequence[Item]) -> list[Item]:
    """Return those of `items` that are this process's: r, r + processes, ... of process r; none if there are fewer."""
    rank, processes = place()
    return list(items[rank::processes])


def exchange(value: Any) -> list[Any]:
    """Return the `value` of every process, in their order; each must be picklable.

    Raises:
        OtherProcessError: another process left `working_together` by an error.
    """
    if place()[1] == 1:
        return [value]
    met = _gathered((value, None))
    failed = [(rank, failure) for rank, (_, failure) in enumerate(met) if failure is not None]
    if failed:
        rank, failure = failed[0]
        raise OtherProcessError(
            f"Expected all processes to come this far, but process {rank} stopped with {failure}. Mend that; nothing "
            "is wrong in this one."
        )
    return [value for value, _ in met]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each of `tensors` by its sum over all processes, bit for bit the same in each. In place.

    Number, shapes and dtypes must agree in all processes. Small tensors are sent together.

    Raises:
        OtherProcessError: as `exchange`.
    """
    if place()[1] == 1:
        return
    # Whoever failed comes to an exchange, and would never come to a sum.
    exchange(None)
    for bucket in _buckets(tensors):
        # Of a single tensor no copy is made.
        flat = torch.cat([tensor.flatten() for tensor in bucket]) if len(bucket) > 1 else bucket[0].flatten()
        parts = total_of(flat).split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def total_of(tensor: Tensor, group: Any = None) -> Tensor:
    """Return the sum of `tensor`, which is used up, over the processes of `group`, by default of all."""
    sums = tensor.to(_where_sums_are_made(tensor.device, group))
    distributed.all_reduce(sums, group=group)
    return sums.to(tensor.device)


@contextlib.contextmanager
def working_together(call: str) -> Iterator[None]:
    """Within the context, an error of one process stops all: it keeps its own, the others get `OtherProcessError`.

    Args:
        call: what is done and with what, in words; all processes must say the same, and enter the context at all.

    Raises:
        ValueError: another process was asked to do something else.
    """
    try:
        _check_agreed(call)
        yield
    except OtherProcessError:
        raise
    except Exception as error:
        if place()[1] > 1:
            _gathered((None, f"{type(error).__name__}: {error}"))
        raise
    exchange(None)


def _check_agreed(call: str) -> None:
    calls = exchange(call)
    for rank, other in enumerate(calls):
        if other != calls[0]:
            raise ValueError(
                f"Expected the same call in all {len(calls)} processes, got {calls[0]!r} in process 0 and {other!r} "
                f"in process {rank}. Give all the same model, arguments and calibration: they share the work."
            )


def _gathered(item: tuple[Any, str | None]) -> list[tuple[Any, str | None]]:
    met: list[Any] = [None] * place()[1]
    distributed.all_gather_object(met, item)
    return met


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return `tensors` in lists of one dtype and device each, that hold `_BUCKET` elements or a single tensor."""
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
    """Return `device` if the backend sends what lies there, else the kind of device it does send from."""
    kinds = [pair.partition(":")[0] for pair in str(distributed.get_backend_config(group)).split(",")]
    return device if device.type in kinds else torch.device(kinds[0])
