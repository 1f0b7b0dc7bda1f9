"""The turn of one region: its targets are computed, it is pruned and fitted, and the hidden states pass through it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..calibration.batch import Batch
from ..calibration.copies import ahead
from ..calibration.measure import measure_inputs
from ..calibration.observing import Sight
from ..calibration.recording import tensors_of
from ..calibration.statistics import BlockStatistics, Need
from ..model.masks import mask_of
from ..model.weights import WeightView, to_host
from ..pruning.one_weight import prune_weights
from .fitting import relative_error_of
from .matrices import solve_matrices
from .observer import Step
from .regions import Region
from .report import RegionReport
from .streams import Stream, Targets, Window
from .task import ReconstructionTask
from .trainable import trainable


@dataclass
class Turn:
    """The turn of one region in a reconstruction.

    Args:
        number: number of the region in the model.
        region: the region to prune and to fit.
        teacher: the region whose outputs are the targets: itself while it is dense, or that of the dense model.
        window: the blocks of the region, and what they receive.
        taught: the hidden states that the teacher receives.
        task: what is pruned and fitted and how.
        sight: how the inputs of a weight are observed, as `prove` found out.
        weights: the weights of the region that are pruned, by name.
        targets: the outputs of the teacher.
        measured: the statistics of the inputs of `weights`, if they were measured together with the targets.
    """

    number: int
    region: Region
    teacher: Region
    window: Window
    taught: Stream
    task: ReconstructionTask
    sight: Sight
    weights: dict[str, WeightView] = field(init=False)
    targets: Targets = field(init=False)
    measured: BlockStatistics | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.weights = self.region.among(self.task.pruning.weights)
        self.targets = Targets(self.task.activations, self.window.device)

    @torch.no_grad()
    def find_targets(self, is_fitted: bool) -> None:
        """Compute the targets of the region with its teacher, before it is pruned.

        Args:
            is_fitted: whether this process fits the region, and needs the statistics of its inputs.
        """
        task, window = self.task, self.window
        if task.size == "matrix" and task.mode == "SS":
            return
        is_own_teacher = self.teacher is self.region and self.taught is window.stream
        if is_own_teacher and is_fitted and self.weights and task.size != "matrix":
            # One run of the dense region gives the targets and the statistics of its inputs.
            self.measured = self._measure(self.region, self.weights, task.pruning.needs, as_targets=True)
            return
        with self._overlapping():
            for i in ahead(range(len(window.batches)), lambda i: window.expect(i, self.taught)):
                self.targets.append(window.outputs(self.teacher, i, self.taught))

    def prune_and_fit(self, on_step: Callable[[Step], None]) -> list[RegionReport]:
        """Prune and fit the region. Return its report, or with single matrices the report of each.

        Args:
            on_step: called after each optimiser step.
        """
        started = time.perf_counter()
        task = self.task
        if not self.weights and task.dense is None and task.mode != "SD":
            # Nothing was pruned, so the outputs of the region are its targets.
            reports = [RegionReport(self.region.name, 0.0, 0.0, 0, 0.0, False)]
        else:
            with _seeded(task.fit.seed_of(self.number), self.window.device):
                reports = self._solve() if task.size == "matrix" else [self._fit(on_step)]
        seconds = (time.perf_counter() - started) / len(reports)
        return [replace(report, seconds=seconds, whole=self.region.whole) for report in reports]

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states of all batches by the outputs of the region, or of its teacher."""
        window, mode = self.window, self.task.mode

        def expect(index: int) -> None:
            if mode != "SS":
                self.targets.expect(index)
            if mode != "DD":
                window.expect(index)

        with self._overlapping():
            for i in ahead(range(len(window.batches)), expect):
                if mode != "SS":
                    self.taught.advance(self.region, i, self.targets[i])
                if mode != "DD":
                    window.stream.advance(self.region, i, window.outputs(self.region, i))

    def _solve(self) -> list[RegionReport]:
        """Prune the matrices of the region and compute their kept entries by least squares."""
        task = self.task
        needs: tuple[Need, ...] = tuple(dict.fromkeys((*task.pruning.needs, "inputs", "hessian")))

        def measure(weights: dict[str, WeightView]) -> BlockStatistics:
            if task.mode == "DD" and task.dense_weights is not None:
                # Within a region, too, the inputs are those of the dense model.
                return self._measure(self.teacher, {name: task.dense_weights[name] for name in weights}, needs)
            return self._measure(self.region, weights, needs)

        in_turn = task.mode == "SS"
        return solve_matrices(self.weights, task.pruning, measure, in_turn=in_turn, before=task.dense_weights)

    def _fit(self, on_step: Callable[[Step], None]) -> RegionReport:
        """Prune the region, unless it was pruned before, and fit it to its targets."""
        task, fit = self.task, self.task.fit
        if task.dense is None and self.weights:
            measured = self.measured or self._measure(self.region, self.weights, task.pruning.needs)
            prune_weights(self.weights, task.pruning, measured)
        train, held_out = fit.split(len(self.window.batches))
        zeros = {name: ~mask_of(weight.matrix()) for name, weight in self.weights.items()}
        before = self._error(held_out)
        with trainable(self.region, self.weights, fit.tuner) as trained:
            with self._overlapping():
                steps = trained.train(self._run, self._pair, train, fit, self.number, on_step, self._expect)
            trained.merge()
            # Measured after merging, because merging changes the outputs of some adapters, such as LoRA-Prune.
            after = self._error(held_out)
            if math.isfinite(after):
                _check_zeros(self.weights, zeros)
            reverted = not after <= before
            if reverted:
                trained.undo()
        return RegionReport(self.region.name, before, before if reverted else after, steps, 0.0, reverted)

    def _error(self, batches: list[int]) -> float:
        with self._overlapping():
            return relative_error_of(self._run, self._pair, batches, self._expect)

    def _measure(
        self, region: Region, weights: dict[str, WeightView], needs: tuple[Need, ...], as_targets: bool = False
    ) -> BlockStatistics:
        """Run `region` and return the statistics of the inputs of `weights`.

        Args:
            region: the region, or its teacher.
            weights: weights in `region`, by name.
            needs: the statistics that are measured.
            as_targets: whether the outputs of `region` are kept as the targets.
        """
        window = self.window

        @torch.no_grad()
        def run(before_call: Callable[[Batch, list[Tensor]], None]) -> None:
            if as_targets:
                self.targets.values.clear()
            with self._overlapping():
                for i in ahead(range(len(window.batches)), window.expect):
                    calls = window.calls(i)
                    before_call(window.batches[i], tensors_of([(call.args, call.kwargs) for call in calls]))
                    outputs = region(window.inputs(i), calls)
                    if as_targets:
                        self.targets.append(outputs)

        task = self.task
        model = task.model if task.dense is None or region is not self.teacher else task.dense
        return measure_inputs(model, weights, needs, len(window.batches), run, sight=self.sight)

    def _run(self, index: int, inputs: Tensor) -> Tensor:
        """Return the outputs of the region for the inputs of a batch."""
        return self.region(inputs, self.window.calls(index))

    def _pair(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the inputs of a batch, its targets, and which of its tokens are not padding."""
        return self.window.inputs(index), self.targets[index], self.window.keep(index)

    def _expect(self, index: int) -> None:
        """Begin to copy to the GPU what `_pair` and `_run` will take of a batch, if it waits in CPU memory."""
        self.window.expect(index)
        self.targets.expect(index)

    @contextlib.contextmanager
    def _overlapping(self) -> Iterator[None]:
        """Let a GPU copy what waits in CPU memory while it computes, within the context."""
        # The teacher mostly receives the same hidden states.
        stores = dict.fromkeys((self.window.stream.store, self.taught.store, self.targets.store))
        with contextlib.ExitStack() as contexts:
            for store in stores:
                contexts.enter_context(store.overlapping())
            yield


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
