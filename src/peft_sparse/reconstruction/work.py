"""Works through a model region by region: targets, pruning, fit, and on to the next."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration.activations import Activations, ActivationStore
from ..calibration.measure import measure_inputs
from ..calibration.runner import Batch, BlockRunner, Call, Residence, on_device
from ..calibration.statistics import BlockStatistics, Need
from ..model.blocks import find_stacks
from ..model.environment import peak_memory
from ..model.masks import mask_of
from ..model.weights import WeightView
from ..pruning.one_weight import prune_weights
from ..pruning.task import PruningTask
from .fitting import Recipe, Step, fit, held_out_batches, relative_error_of, seed_of, trainable
from .matrices import solve_matrices
from .progress import Progress
from .regions import Region, RegionSize, regions_in, regions_of_blocks, regions_of_submodules
from .report import ReconstructionReport, RegionReport
from .streams import Stream, Window, held_wide


Mode = Literal["DD", "SS", "SD"]


@dataclass
class Reconstruction:
    model: nn.Module
    dense: nn.Module | None
    task: PruningTask
    recipe: Recipe
    size: RegionSize
    mode: Mode
    holdout: float
    activations: Activations
    progress: Progress
    on_region: Callable[[RegionReport], None] | None
    reports: dict[int, list[RegionReport]] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    count: int = 0
    # Only where processes share them: a region holds its weights, which streaming is to drop.
    regions: list[Region] = field(default_factory=list)
    on_step: Callable[[Step], None] | None = None

    def run(
        self, inputs: list[dict[str, Any]], residence: Residence, after_block: Callable[[str], None] | None = None
    ) -> None:
        """Work through all stacks that are pruned; `after_block` is called while a finished block is there."""

        def stream(model: nn.Module, stack: dict[str, nn.Module]) -> Stream:
            runner = BlockRunner(model, stack, inputs, activations=self.activations, residence=residence)
            return Stream(runner, self.activations)

        dense = self.model if self.dense is None else self.dense
        stacks, teachers = find_stacks(self.model), find_stacks(dense)
        pruned = [any(map(self.task.inside, stack)) for stack in stacks]
        # Where targets are those of the dense model, what follows a pruned stack corrects what has drifted.
        drifted = [self.mode == "SD" and any(pruned[:number]) for number in range(len(stacks))]
        numbers = [number for number in range(len(stacks)) if pruned[number] or drifted[number]]
        # All of them before anything is pruned: what an encoder hands its decoder is to be dense as well.
        untouched = {} if self.mode == "SS" else {number: stream(dense, teachers[number]) for number in numbers}
        for number, stack in enumerate(stacks):
            if number not in numbers:
                # A region's number is what its seed is drawn by, whatever else is left out.
                self.count += regions_in(stack, self.size)
                continue
            main = untouched[number] if self.mode == "DD" else stream(self.model, stack)
            other = untouched[number] if self.mode == "SD" else main
            teacher = None if self.dense is None else teachers[number]
            step = self.size if isinstance(self.size, int) else 1
            bar = tqdm(range(0, len(stack), step), desc="reconstructing", unit="window", disable=None)
            self.on_step = showing_loss(bar, self.recipe.on_step)
            for first in bar:
                blocks = dict(list(stack.items())[first : first + step])
                try:
                    with contextlib.ExitStack() as context:
                        for name, block in blocks.items():
                            context.enter_context(residence(name, block))
                        taught = [] if teacher is None else [teacher[name] for name in blocks]
                        device = next(next(iter(blocks.values())).parameters()).device
                        for block in taught:
                            context.enter_context(on_device(device)("", block))
                        with held_wide([*blocks.values(), *taught]):
                            self._work(Window(main, first, blocks), other, teacher)
                        if after_block is not None:
                            for name in blocks:
                                after_block(name)
                except Exception as error:
                    error.add_note(f"While reconstructing {next(iter(blocks))!r}: the blocks before are finished.")
                    raise
        self._share_out()

    def report(self, seconds: float) -> ReconstructionReport:
        """Return what was done."""
        tuner = self.recipe.tuner
        return ReconstructionReport(
            region=str(self.size),
            mode=self.mode,
            loss=self.recipe.loss,
            tuner=tuner if isinstance(tuner, str) else str(getattr(tuner.peft_type, "value", tuner.peft_type)),
            seconds=seconds,
            peak_memory=peak_memory(),
            pruning=self.task.report(seconds) if self.dense is None else None,
            regions=tuple(report for number in sorted(self.reports) for report in self.reports[number]),
        )

    def _work(self, window: Window, other: Stream, teacher: dict[str, nn.Module] | None) -> None:
        """Take the regions of a window one by one: targets, pruning, fit, and on to the next."""
        regions = self._regions_of(window, window.blocks)
        teachers = regions
        if teacher is not None:
            teachers = self._regions_of(window, {name: teacher[name] for name in window.blocks})
        for region, taught_by in zip(regions, teachers, strict=True):
            number, self.count = self.count, self.count + 1
            if self._shared:
                self.regions.append(region)
            weights = {name: weight for name, weight in self.task.weights.items() if region.holds(weight.storage)}
            as_read = self.progress.of_region(region.parameters)
            finished = self.progress.load(number, as_read)
            mine = finished is None and self._mine(number)
            store = ActivationStore(self.activations)
            targets: list[Tensor | Path] = []

            def keep(outputs: Tensor, store: ActivationStore = store, targets: list[Any] = targets) -> None:
                targets.append(store.put(str(len(targets)), outputs))

            def target(index: int, store: ActivationStore = store, targets: list[Any] = targets) -> Tensor:
                return store.get(targets[index]).to(window.device)

            measured = None
            if taught_by is region and other is window.stream and mine and weights and self.size != "matrix":
                # The dense region is run once, for its targets and for the statistics of its inputs.
                measured = self._measure(region, window, weights, self.task.needs, keep)
            elif self.size != "matrix" or self.mode == "DD":
                with torch.no_grad():
                    for i in range(len(window.batches)):
                        keep(window.outputs(taught_by, i, other))
            if finished is not None:
                self._take(number, region, *finished)
            elif mine:
                self._region(number, region, window, weights, target, measured, as_read)
            self._tell(number)
            with torch.no_grad():
                for i in range(len(window.batches)):
                    if self.mode != "SS":
                        other.advance(region, i, target(i))
                    if self.mode != "DD":
                        window.stream.advance(region, i, window.outputs(region, i))

    def _tell(self, number: int) -> None:
        """Hand the reports of region `number` to `on_region`, once they are there, and once only."""
        if number in self.reports and number not in self.told:
            self.told.add(number)
            for report in self.reports[number]:
                if self.on_region is not None:
                    self.on_region(report)

    def _regions_of(self, window: Window, blocks: dict[str, nn.Module]) -> list[Region]:
        if self.size != "submodule":
            return regions_of_blocks(blocks, window.first)
        ((name, block),) = blocks.items()
        return regions_of_submodules(name, block, window.first, window.inputs(0), window.calls(0)[0])

    def _region(
        self,
        number: int,
        region: Region,
        window: Window,
        weights: dict[str, WeightView],
        target: Callable[[int], Tensor],
        measured: BlockStatistics | None,
        as_read: str | None,
    ) -> None:
        """Prune and fit one region, and keep what came of it."""
        started = time.perf_counter()
        if not weights and self.dense is None and self.mode != "SD":
            # Nothing was pruned, so the region computes its targets already.
            reports = [RegionReport(region.name, 0.0, 0.0, 0, 0.0, False)]
        else:
            with _seeded(self.recipe.seed, number, window.device):
                if self.size == "matrix":
                    reports = solve_matrices(
                        weights, self.task, lambda some: self._measure(region, window, some, ("inputs", "hessian")),
                        in_turn=self.mode == "SS",
                    )  # fmt: skip
                else:
                    if self.dense is None and weights:
                        measured = measured or self._measure(region, window, weights, self.task.needs)
                        prune_weights(weights, self.task, measured)
                    reports = [self._fit(number, region, window, weights, target)]
        seconds = (time.perf_counter() - started) / len(reports)
        self.reports[number] = [replace(report, seconds=seconds) for report in reports]
        self.progress.save(number, region.parameters, self._notes(number, weights), as_read)

    def _measure(
        self,
        region: Region,
        window: Window,
        weights: dict[str, WeightView],
        needs: tuple[Need, ...],
        keep: Callable[[Tensor], None] | None = None,
    ) -> BlockStatistics:
        """Return the statistics of the inputs of `weights`; `keep` is given the region's outputs."""

        @torch.no_grad()
        def run(before_batch: Callable[[Batch, Call], None]) -> None:
            for i, batch in enumerate(window.batches):
                calls = window.calls(i)
                before_batch(batch, Call(tuple((call.args, call.kwargs) for call in calls), {}))
                outputs = region(window.inputs(i), calls)
                if keep is not None:
                    keep(outputs)

        return measure_inputs(self.model, weights, needs, len(window.batches), run)

    def _fit(
        self,
        number: int,
        region: Region,
        window: Window,
        weights: dict[str, WeightView],
        target: Callable[[int], Tensor],
    ) -> RegionReport:
        count = len(window.batches)
        held = held_out_batches(self.holdout, count)
        train, held_out = list(range(count - held)), list(range(count - held, count)) or list(range(count))
        zeros = {name: ~mask_of(weight.matrix()) for name, weight in weights.items()}

        def run(index: int, inputs: Tensor) -> Tensor:
            return region(inputs, window.calls(index))

        def pair(index: int) -> tuple[Tensor, Tensor, Tensor | None]:
            return window.inputs(index), target(index), window.keep(index)

        recipe = replace(self.recipe, on_step=self.on_step)
        before = relative_error_of(run, pair, held_out)
        with trainable(region, weights, self.recipe.tuner) as (parameters, masks, keep, undo):
            steps = fit(region, run, pair, train, parameters, masks, recipe, number) if parameters else 0
            keep()
            # Of what is kept: some adapters, LoRA-Prune's, compute something else until they are merged.
            after = relative_error_of(run, pair, held_out)
            filled = [name for name, zero in zeros.items() if bool(weights[name].matrix()[zero].any())]
            if filled and math.isfinite(after):
                raise ValueError(
                    f"The tuner filled zeros of {filled[0]!r} ({len(filled)} such weights). Use one that keeps them, "
                    "such as MaskLoRAConfig or ScaledLoRAConfig."
                )
            reverted = not after <= before
            if reverted:
                undo()
        return RegionReport(region.name, before, before if reverted else after, steps, 0.0, reverted)

    def _notes(self, number: int, weights: dict[str, WeightView]) -> dict[str, Any]:
        return {
            "reports": [asdict(report) for report in self.reports[number]],
            "counts": {name: self.task.counts[name] for name in weights if name in self.task.counts},
            "errors": {name: float(self.task.errors[name]) for name in weights if name in self.task.errors},
        }

    def _take(self, number: int, region: Region, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Take over what an earlier run, or another process, made of a region."""
        with torch.no_grad():
            for name, parameter in region.parameters.items():
                if name in tensors:
                    parameter.copy_(tensors[name])
        self.reports[number] = [RegionReport(**report) for report in notes["reports"]]
        self.task.counts |= {name: (zeros, size) for name, (zeros, size) in notes["counts"].items()}
        self.task.errors |= {name: torch.tensor(error) for name, error in notes["errors"].items()}

    def _mine(self, number: int) -> bool:
        """Tell whether this process fits region `number`; unless regions are independent, each process fits all."""
        state = PartialState()
        return not self._shared or number % state.num_processes == state.process_index

    @property
    def _shared(self) -> bool:
        """Whether regions are shared out among processes."""
        return self.mode == "DD" and PartialState().num_processes > 1

    def _share_out(self) -> None:
        """Give every process the regions that the others fitted."""
        if not self._shared:
            return
        state, weights = PartialState(), self.task.weights
        mine = {
            number: self._notes(number, {n: w for n, w in weights.items() if self.regions[number].holds(w.storage)})
            for number in self.reports
        }
        everything = dict(gather_object(list(mine.items())))
        for number, region in enumerate(self.regions):
            for parameter in region.parameters.values():
                # Backends send what lies on their own device.
                value = parameter.data.to(state.device)
                torch.distributed.broadcast(value, number % state.num_processes)
                parameter.data.copy_(value)
            self._take(number, region, {}, everything[number])
            self._tell(number)


def showing_loss(bar: Any, on_step: Callable[[Step], None] | None) -> Callable[[Step], None] | None:
    """Return `on_step` preceded by showing region and loss on a progress bar, where there is one."""
    if bar.disable:
        return on_step
    shown = -math.inf

    def show(step: Step) -> None:
        nonlocal shown
        # Reading the loss makes the host wait for the device: once a second, not once a step.
        if time.monotonic() - shown > 1:
            shown = time.monotonic()
            bar.set_postfix(region=step.region, loss=f"{float(step.loss):.3g}")
        if on_step is not None:
            on_step(step)

    return show


@contextlib.contextmanager
def _seeded(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Draw what region `number` draws, whatever was drawn before: resumed, in another order, in another process."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, number))
        yield
