"""Layer-wise reconstruction: prunes a model region by region, and fits each region to what it computed when dense.

Only one region is trained at a time: its weights, gradients and optimiser state, and the activations of one batch, are
all the memory that training takes. Zimmer et al. 2023, arXiv:2312.15230; "A Free Lunch in LLM Compression", 2025,
arXiv:2510.14444.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from .blocks import Targets, find_blocks, find_stacks
from .calibration import (
    Activations,
    ActivationStore,
    Batch,
    BlockRunner,
    Calibration,
    Call,
    Residence,
    as_inputs,
    check_activations,
    evaluation_mode,
    on_device,
)
from .criteria import Criterion, Need, Score
from .fitting import Loss, Recipe, Step, adapted_weights, check_tuner, fit, trainable
from .least_squares import masked_least_squares
from .masks import Group, mask_of
from .progress import Progress, fingerprint_of_inputs, fingerprint_of_model
from .prune import (
    PatternLike,
    PruningTask,
    check_calibration,
    check_finite,
    count_sequences,
    plan_pruning,
    prune_weights,
)
from .regions import Region, RegionSize, regions_of_blocks, regions_of_submodules, widened, widened_call
from .report import PruningReport, peak_memory
from .statistics import BlockStatistics, gradient_sums, measure_inputs
from .streaming import StreamedModel
from .weights import WeightView


Mode = Literal["DD", "SS", "SD"]


@dataclass(frozen=True)
class RegionReport:
    """One region.

    Args:
        name: of the region.
        error_pruned: ||f(x) - t|| / ||t|| on held-out sequences once it was pruned; f(x) and t include the residual.
        error: the same once it was fitted.
        steps: optimiser steps; 0 where the solution is exact.
        seconds: wall-clock time.
        reverted: whether fitting made the error worse and was undone.
    """

    name: str
    error_pruned: float
    error: float
    steps: int
    seconds: float
    reverted: bool


@dataclass(frozen=True)
class ReconstructionReport:
    """What `reconstruct` did: the pruning, if it pruned, and each region; bytes and seconds."""

    region: str
    mode: str
    loss: str
    tuner: str
    seconds: float
    peak_memory: int
    pruning: PruningReport | None
    regions: tuple[RegionReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {**asdict(self), "pruning": None if self.pruning is None else self.pruning.to_dict()}

    def __str__(self) -> str:
        reverted = sum(region.reverted for region in self.regions)
        before = sum(region.error_pruned for region in self.regions) / len(self.regions)
        after = sum(region.error for region in self.regions) / len(self.regions)
        return (
            f"reconstructed {len(self.regions)} regions ({self.region}, {self.mode}, {self.tuner}) in "
            f"{self.seconds:.1f} s: mean relative error {before:.4f} -> {after:.4f}, {reverted} reverted"
        )


def reconstruct(
    model: nn.Module,
    calibration: Calibration,
    *,
    pattern: PatternLike | Mapping[str, PatternLike] | None = None,
    criterion: str | Score | Criterion = "magnitude",
    group: Group | None = None,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    dense: nn.Module | None = None,
    region: RegionSize = "submodule",
    mode: Mode = "SS",
    loss: Loss = "mse",
    tuner: Literal["full"] | PeftConfig = "full",
    learning_rate: float = 1e-4,
    epochs: float = 1,
    max_steps: int | None = None,
    batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer, int], LRScheduler] | None = None,
    autocast: torch.dtype | None = None,
    holdout: float = 0.1,
    seed: int = 0,
    activations: Activations = "device",
    device: torch.device | str | None = None,
    state_dir: str | Path | None = None,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_region: Callable[[RegionReport], None] | None = None,
    streamed: StreamedModel | None = None,
) -> ReconstructionReport:
    """Prune the model region by region, and fit each region's kept weights to its dense outputs. In place.

    For each region in turn: min over θ of mean ||f(x; θ, M) - t||², x its calibration inputs, t what the dense region
    gives. "A Free Lunch in LLM Compression", 2025, arXiv:2510.14444; PERP, arXiv:2312.15230, section 3.3. The region
    is scored, pruned and fitted before the next is fed; it computes in float32 meanwhile, with dropout off; afterwards
    it consists of plain modules again, with exactly the zeros that pruning left. What got worse on held-out sequences
    is undone.

    Args:
        calibration: as in `prune`; a batch of it is a batch of training.
        pattern, criterion, group, target_modules, exclude_modules: as in `prune`, but no `group="model"`.
            `pattern=None` takes the model as pruned already, and needs `dense`.
        dense: the model before it was pruned, for targets.
        region: "matrix", "submodule" (attention and MLP apart, each with its residual), "block", or so many blocks in
            a row. A matrix is solved exactly, by `masked_least_squares`, on XᵀX.
        mode: "DD": inputs and targets from the dense model, so that regions are independent and several processes
            share them. "SS": inputs x that went through the pruned regions before, targets f_dense(x). "SD": those
            inputs, and targets from the dense model, which corrects what has drifted.
        loss: "mse", "relative_mse" or "cosine".
        tuner: "full" trains all parameters of the region, pruned entries held at zero; a PEFT configuration such as
            `MaskLoRAConfig` trains its adapters (and norms and biases, if it says so), merged region by region.
        learning_rate: of AdamW without weight decay, which falls linearly after 10 % of warm-up.
        optimizer, scheduler: parameters -> optimizer, and (optimizer, steps) -> scheduler, in place of those.
        epochs, max_steps: how long each region is trained; `max_steps` wins.
        autocast: dtype of mixed precision.
        holdout: fraction of the batches, from the last back, on which errors are measured and not trained; 0 measures
            on the training batches.
        activations: where the hidden states between regions, and the targets, wait: "device", "cpu" or "disk".
        device: where each block is moved for its turn.
        state_dir: a folder for finished regions; a run that was killed goes on where it was, with the same result.
            Other arguments are refused; `optimizer` and `scheduler` are compared by name, and a `functools.partial`
            by what it holds.
        on_start, on_step, on_region: called with the number of optimiser steps of a region once all arguments are
            checked, after each optimiser step, and after each region, also one that an earlier run finished.
        streamed: what `reconstruct_checkpoint` reads the blocks of `model` from, and writes them to.

    Raises:
        TypeError: a tuner that is none.
        ValueError: as `prune`; choices that do not go together; a model with adapters; a `dense` that is another
            model; a `state_dir` of another run; a tuner that filled zeros, or that finds nothing to train.
    """
    started = time.perf_counter()
    recipe = Recipe(
        tuner=tuner,
        loss=loss,
        optimizer=optimizer or (lambda parameters: torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)),
        scheduler=scheduler or (lambda opt, steps: get_linear_schedule_with_warmup(opt, int(0.1 * steps), steps)),
        epochs=epochs,
        max_steps=max_steps,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
        autocast=autocast,
        seed=seed,
        on_step=on_step,
    )
    check_choices(region, mode, loss, tuner, pattern is None, dense is None)
    _check_amounts(holdout, epochs, max_steps, batch_size, gradient_accumulation_steps)
    _check_models(model, dense)
    check_activations(activations)
    given = 0.0 if pattern is None else pattern
    task = plan_pruning(
        model, given, criterion, group, target_modules, exclude_modules, prune_tied=False, loaded=streamed is None
    )
    _check_task(task, tuner)
    check_calibration(model, task, calibration)
    if streamed is None:
        check_finite(task.weights)
    else:
        streamed.start(task)
    inputs = as_inputs(model, calibration, batch_size)
    task.sequences = count_sequences(inputs)
    choices = (task.patterns, task.criterion, task.group, region, mode, holdout, loss, learning_rate, epochs,
               max_steps, max_grad_norm, gradient_accumulation_steps, autocast, seed, *map(_spell, (tuner, optimizer,
               scheduler)))  # fmt: skip
    fingerprint = {} if state_dir is None else {
        "model": fingerprint_of_model(model),
        "dense model": "" if dense is None else fingerprint_of_model(dense),
        "data": fingerprint_of_inputs(inputs),
        "arguments": " ".join(map(str, choices)),
    }  # fmt: skip
    work = _Reconstruction(
        model, dense, task, recipe, region, mode, holdout, activations, Progress(state_dir, fingerprint), on_region
    )
    with evaluation_mode(model), evaluation_mode(model if dense is None else dense), frozen(model):
        if on_start is not None:
            on_start(recipe.steps(len(inputs) - _held_out(holdout, len(inputs))))
        if "gradients" in task.rule.needs:
            task.gradients = gradient_sums(model, task.weights, inputs, offload=activations != "device")
        if streamed is None:
            work.run(inputs, on_device(device))
        else:
            work.run(inputs, streamed.resident, streamed.save)
            streamed.finish()
    return work.report(time.perf_counter() - started)


def reconstruct_checkpoint(
    source: str | Path,
    output: str | Path,
    calibration: Calibration,
    *,
    activations: Activations = "cpu",
    device: torch.device | str = "cpu",
    **options: Any,
) -> ReconstructionReport:
    """Reconstruct the model saved in `source` without loading it whole, and save it to `output` for `from_pretrained`.

    The blocks of one region are read from safetensors, pruned and fitted as `reconstruct` would, written, and dropped
    before the next are read.

    Args:
        source, output: as in `prune_checkpoint`.
        activations: where hidden states and targets wait: "cpu", "disk", or "device".
        device: where blocks are loaded to.
        everything else: as in `reconstruct`.

    Raises:
        ValueError: as `reconstruct` and `prune_checkpoint`.
    """
    streamed = StreamedModel(source, output, device)
    return reconstruct(streamed.model, calibration, activations=activations, streamed=streamed, **options)


def check_choices(region: Any, mode: str, loss: str, tuner: Any, no_pattern: bool, no_dense: bool) -> None:
    """Raise ValueError or TypeError for choices that are none, or that do not go together."""
    if region not in ("matrix", "submodule", "block") and not (isinstance(region, int) and region >= 1):
        raise ValueError(
            f'`region` must be "matrix", "submodule", "block" or a number of blocks from 1 on, got {region!r}.'
        )
    for name, value, choices in (("mode", mode, get_args(Mode)), ("loss", loss, get_args(Loss))):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    check_tuner(tuner)
    if no_pattern == no_dense:
        raise ValueError(
            "Expected either `pattern`, to prune region by region, or `dense`, the model before it was pruned; got "
            f"{'neither' if no_pattern else 'both'}."
        )
    if region == "matrix" and (mode == "SD" or tuner != "full" or loss != "mse" or no_pattern):
        raise ValueError(
            'Single matrices are solved exactly from their inputs: `region="matrix"` goes with `pattern`, mode "DD" '
            'or "SS", loss "mse" and tuner "full". Use `region="submodule"` for the others.'
        )


def _check_amounts(
    holdout: float, epochs: float, max_steps: int | None, batch_size: int, gradient_accumulation_steps: int
) -> None:
    for name, value, accepted, wanted in (
        ("holdout", holdout, 0 <= holdout < 1, "in [0, 1)"),
        ("epochs", epochs, epochs > 0, "above 0"),
        ("max_steps", max_steps, max_steps is None or max_steps >= 0, "None or at least 0"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        (
            "gradient_accumulation_steps",
            gradient_accumulation_steps,
            gradient_accumulation_steps >= 1,
            "at least 1",
        ),
    ):
        if not accepted:
            raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")


def _check_models(model: nn.Module, dense: nn.Module | None) -> None:
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"Layer {adapted[0]!r} has adapters; reconstruction attaches and merges its own, region by region. Merge "
            "or unload them first, and pass their configuration as `tuner`."
        )
    if dense is not None and (dense is model or list(find_blocks(dense)) != list(find_blocks(model))):
        raise ValueError(
            "Expected `dense` as the model before it was pruned, got "
            f"{'the pruned model itself' if dense is model else 'one with other blocks'}. Load it once more."
        )


def _check_task(task: PruningTask, tuner: Literal["full"] | PeftConfig) -> None:
    if task.group == "model":
        raise ValueError(
            '`group="model"` compares the weights of all regions at once, and each is pruned in its turn. Use `prune` '
            'first and pass the model before it as `dense`, or `group="row"` or "matrix".'
        )
    groups = getattr(tuner, "train_norms", False) or getattr(tuner, "bias", "none") != "none"
    if tuner != "full" and not groups and not adapted_weights(tuner, task.weights):
        raise ValueError(
            f"`target_modules={tuner.target_modules!r}` of the tuner matches none of the pruned weights, such as "
            f'{next(iter(task.weights))!r}. Fused experts take no adapters: use `tuner="full"`.'
        )


def _spell(choice: Any) -> str:
    """Return what a choice says of itself, the same in every process: no addresses, and sets in order."""
    if isinstance(choice, PeftConfig):
        fields = {key: sorted(v) if isinstance(v, set) else v for key, v in choice.to_dict().items()}
        return f"{type(choice).__name__} {fields}"
    if isinstance(choice, functools.partial):
        return f"{_spell(choice.func)} {choice.args} {choice.keywords}"
    return str(getattr(choice, "__qualname__", choice))


class _Stream:
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


class _Window:
    """Some blocks in a row, and what they are fed: inputs and arguments, on their device and in float32."""

    def __init__(self, stream: _Stream, first: int, blocks: dict[str, nn.Module]) -> None:
        self.batches, self.first, self.blocks, self.stream = stream.batches, first, blocks, stream
        self.device = next(next(iter(blocks.values())).parameters()).device

    def inputs(self, index: int, stream: _Stream | None = None) -> Tensor:
        """Return the hidden states of a batch before the window."""
        return widened((stream or self.stream)[index].to(self.device))

    def calls(self, index: int, stream: _Stream | None = None) -> list[Call]:
        """Return the arguments of every block for a batch."""
        chosen = (stream or self.stream).batches[index].calls[self.first : self.first + len(self.blocks)]
        placed = [Call(send_to_device(c.args, self.device), send_to_device(c.kwargs, self.device)) for c in chosen]
        return [widened_call(call) for call in placed]

    def keep(self, index: int) -> Tensor | None:
        """Return which tokens of a batch are not padding."""
        keep = self.batches[index].keep
        return None if keep is None else keep.to(self.device)

    def outputs(self, region: Region, index: int, stream: _Stream | None = None) -> Tensor:
        """Return what `region` makes of a batch."""
        return region(self.inputs(index, stream), self.calls(index, stream))


@dataclass
class _Reconstruction:
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
    regions: list[Region] = field(default_factory=list)

    def run(
        self, inputs: list[dict[str, Any]], residence: Residence, after_block: Callable[[str], None] | None = None
    ) -> None:
        """Work through all stacks of the model; `after_block` is called while a finished block is there."""

        def stream(model: nn.Module, stack: dict[str, nn.Module]) -> _Stream:
            runner = BlockRunner(model, stack, inputs, activations=self.activations, residence=residence)
            return _Stream(runner, self.activations)

        dense = self.model if self.dense is None else self.dense
        # All of them before anything is pruned: what an encoder hands its decoder is to be dense as well.
        untouched = [] if self.mode == "SS" else [stream(dense, stack) for stack in find_stacks(dense)]
        for number, stack in enumerate(find_stacks(self.model)):
            main = untouched[number] if self.mode == "DD" else stream(self.model, stack)
            other = untouched[number] if self.mode == "SD" else main
            teacher = None if self.dense is None else find_stacks(self.dense)[number]
            step = self.size if isinstance(self.size, int) else 1
            for first in tqdm(range(0, len(stack), step), desc="reconstructing", unit="window", disable=None):
                blocks = dict(list(stack.items())[first : first + step])
                try:
                    with contextlib.ExitStack() as context:
                        for name, block in blocks.items():
                            context.enter_context(residence(name, block))
                        taught = [] if teacher is None else [teacher[name] for name in blocks]
                        device = next(next(iter(blocks.values())).parameters()).device
                        for block in taught:
                            context.enter_context(on_device(device)("", block))
                        with _wide([*blocks.values(), *taught]):
                            self._work(_Window(main, first, blocks), other, teacher)
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

    def _work(self, window: _Window, other: _Stream, teacher: dict[str, nn.Module] | None) -> None:
        """Take the regions of a window one by one: targets, pruning, fit, and on to the next."""
        regions = self._regions_of(window, window.blocks)
        teachers = regions
        if teacher is not None:
            teachers = self._regions_of(window, {name: teacher[name] for name in window.blocks})
        for region, taught_by in zip(regions, teachers, strict=True):
            number = len(self.regions)
            self.regions.append(region)
            weights = {name: weight for name, weight in self.task.weights.items() if region.holds(weight.storage)}
            finished = self.progress.load(number)
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
                measured = self._measure(region, window, weights, self.task.rule.needs, keep)
            elif self.size != "matrix" or self.mode == "DD":
                with torch.no_grad():
                    for i in range(len(window.batches)):
                        keep(window.outputs(taught_by, i, other))
            if finished is not None:
                self._take(number, region, *finished)
            elif mine:
                self._region(number, region, window, weights, target, measured)
            if self.on_region is not None:
                for report in self.reports.get(number, []):
                    self.on_region(report)
            with torch.no_grad():
                for i in range(len(window.batches)):
                    if self.mode != "SS":
                        other.advance(region, i, target(i))
                    if self.mode != "DD":
                        window.stream.advance(region, i, window.outputs(region, i))

    def _regions_of(self, window: _Window, blocks: dict[str, nn.Module]) -> list[Region]:
        if self.size != "submodule":
            return regions_of_blocks(blocks, window.first)
        ((name, block),) = blocks.items()
        return regions_of_submodules(name, block, window.first, window.inputs(0), window.calls(0)[0])

    def _region(
        self,
        number: int,
        region: Region,
        window: _Window,
        weights: dict[str, WeightView],
        target: Callable[[int], Tensor],
        measured: BlockStatistics | None,
    ) -> None:
        """Prune and fit one region, and keep what came of it."""
        started = time.perf_counter()
        if not weights and self.dense is None and self.mode != "SD":
            # Nothing was pruned, so the region computes its targets already.
            reports = [RegionReport(region.name, 0.0, 0.0, 0, 0.0, False)]
        else:
            with _seeded(self.recipe.seed, number, window.device):
                if self.size == "matrix":
                    reports = self._solve(region, window, weights)
                else:
                    if self.dense is None and weights:
                        measured = measured or self._measure(region, window, weights, self.task.rule.needs)
                        prune_weights(weights, self.task, measured)
                    reports = [self._fit(number, region, window, weights, target)]
        seconds = (time.perf_counter() - started) / len(reports)
        self.reports[number] = [replace(report, seconds=seconds) for report in reports]
        self.progress.save(number, region.parameters, self._notes(number, weights))

    def _measure(
        self,
        region: Region,
        window: _Window,
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
        window: _Window,
        weights: dict[str, WeightView],
        target: Callable[[int], Tensor],
    ) -> RegionReport:
        count = len(window.batches)
        held = _held_out(self.holdout, count)
        train, held_out = list(range(count - held)), list(range(count - held, count)) or list(range(count))
        zeros = {name: ~mask_of(weight.matrix()) for name, weight in weights.items()}

        def run(index: int, inputs: Tensor) -> Tensor:
            return region(inputs, window.calls(index))

        def pair(index: int) -> tuple[Tensor, Tensor, Tensor | None]:
            return window.inputs(index), target(index), window.keep(index)

        before = _error(run, pair, held_out)
        with trainable(region, weights, self.recipe.tuner) as (parameters, masks, keep, undo):
            steps = fit(region, run, pair, train, parameters, masks, self.recipe, number) if parameters else 0
            keep()
            # Of what is kept: some adapters, LoRA-Prune's, compute something else until they are merged.
            after = _error(run, pair, held_out)
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

    def _solve(self, region: Region, window: _Window, weights: dict[str, WeightView]) -> list[RegionReport]:
        """Prune and solve matrices one by one; in mode SS each on inputs that those before it made."""
        needs: tuple[Need, ...] = ("inputs", "hessian")
        measured = self._measure(region, window, weights, needs)
        groups: dict[int, list[str]] = {}
        for name, statistics in measured.inputs.items():
            groups.setdefault(id(statistics), []).append(name)
        reports = []
        for position, names in enumerate(groups.values()):
            group = {name: weights[name] for name in names}
            if position and self.mode == "SS":
                measured = self._measure(region, window, group, needs)
            dense = {name: weight.matrix().clone() for name, weight in group.items()}
            prune_weights(group, self.task, measured)
            for name, weight in group.items():
                hessian = measured.inputs[name].hessian
                assert hessian is not None
                pruned = weight.matrix()
                solution = masked_least_squares(dense[name], mask_of(pruned), hessian, start=pruned)
                before, after = (_matrix_error(dense[name], w, hessian) for w in (pruned, solution))
                if after <= before:
                    weight.write(solution)
                reports.append(RegionReport(name, before, min(before, after), 0, 0.0, not after <= before))
        return reports

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
        return self.mode != "DD" or number % state.num_processes == state.process_index

    def _share_out(self) -> None:
        """Give every process the regions that the others fitted."""
        state = PartialState()
        if self.mode != "DD" or state.num_processes == 1:
            return
        weights = self.task.weights
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


def _held_out(holdout: float, batches: int) -> int:
    # Rounded first: 0.14 * 50 is 7.000000000000001.
    return min(math.ceil(round(holdout * batches, 6)), batches - 1)


@torch.no_grad()
def _error(
    run: Callable[[int, Tensor], Tensor],
    pair: Callable[[int], tuple[Tensor, Tensor, Tensor | None]],
    batches: list[int],
) -> float:
    """Return ||f(x) - t|| / ||t|| over the tokens of `batches` that are not padding."""
    sums = []
    for i in batches:
        inputs, target, keep = pair(i)
        outputs = run(i, inputs)
        if keep is not None and keep.shape == target.shape[:-1]:
            outputs, target = outputs[keep], target[keep]
        sums.append(torch.stack([(outputs - target).square().sum(), target.square().sum()]))
    error, size = torch.stack(sums).double().sum(0).tolist()
    return math.sqrt(error / size) if size else 0.0


def _matrix_error(dense: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Return ||(W' - W)X|| / ||WX|| from XᵀX."""
    difference = (weight - dense).to(hessian)
    error = ((difference @ hessian) * difference).sum()
    size = ((dense.to(hessian) @ hessian) * dense.to(hessian)).sum()
    return math.sqrt(max(float(error / size), 0.0)) if float(size) else 0.0


@contextlib.contextmanager
def _seeded(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Draw what region `number` draws, whatever was drawn before: resumed, in another order, in another process."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + number)
        yield


@contextlib.contextmanager
def _wide(blocks: Iterable[nn.Module]) -> Iterator[None]:
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


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Train nothing but what a region asks for."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
