"""Takes the regions of a model in their order, stack by stack and window by window, and gives each its turn."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from ..calibration.findings import Proof
from ..calibration.residence import Residence, on_device
from ..calibration.runner import BlockRunner, in_order
from ..model.blocks import find_stacks
from ..model.processes import exchange, place
from .division import regions_tried
from .finished import FinishedRegions
from .observer import LossOnBar, Step
from .parameters import held_in_float32
from .regions import Region, blocks_together, regions_in, regions_of_blocks
from .streams import Stream, Window
from .task import ReconstructionTask
from .turn import Turn


@dataclass
class Walk:
    """The way of a reconstruction through the regions of a model.

    Args:
        task: what is pruned and fitted and how.
        residence: (block name, block) -> a context within which the block can run.
        proof: what `prove` found out about the model.
        finished: receives the results of the regions.
        after_block: called with the name of each finished block while its weights are in memory, if it is given.
        count: number of the first region of the next window.
        rounds: number of regions so far, for the processes to share them and to meet.
        regions: all regions by number, if processes share them. Otherwise a region is not held, so that a streamed
            model can drop its weights.
    """

    task: ReconstructionTask
    residence: Residence
    proof: Proof
    finished: FinishedRegions
    after_block: Callable[[str], None] | None = None
    count: int = 0
    rounds: int = 0
    regions: dict[int, Region] = field(default_factory=dict)

    def reconstruct(self, inputs: list[dict[str, Any]]) -> None:
        """Reconstruct all stacks that are pruned.

        Args:
            inputs: the calibration data as model inputs.
        """
        task = self.task
        dense = task.model if task.dense is None else task.dense
        stacks, teachers = (in_order(find_stacks(m), self.proof.stacks) for m in (task.model, dense))
        numbers = self._stacks_at_work(stacks)
        # Captured before anything is pruned, because a decoder must receive the outputs of the dense encoder.
        untouched = {n: self._stream(dense, teachers[n], inputs) for n in numbers} if task.mode != "SS" else {}
        for number, stack in enumerate(stacks):
            # The seed of a region depends on its number, and must not change if other stacks are not pruned.
            end = self.count + regions_in(stack, task.size)
            if number in numbers:
                main = untouched[number] if task.mode == "DD" else self._stream(task.model, stack, inputs)
                taught = untouched[number] if task.mode == "SD" else main
                self._stack(stack, main, taught, None if task.dense is None else teachers[number])
            self.count = end
        if self._shared:
            self.finished.exchange(self.regions)

    def _stacks_at_work(self, stacks: list[dict[str, nn.Module]]) -> list[int]:
        """Return the numbers of the stacks to reconstruct: those that are pruned, and in mode SD also later ones."""
        pruned = [any(map(self.task.pruning.inside, stack)) for stack in stacks]
        # In mode SD, a stack after a pruned one is fitted to correct the error of its inputs.
        return [n for n in range(len(stacks)) if pruned[n] or (self.task.mode == "SD" and any(pruned[:n]))]

    def _stream(self, model: nn.Module, stack: dict[str, nn.Module], inputs: list[dict[str, Any]]) -> Stream:
        traits = {index: self.proof.traits[name] for index, name in enumerate(stack) if name in self.proof.traits}
        runner = BlockRunner(
            model,
            stack,
            inputs,
            activations=self.task.activations,
            residence=self.residence,
            traits=traits,
            orders=self.proof.orders.get(next(iter(stack)), ()),
        )
        return Stream(runner, self.task.activations)

    def _stack(
        self, stack: dict[str, nn.Module], main: Stream, taught: Stream, teacher: dict[str, nn.Module] | None
    ) -> None:
        """Reconstruct a stack, window by window."""
        for name in [name for name in stack if name not in main.names]:
            # The model does not run this block, so there is nothing to fit.
            with self.residence(name, stack[name]):
                self._leave([name])
        stack = {name: stack[name] for name in main.names}
        step = blocks_together(self.task.size)
        bar = tqdm(range(0, len(stack), step), desc="reconstructing", unit="window", disable=None)
        on_step = LossOnBar(bar, self.finished.observer.step)
        for first in bar:
            blocks = dict(list(stack.items())[first : first + step])
            teachers = {} if teacher is None else {name: teacher[name] for name in blocks}
            try:
                with self._resident(blocks, teachers):
                    with held_in_float32([*blocks.values(), *teachers.values()]):
                        self._window(Window(main, first, blocks), taught, teachers, on_step)
                    self._leave(blocks)
            except Exception as error:
                error.add_note(f"While reconstructing {next(iter(blocks))!r}: the blocks before it are finished.")
                raise

    def _leave(self, names: Iterable[str]) -> None:
        if self.after_block is not None:
            for name in names:
                self.after_block(name)

    @contextlib.contextmanager
    def _resident(self, blocks: dict[str, nn.Module], teachers: dict[str, nn.Module]) -> Iterator[None]:
        """Hold blocks, and the same blocks of the dense model, on one device within the context."""
        with contextlib.ExitStack() as context:
            for name, block in blocks.items():
                context.enter_context(self.residence(name, block))
            device = next(next(iter(blocks.values())).parameters()).device
            for name, block in teachers.items():
                context.enter_context(on_device(device)(name, block))
            yield

    def _window(
        self, window: Window, taught: Stream, teachers: dict[str, nn.Module], on_step: Callable[[Step], None]
    ) -> None:
        """Reconstruct the regions of a window."""
        regions = self._regions_of(window, window.blocks)
        dense = self._regions_of(window, teachers) if teachers else regions
        if len(dense) != len(regions):
            # Parts are compared with parts only: where one of the two blocks cannot be divided, both are whole.
            why = dense[0].whole or regions[0].whole
            regions, dense = (_joined(found, blocks, window.first, why)
                              for found, blocks in ((regions, window.blocks), (dense, teachers)))  # fmt: skip
        numbers = range(self.count, self.count + regions_in(window.blocks, self.task.size))
        self.count = numbers.stop
        for number, region, teacher in zip(numbers, regions, dense, strict=False):
            if self._shared:
                self.regions[number] = region
            self._take(Turn(number, region, teacher, window, taught, self.task, self.proof.sight), on_step)

    def _regions_of(self, window: Window, blocks: dict[str, nn.Module]) -> list[Region]:
        return regions_tried(blocks, window.first, self.task.size, window.inputs(0), window.calls(0))

    def _take(self, turn: Turn, on_step: Callable[[Step], None]) -> None:
        """Let a region have its turn.

        If an earlier run finished it, or if another process fits it, its targets and its outputs are computed alone.
        """
        number, region = turn.number, turn.region
        as_read = self.finished.progress.of_region(region.parameters)
        found = self.finished.progress.load(number, as_read)
        is_fitted = found is None and self._is_mine()
        turn.find_targets(is_fitted)
        if found is not None:
            self.finished.restore(number, region, *found)
        elif is_fitted:
            self.finished.add(number, region, turn.prune_and_fit(on_step), as_read)
        self.finished.tell(number)
        turn.advance()
        self._meet()

    @property
    def _shared(self) -> bool:
        """Whether several processes share the regions. They do so in mode DD, where regions are independent."""
        return self.task.mode == "DD" and place()[1] > 1

    def _is_mine(self) -> bool:
        """Return whether this process fits the current region.

        Processes that share the regions take turns. Otherwise every process fits every region.
        """
        rank, processes = place()
        return not self._shared or self.rounds % processes == rank

    def _meet(self) -> None:
        """Count a region. Once each process has had one, learn whether another process failed."""
        self.rounds += 1
        if self.rounds % place()[1] == 0:
            exchange(None)


def _joined(found: list[Region], blocks: dict[str, nn.Module], first: int, why: str | None) -> list[Region]:
    """Return the regions `found` of one block as one region that says why it is whole."""
    return [replace(whole, whole=why, writes=found[0].writes) for whole in regions_of_blocks(blocks, first)]
