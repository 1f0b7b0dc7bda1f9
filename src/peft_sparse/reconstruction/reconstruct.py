"""`reconstruct` prunes a model in memory region by region, and fits each region."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..calibration.activations import Activations
from ..calibration.inputs import Calibration, as_inputs, count_sequences
from ..calibration.residence import on_device
from ..model.blocks import Targets
from ..model.environment import check_device, remember
from ..model.processes import agree, stopping_together
from ..model.settings import ordinary_settings
from ..model.weights import check_finite
from ..pruning.allocation import Allocation
from ..pruning.by_name import PatternLike
from ..pruning.criteria import CriterionLike
from ..pruning.least_squares import LeastSquares
from ..pruning.offloaded import checked_when_loaded, one_layer_at_a_time
from ..pruning.patterns import Group
from ..pruning.refinement import Refinement
from ..pruning.task import OnUnreached
from .checks import check_teaching, checked_calibration, reconstruction_task
from .fit import Fit
from .observer import ReconstructionObserver
from .regions import RegionSize
from .report import ReconstructionReport
from .run import run
from .task import Mode


@ordinary_settings()
def reconstruct(
    model: nn.Module,
    pattern: PatternLike | Mapping[str, PatternLike] | None = None,
    calibration: Calibration | None = None,
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
    on_unreached: OnUnreached = "magnitude",
    batch_size: int = 1,
    activations: Activations = "device",
    device: torch.device | str | None = None,
    dense: nn.Module | None = None,
    region: RegionSize = "submodule",
    mode: Mode = "SS",
    fit: Fit = Fit(),
    state_dir: str | Path | None = None,
    observer: ReconstructionObserver | None = None,
) -> ReconstructionReport:
    """Prune a model region by region, and fit the kept weights of each region to its dense outputs. In place.

    For each region f with parameters θ and mask M, in the order of the model:

        min over θ of mean ||f(x; θ, M) - t||²

    x are the inputs of the region, (sequences, tokens, features), and t are its targets: by default what the dense
    region returns for x. Other losses can be chosen in `fit`. Only one region at a time has gradients and an optimiser
    state. The hidden states of all calibration batches wait between the regions. A region is scored, pruned and fitted
    before the next region is scored. Its blocks are in float32 with dropout off until it is finished. Afterwards the
    model consists of plain modules again, and every zero that pruning wrote is still there. If a fit makes the error
    on the held-out batches larger, it is undone.

    Allocation is computed once, on the dense model. Refinement and update are part of pruning a region, before its
    fit. With `region="matrix"` the update replaces the fit: it is always made, and `update` gives its numbers.

    Zimmer et al. 2023, arXiv:2312.15230, section 3.3 (PERP). "A Free Lunch in LLM Compression", 2025,
    arXiv:2510.14444.

    Args:
        model: a model whose weights are in memory and not quantised, without adapters.
        pattern: a sparsity in [0, 1); or "n:m", which keeps n of every m entries along the inputs; or an
            `Unstructured` or `SemiStructured`. A dict gives one of these per layer: its keys are names, name endings
            or regular expressions for the whole name, the first key that matches counts, and a layer that no key
            matches is not pruned.
        calibration: token ids (sequences, tokens), what a tokenizer returns, or an iterable of model inputs, such as a
            list, a `DataLoader` or a tokenised `datasets.Dataset`. Padding does not count, that is tokens whose
            `attention_mask` is 0. A batch may also hold a `token_mask` (sequences, tokens), or a `decoder_token_mask`,
            which the model does not see: only tokens where it is 1 count. Each batch is also a batch of training.
        sparsity: another way to write a `pattern` that is a number.
        criterion: "magnitude", "random", "wanda", "ria", "sparsegpt" or "gblm"; or one of these as a value with its
            numbers, such as `SparseGPT(damping=0.1)`; or a function (weight (out, in), `Statistics`) -> scores
            (out, in), higher = kept; or a `Criterion`, which also says what the function needs.
        group: which entries are compared with each other: "row" (one output) or "matrix". By default the group of the
            criterion's paper. n:m compares within each m entries and SparseGPT within blocks of columns, so these take
            no group. "model" is refused, because each region is pruned on its own.
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
        on_unreached: what happens to an expert that no calibration token reaches. "magnitude" prunes it by magnitude
            to the same pattern, and a warning lists such experts. "error" runs the model on all batches first, and
            refuses before any work.
        batch_size: how many sequences run together, where they do not come in batches.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu" or "disk".
        device: where each block is moved while it is processed. None computes where the block is.
        dense: the model before it was pruned, if `model` has been pruned already. It gives the targets, and nothing
            more is pruned: leave `pattern` and `sparsity` out.
        region: what is fitted at a time. "submodule": the attention and the MLP of a block, one after the other, each
            with its residual; or the block, if it cannot be divided so. The report says which blocks were fitted whole
            and why. "block": one block. A number: as many consecutive blocks. "matrix": each weight matrix; it is not
            trained, because `masked_least_squares` computes it from XᵀX.
        mode: where inputs x and targets t come from. "SS": x has passed through the earlier regions, which are pruned
            and fitted, and t is what the dense region returns for this x. "DD": both come from the dense model;
            regions are then independent, and the processes of a `torch.distributed` group share them. "SD": x is that
            of "SS", and t is that of "DD".
        fit: how a region is trained: tuner, loss, learning rate, steps, optimiser, held-out batches, seed.
        state_dir: a folder in which finished regions are kept. The same call with the same folder resumes a run that
            was killed, and ends with the same weights. Another call with this folder is refused. To compare the calls,
            a function in an argument counts by its name, and a `functools.partial` also by its arguments.
        observer: a `ReconstructionObserver` that follows the run: its start, its steps, its finished regions.

    Returns:
        A report with the error of each region before and after the fit, and with the report of the pruning.

    Raises:
        TypeError: `pattern` or `update` has another type than these.
        ValueError: an argument is invalid, or does not go with another one; calibration is missing, or never reaches
            the block of a target; a weight, a statistic or a score is not finite; the model has adapters; `dense` is
            another model; the weights are as sparse as asked already, or equal those of `dense`; `state_dir` holds
            another run; a weight belongs to two regions; the tuner filled zeros; processes were called differently. An
            error that occurs in a block has a note with the name of the block, or of the first block of its region.
        RuntimeError: another process failed.
    """
    started = time.perf_counter()
    check_device(device, is_there=False)
    with stopping_together():
        task = reconstruction_task(
            model,
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
            on_unreached=on_unreached,
            batch_size=batch_size,
            activations=activations,
            dense=dense,
            region=region,
            mode=mode,
            fit=fit,
            loaded=True,
        )
        inputs = as_inputs(model, checked_calibration(task.pruning, calibration), batch_size)
        check_finite(task.pruning.weights)
        with one_layer_at_a_time(task.pruning.weights) as reading:
            check_teaching(task.pruning, dense, reading)
        residence = checked_when_loaded(on_device(device), task.pruning.inside)
        agree(task.in_words(inputs))
        regions = run(task, inputs, residence, state_dir, observer)
    report = task.report(regions, time.perf_counter() - started)
    values = report.to_dict()
    remember(model, reconstruction=values)
    if values["pruning"] is not None:
        remember(model, pruning=values["pruning"] | {"calibration_sequences": count_sequences(inputs)})
    return report
