"""The hidden states of all batches between the regions, and the inputs that a window of blocks gets from them."""

from pathlib import Path

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from ..calibration.activations import Activations, ActivationStore
from ..calibration.recording import Link, same_values, tensors_of
from ..calibration.residence import staying
from ..calibration.runner import BlockRunner
from .calls import StateCall, chain_of
from .regions import Region


class Stream:
    """The hidden states of all batches before the current region of one stack.

    Args:
        runner: the stack, with its batches before the first block.
        activations: where the hidden states wait: "device", "cpu" or "disk".

    Raises:
        ValueError: a batch runs other blocks than another one, or in another order.
    """

    def __init__(self, runner: BlockRunner, activations: Activations) -> None:
        self.batches = runner.batches
        self.store = ActivationStore(activations)
        # The blocks that run, in their order.
        self.names = [runner.names[index] for index in runner.order if runner.runs(index)]
        self.values: list[Tensor | Path] = []
        self.calls: list[list[StateCall]] = []
        self._first: dict[Link, Tensor] = {}
        with staying(runner.stack.residence) as residence:
            for number, batch in enumerate(runner.batches):
                state, calls = chain_of(runner, batch, self._shared, residence)
                self.dtype = state.dtype
                self.values.append(self.store.put(f"in-{number}", state))
                self.calls.append(calls)
        self.carried = list(self.values)

    def _shared(self, link: Link, tensor: Tensor) -> Tensor:
        """Return what is kept of what a block computed for other blocks: once for all batches in which it is equal."""
        tensor = tensor.cpu() if self.store.offload else tensor
        first = self._first.setdefault(link, tensor)
        return first if same_values(first, tensor) else tensor

    def on(self, device: torch.device, index: int) -> Tensor:
        """Return the hidden states of batch `index` on a device."""
        return self.store.get(self.values[index], device)

    def advance(self, region: Region, index: int, outputs: Tensor) -> None:
        """Replace the hidden states of batch `index` by the outputs of `region`.

        With a parallel residual, the outputs of the attention are stored until the MLP has run. Both outputs are then
        added, and the input, which both contain, is subtracted once.
        """
        outputs = outputs.detach()
        if region.joins == "input":
            self.carried[index] = self.store.put(f"carried-{index}", outputs)
            return
        if region.joins == "output":
            carried, inputs = self.store.get(self.carried[index], outputs.device), self.on(outputs.device, index)
            outputs = outputs + carried.to(outputs) - inputs.to(outputs)
        room = self.values[index] if self.values[index] is not self.carried[index] else None
        self.values[index] = self.store.put(f"in-{index}", outputs.to(self.dtype), room)


class Targets:
    """The outputs that a region is fitted to, one tensor for each batch.

    Args:
        activations: where the targets wait: "device", "cpu" or "disk".
        device: the device on which they are returned.
    """

    def __init__(self, activations: Activations, device: torch.device) -> None:
        self.store, self.device = ActivationStore(activations), device
        self.values: list[Tensor | Path] = []

    def __getitem__(self, index: int) -> Tensor:
        return self.store.get(self.values[index], self.device)

    def expect(self, index: int) -> None:
        """Begin to copy the targets of a batch to the GPU, if they wait in CPU memory."""
        self.store.expect(self.values[index], self.device)

    def append(self, outputs: Tensor) -> None:
        """Keep the outputs of the next batch."""
        self.values.append(self.store.put(str(len(self.values)), outputs))


class Window:
    """Consecutive blocks that are in memory together, and their inputs, on their device and in float32.

    Args:
        stream: the hidden states that the blocks receive.
        first: number of the first block among those that run.
        blocks: the blocks, by name.
    """

    def __init__(self, stream: Stream, first: int, blocks: dict[str, nn.Module]) -> None:
        self.batches, self.first, self.blocks, self.stream = stream.batches, first, blocks, stream
        self.device = next(next(iter(blocks.values())).parameters()).device

    def inputs(self, index: int, stream: Stream | None = None) -> Tensor:
        """Return the hidden states of a batch before the window, (sequences, tokens, features)."""
        inputs: Tensor = convert_to_fp32((stream or self.stream).on(self.device, index))
        return inputs

    def expect(self, index: int, stream: Stream | None = None) -> None:
        """Begin to copy to the GPU what `inputs` and `calls` will return for a batch, if it waits in CPU memory."""
        stream = stream or self.stream
        stream.store.expect(stream.values[index], self.device)
        for constant in tensors_of([(call.args, call.kwargs) for call in self._recorded(index, stream)]):
            stream.store.expect(constant, self.device)

    def calls(self, index: int, stream: Stream | None = None) -> list[StateCall]:
        """Return the call of every block for a batch."""
        stream = stream or self.stream
        return [call.ready(self.device, stream.store.get) for call in self._recorded(index, stream)]

    def _recorded(self, index: int, stream: Stream) -> list[StateCall]:
        return stream.calls[index][self.first : self.first + len(self.blocks)]

    def keep(self, index: int) -> Tensor | None:
        """Return which tokens of a batch are not padding, (sequences, tokens), or None without padding."""
        keep = self.batches[index].padding.keep
        return None if keep is None else self.stream.store.get(keep, self.device)

    def outputs(self, region: Region, index: int, stream: Stream | None = None) -> Tensor:
        """Return the outputs of `region` for a batch."""
        return region(self.inputs(index, stream), self.calls(index, stream))
