"""Plans the memory of a reconstruction, by what its windows take and by what waits beside them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..calibration.activations import Activations
from ..calibration.inputs import as_inputs
from ..calibration.runner import BlockRunner
from ..calibration.text import SEQUENCE_LENGTH
from ..model.blocks import Targets, find_stacks
from ..pruning.allocation import Allocation
from ..pruning.by_name import PatternLike
from ..pruning.criteria import CriterionLike
from ..pruning.least_squares import LeastSquares
from ..pruning.patterns import Group
from ..pruning.refinement import Refinement
from ..reconstruction.checks import reconstruction_task
from ..reconstruction.fit import Fit
from ..reconstruction.regions import RegionSize
from .pruning_costs import batch_tokens
from .simulation import GIB, Described, LiveBytes, bytes_of, described, refusing
from .windows import Windows


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
    task = reconstruction_task(
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
    whole.requires_grad_(False).eval()
    windows = Windows(task, batch_tokens(sequences, length, batch_size))
    with refusing(whole), LiveBytes():
        running = windows.simulation.of(whole, whole)
        tokens = torch.zeros(min(batch_size, sequences), length, dtype=torch.long)
        for stack, fake in zip(find_stacks(whole), find_stacks(running), strict=True):
            windows.add(stack, BlockRunner(running, fake, as_inputs(running, tokens, len(tokens))))
    return _plan(whole, windows)


def _plan(whole: nn.Module, windows: Windows) -> ReconstructionPlan:
    """Return the plan of the model `whole`, whose stacks were added to `windows`."""
    inside = bytes_of(p for stack in find_stacks(whole) for block in stack.values() for p in block.parameters())
    total = bytes_of(whole.parameters())
    window, stored = max(windows.windows)
    return ReconstructionPlan(
        regions=windows.regions,
        model_bytes=total,
        outside_bytes=total - inside,
        window_bytes=window,
        stored_window_bytes=stored,
        waiting_bytes=max(windows.waiting),
        activations=windows.task.activations,
        pruning_bytes=max(pruning for sizes in windows.sizes.values() for pruning, _ in sizes),
        fitting_bytes=max(fitting for sizes in windows.sizes.values() for _, fitting in sizes),
    )
