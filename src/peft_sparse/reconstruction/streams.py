"""The hidden states of all batches on their way through the regions, and what a window of blocks is fed."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..calibration.activations import Activations, ActivationStore
from ..calibration.runner import BlockRunner, Call
from .regions import Region, widened, widened_call


class Stream:
    """The hidden states of all batches on their way through the regions."""

    def __init__(self, runner: BlockRunner, activations: Activations) -> None:
        self.batches = runner.batches
        self.store = ActivationStore(activations)
        start = [runner.store.get(batch.hidden) for batch in runner.batches]
        self.dtype = start[0].dtype
        self.values = [self.store.put(f"in-{i}", value) for i, value in enumerate(start)]
        self.carried = list(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return self.store.get(self.values[index])

    def advance(self, region: Region, index: int, outputs: Tensor) -> None:
        """Replace the hidden states of batch `index`, or keep the outputs until the region beside this one is done."""
        outputs = outputs.detach()
        if region.joins == "input":
            self.carried[index] = self.store.put(f"carried-{index}", outputs)
            return
        if region.joins == "output":
            outputs = outputs + self.store.get(self.carried[index]).to(outputs) - self[index].to(outputs)
        self.values[index] = self.store.put(f"in-{index}", outputs.to(self.dtype))


class Window:
    """Some blocks in a row, and what they are fed: inputs and arguments, on their device and in float32."""

    def __init__(self, stream: Stream, first: int, blocks: dict[str, nn.Module]) -> None:
        self.batches, self.first, self.blocks, self.stream = stream.batches, first, blocks, stream
        self.device = next(next(iter(blocks.values())).parameters()).device

    def inputs(self, index: int, stream: Stream | None = None) -> Tensor:
        """Return the hidden states of a batch before the window."""
        return widened((stream or self.stream)[index].to(self.device))

    def calls(self, index: int, stream: Stream | None = None) -> list[Call]:
        """Return the arguments of every block for a batch."""
        chosen = (stream or self.stream).batches[index].calls[self.first : self.first + len(self.blocks)]
        placed = [Call(send_to_device(c.args, self.device), send_to_device(c.kwargs, self.device)) for c in chosen]
        return [widened_call(call) for call in placed]

    def keep(self, index: int) -> Tensor | None:
        """Return which tokens of a batch are not padding."""
        keep = self.batches[index].keep
        return None if keep is None else keep.to(self.device)

    def outputs(self, region: Region, index: int, stream: Stream | None = None) -> Tensor:
        """Return what `region` makes of a batch."""
        return region(self.inputs(index, stream), self.calls(index, stream))


@contextlib.contextmanager
def held_wide(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the parameters of `blocks` in float32 where they are in half precision."""
    changed = [
        (parameter, parameter.dtype)
        for block in blocks
        for parameter in block.parameters()
        if parameter.dtype in (torch.float16, torch.bfloat16)
    ]
    for parameter, _ in changed:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in changed:
            parameter.data = parameter.data.to(dtype)
