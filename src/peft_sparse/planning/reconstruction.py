"""Plans the memory of a reconstruction: it simulates the fit of each kind of region, and counts all other bytes."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..calibration.activations import Activations
from ..calibration.inputs import as_inputs
from ..calibration.runner import BlockRunner
from ..calibration.statistics import SAMPLED_TOKENS
from ..calibration.text import SEQUENCE_LENGTH
from ..model.blocks import Targets, attention_and_mlp, find_stacks
from ..model.masks import mask_of
from ..model.weights import WeightView
from ..pruning.allocation import Allocation
from ..pruning.by_name import PatternLike
from ..pruning.criteria import CriterionLike
from ..pruning.least_squares import LeastSquares
from ..pruning.patterns import Group
from ..pruning.refinement import Refinement
from ..pruning.task import PruningTask
from ..reconstruction.calls import StateCall, chain_of
from ..reconstruction.checks import checked_task
from ..reconstruction.division import hands_on
from ..reconstruction.fit import Fit
from ..reconstruction.regions import Region, RegionSize, blocks_together, regions_by_names, regions_of_blocks
from ..reconstruction.streams import held_in_float32
from ..reconstruction.trainable import trainable
from .pruning import batch_tokens, measured_bytes, selecting_bytes
from .simulation import GIB, Described, LiveBytes, Simulation, bytes_of, described
from .training import refusing


@dataclass(frozen=True)
class ReconstructionPlan:
    """The memory in bytes that `reconstruct` will take.

    Args:
        regions: number of regions, also of those in which nothing is pruned. With `region="matrix"`, all matrices of a
            block count as one region.
        model_bytes: all parameters, in the dtype of the model.
        outside_bytes: parameters outside the blocks.
        window_bytes: parameters of the blocks that are in memory together, in float32: one block, or as many blocks as
            a region has.
        stored_window_bytes: the same parameters in the dtype of the model.
        waiting_bytes: hidden states of all sequences, before the first region and before the current region, and the
            targets.
        activations: where these wait: "device", "cpu" or "disk". On disk they take no memory.
        pruning_bytes: statistics and working memory while a region is pruned.
        fitting_bytes: memory while a region is fitted: gradients, optimiser state, adapters, masks, a copy of the
            weights before the fit, the statistics of the region, and everything that forward and backward pass of one
            batch hold. With `region="matrix"` only the statistics are counted.
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
        """The peak memory of `reconstruct` on a loaded model, if model and activations are in the same memory."""
        return self.model_bytes - self.stored_window_bytes + self.window_bytes + self._beside_weights()

    @property
    def streamed_bytes(self) -> int:
        """The peak memory of `reconstruct_checkpoint`, if weights and activations are in the same memory."""
        return self.outside_bytes + self.window_bytes + self._beside_weights()

    @property
    def device_bytes(self) -> int:
        """The peak memory of the device on which regions are computed, if the model is in another memory."""
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
    pattern: PatternLike | Mapping[str, PatternLike] | None = None,
    *,
    sparsity: float | None = None,
    criterion: CriterionLike = "magnitude",
    group: Group | None = None,
    allocation: str | Allocation | Mapping[str, float] | None = None,
    refinement: str | Refinement | None = None,
    update: bool | LeastSquares = False,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    prune_tied: bool = False,
    sequences: int = 128,
    length: int = SEQUENCE_LENGTH,
    batch_size: int = 1,
    activations: Activations = "device",
    region: RegionSize = "submodule",
    fit: Fit = Fit(),
    dtype: torch.dtype | None = None,
) -> ReconstructionPlan:
    """Return the memory that `reconstruct` or `reconstruct_checkpoint` will take, before a weight is loaded.

    One region of each kind is fitted on tensors that have shapes and no values, by the code that fits it in a run.
    Regions in which nothing is pruned are treated as if they were fitted. A block that a run would fit whole, because
    its attention and its MLP do not make it up, is one region here too, as far as this can be told without values.

    For a model with one stack of blocks, modes "SS" and "DD" take the same memory. Mode "SD" holds the hidden states
    of all sequences a second time. These are not counted. A `dense` model is not counted either. Allocation does not
    change the memory, apart from the computation of the allocation, which is not counted.

    Args:
        model: a language model without adapters, which may be on the meta device; a configuration; or the folder or
            name of a saved model. The model is not changed.
        pattern: a sparsity in [0, 1); or "n:m", which keeps n of every m entries along the inputs; or an
            `Unstructured` or `SemiStructured`. A dict gives one of these per layer: its keys are names, name endings
            or regular expressions for the whole name, the first key that matches counts, and a layer that no key
            matches is not pruned.
        sparsity: another way to write a `pattern` that is a number.
        criterion: "magnitude", "random", "wanda", "ria", "sparsegpt" or "gblm"; or one of these as a value with its
            numbers, such as `SparseGPT(damping=0.1)`; or a function (weight (out, in), `Statistics`) -> scores
            (out, in), higher = kept; or a `Criterion`, which also says what the function needs.
        group: which entries are compared with each other: "row" (one output) or "matrix". By default the group of the
            criterion's paper. n:m compares within each m entries and SparseGPT within blocks of columns, so these take
            no group. "model" is refused.
        allocation: how the sparsity is divided among the layers: "uniform", "uniform+", "global", "erk", "lamp" or
            "owl"; or one of these as a value, such as `OWL(spread=0.1)`; or a dict of sparsities, with keys as in
            `pattern`, that together give the requested total. The total is exact to the entry. n:m works with "owl",
            which mixes several n.
        refinement: "dsnot" or "swap", or a value such as `Swap(max_swaps=100)`: exchange pruned entries for kept ones
            after the criterion has selected.
        update: True, or a `LeastSquares` with its numbers: set the kept weights to the solution of a regularised
            least-squares problem, see `LeastSquares`.
        target_modules: which layers are pruned: a list of names or name endings, or a regular expression for the whole
            name, as in PEFT. By default every linear or convolution layer and fused expert inside the blocks.
        exclude_modules: which layers are not pruned, in the same form.
        prune_tied: allow a target whose weight is also an embedding. The embedding is then pruned with it.
        sequences: the number of calibration sequences.
        length: the number of tokens of a calibration sequence, without padding.
        batch_size: how many sequences of a tensor of token ids run together.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu" or "disk".
        region: what is fitted at a time: "submodule", "block", a number of blocks, or "matrix".
        fit: how a region is trained. Its tuner, loss, accumulation, optimiser and autocast change the memory. The
            optimiser must run on tensors without values, as the optimisers of torch do.
        dtype: dtype of the parameters. By default that of the model, or the one that its configuration names.

    Returns:
        A plan with the memory of each part, and the peaks.

    Raises:
        TypeError: `pattern` or `update` has another type than these.
        ValueError: an argument is invalid, or does not go with another one; the configuration does not name exactly
            one class of transformers; the model has adapters or quantised parameters, or cannot be run without values.
    """
    whole = described(model, dtype)
    task = checked_task(
        whole,
        pattern,
        sparsity=sparsity,
        criterion=criterion,
        group=group,
        allocation=allocation,
        refinement=refinement,
        update=update,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        prune_tied=prune_tied,
        batch_size=batch_size,
        activations=activations,
        dense=None,
        region=region,
        mode="SS",
        fit=fit,
        loaded=False,
    )
    # Two steps are enough, because the second holds the optimiser state that the first made. A schedule and clipping
    # take no memory worth counting.
    short = replace(fit, max_steps=2, scheduler=None, max_grad_norm=None)
    work = _Work(Simulation(), task.pruning, short, region, batch_tokens(sequences, length, batch_size), activations)
    whole.requires_grad_(False).eval()
    with refusing(whole), LiveBytes():
        running = work.simulation.of(whole, whole)
        tokens = torch.zeros(min(batch_size, sequences), length, dtype=torch.long)
        for stack, fake in zip(find_stacks(whole), find_stacks(running), strict=True):
            work.add(stack, BlockRunner(running, fake, as_inputs(running, tokens, len(tokens))))
    return work.plan(whole)


@dataclass
class _Work:
    """Divides every stack into windows, as `Reconstruction` does, and simulates each kind of window once.

    Args:
        simulation: makes tensors without values.
        task: what is pruned and how.
        fit: how a region is trained.
        size: size of the regions.
        batches: number of tokens of each batch.
        activations: where hidden states and targets wait.
        regions: number of regions that were counted.
        windows: (bytes in float32, bytes as stored) of each window.
        waiting: bytes of hidden states and targets, for each stack.
        sizes: (pruning bytes, fitting bytes) of each region, by kind of window.
    """

    simulation: Simulation
    task: PruningTask
    fit: Fit
    size: RegionSize
    batches: list[int]
    activations: Activations
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
        names, step = list(stack), blocks_together(self.size)
        for first in range(0, len(names), step):
            window = {name: stack[name] for name in names[first : first + step]}
            stored = _parameter_bytes(window)
            kind = tuple(
                (_kind(block), tuple(w.shape for w in self.task.inside(n).values())) for n, block in window.items()
            )
            seen = None if kind in self.sizes else self._seen(runner, first, window)
            with held_in_float32(window.values()):
                self.windows.append((_parameter_bytes(window), stored))
                if seen is not None:
                    calls = every_call[first : first + len(window)]
                    regions = regions_by_names(window, first, self.size, seen.values)
                    if len(regions) > 1 and not hands_on(*next(iter(window.items())), regions, hidden, calls[0]):
                        regions = regions_of_blocks(window, first)
                    self.sizes[kind] = [self._region(region, seen, hidden, calls) for region in regions]
            self.regions += len(self.sizes[kind])

    def plan(self, whole: nn.Module) -> ReconstructionPlan:
        """Return the plan of the model `whole`, whose stacks were added."""
        inside = bytes_of(p for stack in find_stacks(whole) for block in stack.values() for p in block.parameters())
        total = bytes_of(whole.parameters())
        window, stored = max(self.windows)
        return ReconstructionPlan(
            regions=self.regions,
            model_bytes=total,
            outside_bytes=total - inside,
            window_bytes=window,
            stored_window_bytes=stored,
            waiting_bytes=max(self.waiting),
            activations=self.activations,
            pruning_bytes=max(pruning for sizes in self.sizes.values() for pruning, _ in sizes),
            fitting_bytes=max(fitting for sizes in self.sizes.values() for _, fitting in sizes),
        )

    def _seen(self, runner: BlockRunner, first: int, window: dict[str, nn.Module]) -> "_Seen":
        """Run the copies of a window's blocks on tensors without values, and note what modules receive and return."""
        seen = _Seen()
        with contextlib.ExitStack() as hooks:
            for offset, (name, block) in enumerate(window.items()):
                twin = runner.blocks[first + offset]
                for weight, view in self.task.inside(name).items():
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
        weights = region.among(self.task.weights)
        if self.size == "matrix":
            # `reconstruct` measures the Hessian of each matrix, whatever the criterion is.
            task, fitting = replace(self.task, update=self.task.update or LeastSquares()), 0
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
            # Weights that share inputs are pruned together, and their dense values are kept until all are finished.
            sharing = [[w for n, w in weights.items() if seen.leaders.get(n, n) == leader] for leader in leading]
            selecting += max(sum(weight.matrix().nbytes for weight in group) for group in sharing)
        # The statistics live until the region is fitted.
        return statistics + max(outputs, selecting), statistics + fitting

    def _fitting(self, region: Region, weights: dict[str, WeightView], hidden: Tensor, calls: list[StateCall]) -> int:
        """Return the most bytes that fitting `region` takes, beside its weights and what waits."""
        waits = self.activations == "device"
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
                trained = undo.enter_context(trainable(region, weights, self.fit.tuner))
            simulation.memo |= {id(mask): simulation.fake(mask) for mask in trained.masks.values()}
            fake = simulation.of(trained, *region.blocks.values())
            everything = [t for block in fake.region.blocks.values() for t in (*block.parameters(), *block.buffers())]
            arguments = [t for t in tree_leaves([(c.args, c.kwargs) for c in calls]) if isinstance(t, Tensor)]
            live.know([*everything, *fake.masks.values(), *arguments, hidden, target])
            with live:
                fake.train(run, pair, [0] * self.fit.gradient_accumulation_steps, self.fit, 0)
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
