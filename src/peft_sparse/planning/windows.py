"""The memory of the windows of a reconstruction: one window of each kind is pruned and fitted without values."""

import contextlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..calibration.runner import BlockRunner
from ..calibration.statistics import SAMPLED_TOKENS
from ..model.blocks import attention_and_mlp
from ..model.masks import mask_of
from ..model.weights import WeightView
from ..pruning.least_squares import LeastSquares
from ..reconstruction.calls import StateCall, chain_of
from ..reconstruction.division import hands_on
from ..reconstruction.parameters import held_in_float32
from ..reconstruction.regions import Region, blocks_together, regions_by_names, regions_of_blocks
from ..reconstruction.task import ReconstructionTask
from ..reconstruction.trainable import trainable
from .pruning_costs import measured_bytes, selecting_bytes
from .simulation import LiveBytes, Simulation, bytes_of


@dataclass
class Windows:
    """The windows of all stacks, divided as in a run. One window of each kind is simulated.

    Args:
        task: what is pruned and fitted and how.
        batches: number of tokens of each batch.
        simulation: makes tensors without values.
        regions: number of regions that were counted.
        windows: (bytes in float32, bytes as stored) of each window.
        waiting: bytes of hidden states and targets, for each stack.
        sizes: (pruning bytes, fitting bytes) of each region, by kind of window.
    """

    task: ReconstructionTask
    batches: list[int]
    simulation: Simulation = field(default_factory=Simulation)
    regions: int = 0
    windows: list[tuple[int, int]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    sizes: dict[Any, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, stack: dict[str, nn.Module], runner: BlockRunner) -> None:
        """Count a stack of blocks.

        Args:
            stack: the blocks on the meta device, by name.
            runner: runs the copies of the blocks on tensors without values. It has captured one batch.
        """
        hidden, every_call = chain_of(runner, runner.batches[0])
        # Hidden states before the first and before the present region, and targets in float32.
        self.waiting.append(sum(self.batches) * (2 * hidden.nbytes + 4 * hidden.numel()) // self.batches[0])
        names, step = list(stack), blocks_together(self.task.size)
        for first in range(0, len(names), step):
            window = {name: stack[name] for name in names[first : first + step]}
            stored = _parameter_bytes(window)
            kind = tuple((_kind(block), self._pruned_shapes(name)) for name, block in window.items())
            seen = None if kind in self.sizes else self._seen(runner, first, window)
            with held_in_float32(window.values()):
                self.windows.append((_parameter_bytes(window), stored))
                if seen is not None:
                    calls = every_call[first : first + len(window)]
                    regions = regions_by_names(window, first, self.task.size, seen.values)
                    if len(regions) > 1 and not hands_on(*next(iter(window.items())), regions, hidden, calls[0]):
                        regions = regions_of_blocks(window, first)
                    self.sizes[kind] = [self._region(region, seen, hidden, calls) for region in regions]
            self.regions += len(self.sizes[kind])

    def _pruned_shapes(self, block: str) -> tuple[tuple[int, int], ...]:
        return tuple(weight.shape for weight in self.task.pruning.inside(block).values())

    def _seen(self, runner: BlockRunner, first: int, window: dict[str, nn.Module]) -> "_Seen":
        """Run the copies of a window's blocks on tensors without values, and note what modules receive and return."""
        seen = _Seen()
        with contextlib.ExitStack() as hooks:
            for offset, (name, block) in enumerate(window.items()):
                twin = runner.blocks[first + offset]
                for weight, view in self.task.pruning.inside(name).items():
                    if view.expert is None:
                        layer = twin.get_submodule(weight.removeprefix(f"{name}."))
                        hooks.callback(layer.register_forward_pre_hook(partial(seen.note_inputs, weight)).remove)
                for own, twins in zip(attention_and_mlp(block), attention_and_mlp(twin), strict=True):
                    for module, other in zip(own, twins, strict=True):
                        hooks.callback(other.register_forward_hook(partial(seen.note_values, module)).remove)
            for offset in range(len(window)):
                runner.run(first + offset, lambda batch, call: None)
        return seen

    def _region(self, region: Region, seen: "_Seen", hidden: Tensor, calls: list[StateCall]) -> tuple[int, int]:
        """Return the bytes that pruning and fitting `region` take."""
        task, by_matrix = self.task.pruning, self.task.size == "matrix"
        weights = region.among(task.weights)
        if by_matrix:
            # `reconstruct` measures the Hessian of each matrix, whatever the criterion is.
            task = replace(task, update=task.update or LeastSquares())
        fitting = 0 if by_matrix else self._fitting(region, weights, hidden, calls)
        if not weights:
            return 0, fitting
        leading = {name: weight for name, weight in weights.items() if seen.leaders.get(name, name) == name}
        statistics, outputs = measured_bytes(leading, task.needs, self.batches, 4)
        selecting = max(
            selecting_bytes(weight, task, task.patterns[name]) + 4 * SAMPLED_TOKENS * sum(weight.shape)
            for name, weight in weights.items()
        )
        if by_matrix:
            # Weights that share inputs are pruned together, and their dense values are kept until all are finished.
            sharing = [[w for n, w in weights.items() if seen.leaders.get(n, n) == leader] for leader in leading]
            selecting += max(sum(weight.matrix().nbytes for weight in group) for group in sharing)
        # The statistics live until the region is fitted.
        return statistics + max(outputs, selecting), statistics + fitting

    def _fitting(self, region: Region, weights: dict[str, WeightView], hidden: Tensor, calls: list[StateCall]) -> int:
        """Return the most bytes that fitting `region` takes, beside its weights and what waits."""
        # Two steps are enough, because the second holds the optimiser state that the first made. A schedule and
        # clipping take no memory worth counting.
        fit = replace(self.task.fit, max_steps=2, scheduler=None, max_grad_norm=None)
        waits = self.task.activations == "device"
        live = LiveBytes(p for block in region.blocks.values() for p in block.parameters())
        simulation = Simulation(self.simulation.mode)
        target = simulation.fake(hidden.float())

        def run(index: int, inputs: Tensor) -> Tensor:
            return fake.region(inputs, [call.ready(hidden.device) for call in calls])

        def pair(index: int) -> tuple[Tensor, Tensor, None]:
            inputs = hidden if waits else hidden.clone()
            return convert_to_fp32(inputs), target if waits else target.clone(), None

        with contextlib.ExitStack() as undo:
            # On the meta device, because adapters get no values there. They become fake tensors with the others below.
            with live, torch.device("meta"):
                zeros = [~mask_of(weight.matrix()) for weight in weights.values()]
                trained = undo.enter_context(trainable(region, weights, fit.tuner))
            simulation.memo |= {id(mask): simulation.fake(mask) for mask in trained.masks.values()}
            fake = simulation.of(trained, *region.blocks.values())
            everything = [t for block in fake.region.blocks.values() for t in (*block.parameters(), *block.buffers())]
            arguments = [t for t in tree_leaves([(c.args, c.kwargs) for c in calls]) if isinstance(t, Tensor)]
            live.know([*everything, *fake.masks.values(), *arguments, hidden, target])
            with live:
                fake.train(run, pair, [0] * fit.gradient_accumulation_steps, fit, 0)
            trained.undo()
            del zeros
        return live.peak


@dataclass
class _Seen:
    """What the modules of a window received and returned when it was run.

    Args:
        leaders: name of a weight -> name of the first weight that received the same inputs.
        values: module of attention or MLP -> number of values that it returns, 0 for a single tensor.
        inputs: all inputs, each with the name of a weight that received it.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    values: dict[nn.Module, int] = field(default_factory=dict)
    inputs: list[tuple[Any, str]] = field(default_factory=list)

    def note_inputs(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note that the weight `name` received `args`. This is a forward pre-hook."""
        self.leaders[name] = next((leader for known, leader in self.inputs if known is args[0]), name)
        self.inputs.append((args[0], name))

    def note_values(self, noted: nn.Module, module: nn.Module, args: Any, output: Any) -> None:
        """Note how many values `noted`, whose copy is `module`, returns. This is a forward hook."""
        self.values[noted] = len(output) if isinstance(output, tuple) else 0


def _kind(block: nn.Module) -> Any:
    """Return a value that is equal for blocks that take the same memory."""
    shapes = tuple((name, parameter.shape, parameter.dtype) for name, parameter in block.named_parameters())
    return type(block), shapes


def _parameter_bytes(blocks: dict[str, nn.Module]) -> int:
    return bytes_of(parameter for block in blocks.values() for parameter in block.parameters())
