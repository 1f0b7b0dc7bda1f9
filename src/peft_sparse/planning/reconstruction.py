"""What reconstruction will take: the fit of every kind of region simulated, pruning and what waits counted."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import get_linear_schedule_with_warmup

from ..calibration.activations import Activations, check_activations
from ..calibration.inputs import as_inputs
from ..calibration.runner import BlockRunner, Call
from ..calibration.statistics import SAMPLED_TOKENS
from ..calibration.text import SEQUENCE_LENGTH
from ..model.blocks import Targets, attention_and_mlp, find_stacks
from ..model.masks import mask_of
from ..model.weights import WeightView
from ..pruning.criteria import Criterion, Score
from ..pruning.least_squares import LeastSquares
from ..pruning.patterns import Group
from ..pruning.task import PatternLike, PruningTask
from ..reconstruction.checks import check_amounts, check_choices, check_models, check_task
from ..reconstruction.fitting import Loss, Recipe, fit, trainable
from ..reconstruction.regions import Region, RegionSize, regions_of_blocks, widened, widened_call
from ..reconstruction.streams import held_wide
from .pruning import batch_tokens, measured_bytes, selecting_bytes
from .simulation import GIB, Described, LiveBytes, Simulation, bytes_of, described
from .training import Optimizer, refusing


@dataclass(frozen=True)
class ReconstructionPlan:
    """Memory in bytes that `reconstruct` will take.

    Args:
        regions: how many are fitted.
        model_bytes: all parameters, as they are stored.
        outside_bytes: parameters outside the blocks.
        window_bytes: parameters of the blocks that are at work together, in float32: one, or as many as a region has.
        stored_window_bytes: the same as they are stored.
        waiting_bytes: hidden states of all sequences before the first region and before the present one, and targets.
        activations: where these wait; on disk they take no memory.
        pruning_bytes: statistics and working memory while a region is pruned.
        fitting_bytes: while a region is fitted: gradients, optimiser, adapters, masks, the weights before, its
            statistics, and all that forward and backward of one batch hold.
    """

    regions: int
    model_bytes: int
    outside_bytes: int
    window_bytes: int
    stored_window_bytes: int
    waiting_bytes: int
    activations: Activations
    pruning_bytes: int
    fitting_bytes: int

    @property
    def peak_bytes(self) -> int:
        """`reconstruct` on a loaded model, all of it in one memory."""
        return self.model_bytes - self.stored_window_bytes + self.window_bytes + self._beside_weights()

    @property
    def streamed_bytes(self) -> int:
        """`reconstruct_checkpoint`, likewise."""
        return self.outside_bytes + self.window_bytes + self._beside_weights()

    @property
    def device_bytes(self) -> int:
        """What is needed where regions are computed, if the model waits elsewhere (`device=`)."""
        waiting = self.waiting_bytes if self.activations == "device" else 0
        return self.window_bytes + waiting + max(self.pruning_bytes, self.fitting_bytes)

    def _beside_weights(self) -> int:
        waiting = 0 if self.activations == "disk" else self.waiting_bytes
        return waiting + max(self.pruning_bytes, self.fitting_bytes)

    def __str__(self) -> str:
        return (
            f"{self.regions} regions; model {self.model_bytes / GIB:.2f} GiB, blocks at work "
            f"{self.window_bytes / GIB:.2f} GiB in float32\n"
            f"waiting {self.waiting_bytes / GIB:.2f} GiB ({self.activations}), pruning "
            f"{self.pruning_bytes / GIB:.2f} GiB, fitting {self.fitting_bytes / GIB:.2f} GiB\n"
            f"peak {self.peak_bytes / GIB:.2f} GiB with the model loaded, {self.streamed_bytes / GIB:.2f} GiB "
            f"streamed from disk; {self.device_bytes / GIB:.2f} GiB on a device of its own"
        )


def plan_reconstruction(
    model: Described,
    pattern: PatternLike | Mapping[str, PatternLike],
    *,
    criterion: str | Score | Criterion = "magnitude",
    group: Group | None = None,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    region: RegionSize = "submodule",
    loss: Loss = "mse",
    tuner: Literal["full"] | PeftConfig = "full",
    batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    optimizer: Optimizer | None = None,
    autocast: torch.dtype | None = None,
    sequences: int = 128,
    length: int = SEQUENCE_LENGTH,
    activations: Activations = "device",
    dtype: torch.dtype | None = None,
) -> ReconstructionPlan:
    """Return what `reconstruct` or `reconstruct_checkpoint` will take, before a weight is loaded.

    Every kind of region is fitted on tensors without values, by the code that fits it. Modes "SS" and "DD" take as
    much; "SD" a second stream of hidden states.

    Args:
        model, dtype: as in `plan_training`; without adapters.
        sequences, length: the calibration data, in sequences and tokens of each, without padding.
        everything else: as in `reconstruct`.

    Raises:
        TypeError, ValueError: as `reconstruct`, for what does not depend on the weights' values; as `plan_training`.
    """
    check_choices(region, "SS", loss, tuner, False, True)
    check_amounts(0.0, 1, None, batch_size, gradient_accumulation_steps)
    check_activations(activations)
    whole = described(model, dtype)
    check_models(whole, None)
    task = PruningTask.of(
        whole,
        pattern,
        criterion=criterion,
        group=group,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        loaded=False,
    )
    check_task(task, tuner)
    recipe = Recipe(
        tuner=tuner,
        loss=loss,
        optimizer=optimizer or partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
        scheduler=lambda opt, steps: get_linear_schedule_with_warmup(opt, 0, steps),
        epochs=1,
        # The second has the state of the optimiser from the first.
        max_steps=2,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=None,
        autocast=autocast,
        seed=0,
        on_step=None,
    )
    work = _Work(Simulation(), task, recipe, region, batch_tokens(sequences, length, batch_size), activations)
    whole.requires_grad_(False).eval()
    with refusing(whole), LiveBytes():
        running = work.simulation.of(whole, whole)
        tokens = torch.zeros(min(batch_size, sequences), length, dtype=torch.long)
        for stack, fake in zip(find_stacks(whole), find_stacks(running), strict=True):
            work.add(stack, BlockRunner(running, fake, as_inputs(running, tokens, len(tokens))))
    inside = bytes_of(p for stack in find_stacks(whole) for block in stack.values() for p in block.parameters())
    total = bytes_of(whole.parameters())
    window, stored = max(work.windows)
    return ReconstructionPlan(
        regions=work.regions,
        model_bytes=total,
        outside_bytes=total - inside,
        window_bytes=window,
        stored_window_bytes=stored,
        waiting_bytes=max(work.waiting),
        activations=activations,
        pruning_bytes=max(pruning for sizes in work.sizes.values() for pruning, _ in sizes),
        fitting_bytes=max(fitting for sizes in work.sizes.values() for _, fitting in sizes),
    )


@dataclass
class _Work:
    """Takes the windows of every stack, as `Reconstruction` does, and simulates each kind of window once."""

    simulation: Simulation
    task: PruningTask
    recipe: Recipe
    size: RegionSize
    batches: list[int]
    activations: Activations
    regions: int = 0
    windows: list[tuple[int, int]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    # (pruning, fitting) of each region, by kind of window.
    sizes: dict[Any, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, stack: dict[str, nn.Module], runner: BlockRunner) -> None:
        """Count the stack `stack`, whose fake twin `runner` has captured one batch of."""
        hidden = runner.batches[0].hidden
        assert isinstance(hidden, Tensor)
        # Where they came from and where they are, and targets in float32.
        self.waiting.append(sum(self.batches) * (2 * hidden.nbytes + 4 * hidden.numel()) // self.batches[0])
        names, step = list(stack), self.size if isinstance(self.size, int) else 1
        for first in range(0, len(names), step):
            window = {name: stack[name] for name in names[first : first + step]}
            stored = bytes_of(p for block in window.values() for p in block.parameters())
            kind = tuple(
                (_kind(block), tuple(w.shape for w in self.task.inside(n).values())) for n, block in window.items()
            )
            seen = None if kind in self.sizes else self._seen(runner, first, window)
            with held_wide(window.values()):
                self.windows.append((bytes_of(p for block in window.values() for p in block.parameters()), stored))
                if seen is not None:
                    calls = runner.batches[0].calls[first : first + len(window)]
                    regions = self._regions(window, first, seen)
                    self.sizes[kind] = [self._region(region, seen, hidden, calls) for region in regions]
            self.regions += len(self.sizes[kind])

    def _seen(self, runner: BlockRunner, first: int, window: dict[str, nn.Module]) -> "_Seen":
        """Run the fake twins of a window."""
        seen = _Seen()
        inputs: list[Any] = []

        def note_inputs(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            leader = next((other for known, other in inputs if known is args[0]), name)
            inputs.append((args[0], name))
            seen.leaders[name] = leader

        def note_values(place: tuple[int, int], module: nn.Module, args: Any, output: Any) -> None:
            seen.values[place] = len(output) if isinstance(output, tuple) else 0

        with contextlib.ExitStack() as hooks:
            for offset, name in enumerate(window):
                twin = runner.blocks[first + offset]
                for weight, view in self.task.inside(name).items():
                    if view.expert is None:
                        layer = twin.get_submodule(weight.removeprefix(f"{name}."))
                        hooks.callback(layer.register_forward_pre_hook(partial(note_inputs, weight)).remove)
                for part, modules in enumerate(attention_and_mlp(twin)):
                    for number, module in enumerate(modules):
                        hook = partial(note_values, (part, number))
                        hooks.callback(module.register_forward_hook(hook).remove)
            for offset in range(len(window)):
                runner.run(first + offset, lambda batch, call: None)
        return seen

    def _region(self, region: Region, seen: "_Seen", hidden: Tensor, calls: list[Call]) -> tuple[int, int]:
        weights = {name: weight for name, weight in self.task.weights.items() if region.holds(weight.storage)}
        if self.size == "matrix":
            # Solved from Hessians, whatever the criterion.
            task, fitting = replace(self.task, update=LeastSquares()), 0
        else:
            task, fitting = self.task, self._fitting(region, weights, hidden, calls)
        if not weights:
            return 0, fitting
        leading = {name: weight for name, weight in weights.items() if seen.leaders.get(name, name) == name}
        statistics, outputs = measured_bytes(leading, task.needs, self.batches, 4)
        selecting = max(
            selecting_bytes(weight, task, task.patterns[name]) + 4 * SAMPLED_TOKENS * sum(weight.shape)
            for name, weight in weights.items()
        )
        if self.size == "matrix":
            # Those that share inputs are solved together, from what they were before.
            sharing = [[w for n, w in weights.items() if seen.leaders.get(n, n) == leader] for leader in leading]
            selecting += max(sum(weight.matrix().nbytes for weight in group) for group in sharing)
        # What was measured lives until its region is fitted.
        return statistics + max(outputs, selecting), statistics + fitting

    def _regions(self, window: dict[str, nn.Module], first: int, seen: "_Seen") -> list[Region]:
        """Return the regions of a window as `regions_of_submodules` does, without a value to try them on."""
        whole = regions_of_blocks(window, first)
        parts = attention_and_mlp(next(iter(window.values())))
        if self.size != "submodule" or not all(parts):
            return whole
        regions = []
        for silent, modules in reversed(list(enumerate(parts))):
            others = {id(parameter) for module in modules for parameter in module.parameters()}
            own = {name: p for name, p in whole[0].parameters.items() if id(p) not in others}
            values = {module: seen.values.get((silent, number), 0) for number, module in enumerate(modules)}
            regions.append(Region(whole[0].name, first, window, values, own))
        return regions

    def _fitting(self, region: Region, weights: dict[str, WeightView], hidden: Tensor, calls: list[Call]) -> int:
        """Return the most that fitting `region` takes beside its weights and what waits."""
        waits = self.activations == "device"
        live = LiveBytes(p for block in region.blocks.values() for p in block.parameters())
        simulation = Simulation(self.simulation.mode)
        target = simulation.fake(hidden.float())

        def pair(index: int) -> tuple[Tensor, Tensor, None]:
            return (widened(hidden), target, None) if waits else (widened(hidden.clone()), target.clone(), None)

        with contextlib.ExitStack() as undo:
            # Adapters have no values to draw, and `fit` is to meet fakes of all that there is.
            with live, torch.device("meta"):
                zeros = [~mask_of(weight.matrix()) for weight in weights.values()]
                trained = undo.enter_context(trainable(region, weights, self.recipe.tuner))
            parameters, masks = trained[:2]
            fake = simulation.of(region, *region.blocks.values())
            fake_parameters = [simulation.memo[id(parameter)] for parameter in parameters]
            fake_masks = {simulation.memo[id(p)]: simulation.fake(mask) for p, mask in masks.items()}
            everything = [t for block in fake.blocks.values() for t in (*block.parameters(), *block.buffers())]
            arguments = [t for t in tree_leaves([(c.args, c.kwargs) for c in calls]) if isinstance(t, Tensor)]
            live.know([*everything, *fake_masks.values(), *arguments, hidden, target])

            def run(index: int, inputs: Tensor) -> Tensor:
                return fake(inputs, [widened_call(call) for call in calls])

            with live:
                count = self.recipe.gradient_accumulation_steps
                fit(fake, run, pair, [0] * count, fake_parameters, fake_masks, self.recipe, 0)
            *_, unload = trained
            unload()
            del zeros
        return live.peak


@dataclass
class _Seen:
    """What a window showed when it was run.

    Args:
        leaders: weight -> the weight that was given the same inputs first.
        values: (attention or MLP, number of the module) -> how many values it returns, 0 for a tensor.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    values: dict[tuple[int, int], int] = field(default_factory=dict)


def _kind(block: nn.Module) -> Any:
    """Return what tells blocks apart that take different memory."""
    shapes = tuple((name, parameter.shape, parameter.dtype) for name, parameter in block.named_parameters())
    return type(block), shapes
