"""Reconstructs a model region by region: it computes the targets of each region, prunes it and fits it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration.batch import Batch
from ..calibration.copies import ahead
from ..calibration.findings import Proof
from ..calibration.measure import measure_inputs
from ..calibration.recording import tensors_of
from ..calibration.residence import Residence, on_device
from ..calibration.runner import BlockRunner, in_order
from ..calibration.statistics import BlockStatistics, Need
from ..model.blocks import find_stacks
from ..model.environment import peak_memory
from ..model.masks import mask_of
from ..model.processes import exchange, place, spread
from ..model.weights import WeightView, to_host
from ..pruning.one_weight import prune_weights
from .division import regions_tried
from .fitting import relative_error_of
from .matrices import solve_matrices
from .observer import ReconstructionObserver, Step
from .progress import Progress
from .regions import Region, regions_in, regions_of_blocks
from .report import ReconstructionReport, RegionReport
from .streams import Stream, Targets, Window, held_in_float32
from .task import ReconstructionTask
from .trainable import trainable


@dataclass
class _Turn:
    """What is needed to prune and fit one region.

    Args:
        number: number of the region in the model.
        region: the region to prune and to fit.
        teacher: the region whose outputs are the targets: itself while it is dense, or that of the dense model.
        window: the blocks of the region, and what they receive.
        taught: the hidden states that the teacher receives.
        weights: the weights of the region that are pruned, by name.
        targets: the outputs of the teacher.
        as_read: the fingerprint of the region before it is pruned; None if finished regions are not compared by it.
        measured: the statistics of the inputs of `weights`, if they were measured together with the targets.
    """

    number: int
    region: Region
    teacher: Region
    window: Window
    taught: Stream
    weights: dict[str, WeightView]
    targets: Targets
    as_read: str | None
    measured: BlockStatistics | None = None

    def run(self, index: int, inputs: Tensor) -> Tensor:
        """Return the outputs of the region for the inputs of a batch."""
        return self.region(inputs, self.window.calls(index))

    def pair(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the inputs of a batch, its targets, and which of its tokens are not padding."""
        return self.window.inputs(index), self.targets[index], self.window.keep(index)

    def expect(self, index: int) -> None:
        """Begin to copy to the GPU what `pair` and `run` will take of a batch, if it waits in CPU memory."""
        self.window.expect(index)
        self.targets.expect(index)

    @contextlib.contextmanager
    def overlapping(self) -> Iterator[None]:
        """Let a GPU copy what waits in CPU memory while it computes, within the context."""
        # The teacher mostly receives the same hidden states.
        stores = dict.fromkeys((self.window.stream.store, self.taught.store, self.targets.store))
        with contextlib.ExitStack() as contexts:
            for store in stores:
                contexts.enter_context(store.overlapping())
            yield


@dataclass
class Reconstruction:
    """A reconstruction on its way through the regions of a model.

    Args:
        task: what is pruned and fitted and how.
        residence: (block name, block) -> a context within which the block can run.
        observer: follows the run.
        progress: keeps finished regions.
        proof: what `prove` found out about the model.
        reports: the reports of finished regions, by number of the region.
        reported: the numbers of the regions that were reported to `observer`.
        count: number of the first region of the next window.
        regions: all regions by number, if processes share them. Otherwise a region is not held, so that a streamed
            model can drop its weights.
        rounds: number of regions so far, for the processes to share them and to meet.
        on_step: called after each optimiser step.
    """

    task: ReconstructionTask
    residence: Residence
    observer: ReconstructionObserver
    progress: Progress = field(default_factory=lambda: Progress(None, {}))
    proof: Proof = field(default_factory=Proof)
    reports: dict[int, list[RegionReport]] = field(default_factory=dict)
    reported: set[int] = field(default_factory=set)
    count: int = 0
    regions: dict[int, Region] = field(default_factory=dict)
    rounds: int = 0
    on_step: Callable[[Step], None] | None = None

    def run(self, inputs: list[dict[str, Any]], after_block: Callable[[str], None] | None = None) -> None:
        """Reconstruct all stacks that are pruned.

        Args:
            inputs: the calibration data as model inputs.
            after_block: called with the name of each finished block while its weights are in memory.
        """
        dense = self.task.model if self.task.dense is None else self.task.dense
        stacks, teachers = (in_order(find_stacks(m), self.proof.stacks) for m in (self.task.model, dense))
        numbers = self._stacks_at_work(stacks)
        # Captured before anything is pruned, because a decoder must receive the outputs of the dense encoder.
        untouched = {n: self._stream(dense, teachers[n], inputs) for n in numbers} if self.task.mode != "SS" else {}
        for number, stack in enumerate(stacks):
            # The seed of a region depends on its number, and must not change if other stacks are not pruned.
            end = self.count + regions_in(stack, self.task.size)
            if number in numbers:
                main = untouched[number] if self.task.mode == "DD" else self._stream(self.task.model, stack, inputs)
                taught = untouched[number] if self.task.mode == "SD" else main
                self._stack(stack, main, taught, None if self.task.dense is None else teachers[number], after_block)
            self.count = end
        self._exchange_regions()

    def report(self, seconds: float) -> ReconstructionReport:
        """Return the report of the reconstruction, which took `seconds`."""
        tuner = self.task.fit.tuner
        return ReconstructionReport(
            region=str(self.task.size),
            mode=self.task.mode,
            loss=self.task.fit.loss,
            tuner=tuner if isinstance(tuner, str) else str(getattr(tuner.peft_type, "value", tuner.peft_type)),
            seconds=seconds,
            peak_memory=peak_memory(),
            pruning=self.task.pruning.report(seconds) if self.task.dense is None else None,
            regions=tuple(report for number in sorted(self.reports) for report in self.reports[number]),
        )

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
        self,
        stack: dict[str, nn.Module],
        main: Stream,
        taught: Stream,
        teacher: dict[str, nn.Module] | None,
        after_block: Callable[[str], None] | None,
    ) -> None:
        """Reconstruct a stack, window by window."""
        step = self.task.size if isinstance(self.task.size, int) else 1
        for name in [name for name in stack if name not in main.names]:
            # The model does not run this block, so there is nothing to fit.
            with self.residence(name, stack[name]):
                if after_block is not None:
                    after_block(name)
        stack = {name: stack[name] for name in main.names}
        bar = tqdm(range(0, len(stack), step), desc="reconstructing", unit="window", disable=None)
        self.on_step = LossOnBar(bar, self.observer.step)
        for first in bar:
            blocks = dict(list(stack.items())[first : first + step])
            teachers = {} if teacher is None else {name: teacher[name] for name in blocks}
            try:
                with self._resident(blocks, teachers):
                    with held_in_float32([*blocks.values(), *teachers.values()]):
                        self._window(Window(main, first, blocks), taught, teachers)
                    if after_block is not None:
                        for name in blocks:
                            after_block(name)
            except Exception as error:
                error.add_note(f"While reconstructing {next(iter(blocks))!r}: the blocks before it are finished.")
                raise

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

    def _window(self, window: Window, taught: Stream, teachers: dict[str, nn.Module]) -> None:
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
            weights = {
                name: weight for name, weight in self.task.pruning.weights.items() if region.holds(weight.storage)
            }
            targets = Targets(self.task.activations, window.device)
            as_read = self.progress.of_region(region.parameters)
            self._take_turn(_Turn(number, region, teacher, window, taught, weights, targets, as_read))

    def _regions_of(self, window: Window, blocks: dict[str, nn.Module]) -> list[Region]:
        return regions_tried(blocks, window.first, self.task.size, window.inputs(0), window.calls(0))

    def _take_turn(self, turn: _Turn) -> None:
        """Compute the targets of a region, prune and fit it, and replace the hidden states by its outputs."""
        finished = self.progress.load(turn.number, turn.as_read)
        mine = finished is None and self._is_mine()
        self._find_targets(turn, mine)
        if finished is not None:
            self._restore(turn.number, turn.region, *finished)
        elif mine:
            self._prune_and_fit(turn)
        self._observe(turn.number)
        self._advance(turn)
        self._meet()

    @torch.no_grad()
    def _find_targets(self, turn: _Turn, mine: bool) -> None:
        """Compute the targets of a region with its teacher, before it is pruned."""
        if self.task.size == "matrix" and self.task.mode == "SS":
            return
        window = turn.window
        is_own_teacher = turn.teacher is turn.region and turn.taught is window.stream
        if is_own_teacher and mine and turn.weights and self.task.size != "matrix":
            # One run of the dense region gives the targets and the statistics of its inputs.
            turn.measured = self._measure(turn, turn.weights, self.task.pruning.needs, turn.targets.append)
            return
        with turn.overlapping():
            for i in ahead(range(len(window.batches)), lambda i: window.expect(i, turn.taught)):
                turn.targets.append(window.outputs(turn.teacher, i, turn.taught))

    @torch.no_grad()
    def _advance(self, turn: _Turn) -> None:
        """Replace the hidden states of all batches by the outputs of the region, or of its teacher."""
        window = turn.window

        def expect(index: int) -> None:
            if self.task.mode != "SS":
                turn.targets.expect(index)
            if self.task.mode != "DD":
                window.expect(index)

        with turn.overlapping():
            for i in ahead(range(len(window.batches)), expect):
                if self.task.mode != "SS":
                    turn.taught.advance(turn.region, i, turn.targets[i])
                if self.task.mode != "DD":
                    window.stream.advance(turn.region, i, window.outputs(turn.region, i))

    def _prune_and_fit(self, turn: _Turn) -> None:
        """Prune and fit a region, and keep the result."""
        started = time.perf_counter()
        if not turn.weights and self.task.dense is None and self.task.mode != "SD":
            # Nothing was pruned, so the outputs of the region are its targets.
            reports = [RegionReport(turn.region.name, 0.0, 0.0, 0, 0.0, False)]
        else:
            with _seeded(self.task.fit.seed_of(turn.number), turn.window.device):
                reports = self._solve(turn) if self.task.size == "matrix" else [self._fit_region(turn)]
        seconds = (time.perf_counter() - started) / len(reports)
        whole = turn.region.whole
        self.reports[turn.number] = [replace(report, seconds=seconds, whole=whole) for report in reports]
        notes = self._notes(turn.number, turn.weights)
        self.progress.save(turn.number, turn.region.parameters, notes, turn.as_read)

    def _solve(self, turn: _Turn) -> list[RegionReport]:
        """Prune the matrices of a region and compute their kept entries by least squares."""
        needs: tuple[Need, ...] = tuple(dict.fromkeys((*self.task.pruning.needs, "inputs", "hessian")))

        def measure(weights: dict[str, WeightView]) -> BlockStatistics:
            if self.task.mode == "DD" and self.task.dense_weights is not None:
                # Within a region, too, the inputs are those of the dense model.
                weights = {name: self.task.dense_weights[name] for name in weights}
                return self._measure(replace(turn, region=turn.teacher), weights, needs)
            return self._measure(turn, weights, needs)

        return solve_matrices(
            turn.weights, self.task.pruning, measure, in_turn=self.task.mode == "SS", before=self.task.dense_weights
        )

    def _fit_region(self, turn: _Turn) -> RegionReport:
        """Prune a region, unless it was pruned before, and fit it to its targets."""
        if self.task.dense is None and turn.weights:
            measured = turn.measured or self._measure(turn, turn.weights, self.task.pruning.needs)
            prune_weights(turn.weights, self.task.pruning, measured)
        train, held_out = self.task.fit.split(len(turn.window.batches))
        zeros = {name: ~mask_of(weight.matrix()) for name, weight in turn.weights.items()}
        with turn.overlapping():
            before = relative_error_of(turn.run, turn.pair, held_out, turn.expect)
        with trainable(turn.region, turn.weights, self.task.fit.tuner) as trained:
            with turn.overlapping():
                steps = trained.train(
                    turn.run, turn.pair, train, self.task.fit, turn.number, self.on_step, turn.expect
                )
            trained.merge()
            # Measured after merging, because merging changes the outputs of some adapters, such as LoRA-Prune.
            with turn.overlapping():
                after = relative_error_of(turn.run, turn.pair, held_out, turn.expect)
            if math.isfinite(after):
                _check_zeros(turn.weights, zeros)
            reverted = not after <= before
            if reverted:
                trained.undo()
        return RegionReport(turn.region.name, before, before if reverted else after, steps, 0.0, reverted)

    def _measure(
        self,
        turn: _Turn,
        weights: dict[str, WeightView],
        needs: tuple[Need, ...],
        keep: Callable[[Tensor], None] | None = None,
    ) -> BlockStatistics:
        """Run the region and return the statistics of the inputs of `weights`; `keep` receives its outputs."""
        window = turn.window

        @torch.no_grad()
        def run(before_call: Callable[[Batch, list[Tensor]], None]) -> None:
            if keep is not None:
                turn.targets.values.clear()
            with turn.overlapping():
                for i in ahead(range(len(window.batches)), window.expect):
                    calls = window.calls(i)
                    before_call(window.batches[i], tensors_of([(call.args, call.kwargs) for call in calls]))
                    outputs = turn.region(window.inputs(i), calls)
                    if keep is not None:
                        keep(outputs)

        model = self.task.model if self.task.dense is None or turn.region is not turn.teacher else self.task.dense
        return measure_inputs(model, weights, needs, len(window.batches), run, sight=self.proof.sight)

    def _observe(self, number: int) -> None:
        """Report region `number` to the observer, if it is finished and has not been reported."""
        if number in self.reports and number not in self.reported:
            self.reported.add(number)
            for report in self.reports[number]:
                self.observer.region(report)

    def _notes(self, number: int, weights: dict[str, WeightView]) -> dict[str, Any]:
        """Return the reports, counts of zeros and output errors of a finished region as plain values."""
        task = self.task.pruning
        return {
            "reports": [asdict(report) for report in self.reports[number]],
            "counts": {name: task.counts[name] for name in weights if name in task.counts},
            "errors": _on_host(task.errors, weights),
            "errors_selected": _on_host(task.errors_selected, weights),
        }

    def _restore(self, number: int, region: Region, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Put the result of an earlier run, or of another process, into a region."""
        with torch.no_grad():
            for name, parameter in region.parameters.items():
                if name in tensors:
                    parameter.copy_(tensors[name])
        self.reports[number] = [RegionReport(**report) for report in notes["reports"]]
        self.task.pruning.counts |= {name: (zeros, size) for name, (zeros, size) in notes["counts"].items()}
        self.task.pruning.errors |= {
            name: torch.tensor(error, device="cpu") for name, error in notes["errors"].items()
        }
        self.task.pruning.errors_selected |= {
            name: torch.tensor(error, device="cpu") for name, error in notes["errors_selected"].items()
        }

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

    def _exchange_regions(self) -> None:
        """Give every process the regions that the other processes fitted."""
        if not self._shared:
            return
        weights = self.task.pruning.weights
        everything = exchange(
            {
                number: self._notes(
                    number, {n: w for n, w in weights.items() if self.regions[number].holds(w.storage)}
                )
                for number in self.reports
            }
        )
        for number, region in self.regions.items():
            # A region of an earlier run may be finished in several processes.
            owner = next(rank for rank, notes in enumerate(everything) if number in notes)
            for parameter in region.parameters.values():
                spread(parameter.data, owner)
            self._restore(number, region, {}, everything[owner][number])
            self._observe(number)


def _joined(found: list[Region], blocks: dict[str, nn.Module], first: int, why: str | None) -> list[Region]:
    """Return the regions `found` of one block as one region that says why it is whole."""
    return [replace(whole, whole=why, writes=found[0].writes) for whole in regions_of_blocks(blocks, first)]


class LossOnBar:
    """Shows the region and the loss of a step on a progress bar, and then hands the step to `on_step`."""

    def __init__(self, bar: Any, on_step: Callable[[Step], None]) -> None:
        self.bar, self.on_step = bar, on_step
        self.shown = -math.inf

    def __call__(self, step: Step) -> None:
        # Reading the loss makes the host wait for the device, so it is read once a second and not in every step.
        if not self.bar.disable and time.monotonic() - self.shown > 1:
            self.shown = time.monotonic()
            self.bar.set_postfix(region=step.region, loss=f"{float(step.loss):.3g}")
        self.on_step(step)


def _on_host(errors: dict[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    there = {name: errors[name] for name in names if name in errors}
    return dict(zip(there, to_host(list(there.values())), strict=True))


def _check_zeros(weights: dict[str, WeightView], zeros: dict[str, Tensor]) -> None:
    found = to_host([(mask_of(weights[name].matrix()) & zero).any() for name, zero in zeros.items()])
    filled = [name for name, is_filled in zip(zeros, found, strict=True) if is_filled]
    if filled:
        raise ValueError(
            f"The tuner filled zeros of {filled[0]!r} ({len(filled)} such weights). Use a tuner that keeps them, such "
            "as MaskLoRAConfig or ScaledLoRAConfig."
        )


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of `device`, and restore them after the context."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
