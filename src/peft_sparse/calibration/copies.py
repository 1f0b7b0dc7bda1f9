"""Copies what waits in the memory of the host to a GPU, and what a GPU computed to there, beside the computation."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor


Item = TypeVar("Item")


class Copies:
    """Copies between GPUs and pinned memory, for each GPU on a stream of its own.

    Within `overlapping()` a GPU copies while it computes. Outside of it, what is asked of the GPU next waits for each
    copy. The host never waits, but in `wait`. These rules hold in whatever order a GPU does what it is free to do:

    - A copy begins when all is done that its GPU was asked for before: what writes the value that is copied, and what
      uses the memory into which it is copied.
    - A GPU makes its copies in their order, so that a value is written before it is fetched again. It fetches what
      another GPU wrote after that was written.
    - What is asked of the GPU after `fetch` comes after the copy.
    - Memory of a GPU that a copy reads or writes is held until the stream that computes waits for the copy. Who gets
      this memory next comes after that.

    What computes must use the current stream of its GPU, and the same one within `overlapping()`.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # The last copy from each GPU.
        self._written: dict[torch.device, torch.cuda.Event] = {}
        # What is on its way: (the tensor in the memory of the host, its copy on the GPU, when it has arrived).
        self._arriving: dict[tuple[int, torch.device], tuple[Tensor, Tensor, torch.cuda.Event]] = {}
        # The last value that each GPU writes, and when it is written.
        self._leaving: dict[torch.device, tuple[Tensor, torch.cuda.Event]] = {}
        self._overlap = False

    @contextlib.contextmanager
    def overlapping(self) -> Iterator[None]:
        """Let GPUs copy and compute at the same time. After the context, also after an error, no copy is pending."""
        self._overlap = True
        try:
            yield
        finally:
            self._overlap = False
            for device in list(self._leaving):
                self._let_go(device)
            for (_, device), (_, _, arrived) in self._arriving.items():
                torch.cuda.current_stream(device).wait_event(arrived)
            self._arriving.clear()

    def expect(self, source: Tensor, device: torch.device) -> None:
        """Begin to copy `source`, which `fetch` will return within `overlapping()`. Outside of it, do nothing."""
        if self._overlap and (id(source), device) not in self._arriving:
            self._arriving[id(source), device] = self._begin(source, device)

    def fetch(self, source: Tensor, device: torch.device) -> Tensor:
        """Return a copy on `device` of a tensor in the memory of the host."""
        expected = (id(source), device) in self._arriving
        _, there, arrived = self._arriving.pop((id(source), device)) if expected else self._begin(source, device)
        torch.cuda.current_stream(device).wait_event(arrived)
        return there

    def write(self, value: Tensor, room: Tensor) -> None:
        """Copy `value` from its GPU into `room`, which is in pinned memory. Read it by `fetch`, or after `wait`."""
        copying = self._after_computation(value.device)
        with torch.cuda.stream(copying):
            room.copy_(value, non_blocking=True)
        written = copying.record_event()
        self._let_go(value.device)
        self._written[value.device], self._leaving[value.device] = written, (value, written)
        if not self._overlap:
            self._let_go(value.device)

    def wait(self) -> None:
        """Let the host wait for all that is being written."""
        for written in self._written.values():
            written.synchronize()

    def _begin(self, source: Tensor, device: torch.device) -> tuple[Tensor, Tensor, torch.cuda.Event]:
        # From memory that is not pinned, a copy would make the host wait. The allocator holds the pinned one for it.
        pinned = source if source.is_pinned() else source.contiguous().pin_memory()
        # Before the copy is told what it waits for: this memory belongs to the stream that computes.
        there = torch.empty_like(pinned, device=device)
        copying = self._after_computation(device)
        for written in self._written.values():
            copying.wait_event(written)
        with torch.cuda.stream(copying):
            there.copy_(pinned, non_blocking=True)
        return source, there, copying.record_event()

    def _after_computation(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream on which a GPU copies. It copies after all that the GPU was asked for so far."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]

    def _let_go(self, device: torch.device) -> None:
        """Let what a GPU computes next wait until the last value is written, and free the value."""
        if device in self._leaving:
            torch.cuda.current_stream(device).wait_event(self._leaving[device][1])
            del self._leaving[device]


def ahead(items: Iterable[Item], expect: Callable[[Item], None]) -> Iterator[Item]:
    """Yield `items`. `expect` is called with each of them before the one before it is yielded."""
    earlier: list[Item] = []
    for item in items:
        expect(item)
        yield from earlier
        earlier = [item]
    yield from earlier
