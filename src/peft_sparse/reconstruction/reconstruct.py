"""reconstruct: the arguments of layer-wise reconstruction, checked and put to work."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_linear_schedule_with_warmup

from ..calibration.activations import Activations, check_activations
from ..calibration.gradients import gradient_sums
from ..calibration.inputs import Calibration, as_inputs, evaluation_mode, fingerprint_of_inputs
from ..calibration.runner import on_device
from ..model.blocks import Targets
from ..model.weights import check_finite
from ..pruning.checkpoint import StreamedModel
from ..pruning.criteria import Criterion, Score
from ..pruning.patterns import Group
from ..pruning.task import PatternLike, PruningTask, check_calibration, count_sequences
from .checks import check_amounts, check_choices, check_models, check_task, spell
from .fitting import Loss, Recipe, Step, held_out_batches
from .progress import Progress, fingerprint_of_model
from .regions import RegionSize
from .report import ReconstructionReport, RegionReport
from .work import Mode, Reconstruction


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
        optimizer=optimizer
        or (lambda parameters: torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0, fused=True)),
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
    check_amounts(holdout, epochs, max_steps, batch_size, gradient_accumulation_steps)
    check_models(model, dense)
    check_activations(activations)
    given = 0.0 if pattern is None else pattern
    task = PruningTask.of(
        model,
        given,
        criterion=criterion,
        group=group,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        loaded=streamed is None,
    )
    check_task(task, tuner)
    check_calibration(task, calibration)
    if streamed is None:
        check_finite(task.weights)
    else:
        streamed.start(task)
    inputs = as_inputs(model, calibration, batch_size)
    task.sequences = count_sequences(inputs)
    choices = (task.patterns, task.criterion, task.group, region, mode, holdout, loss, learning_rate, epochs,
               max_steps, max_grad_norm, gradient_accumulation_steps, autocast, seed, *map(spell, (tuner, optimizer,
               scheduler)))  # fmt: skip
    fingerprint = {} if state_dir is None else {
        "model": fingerprint_of_model(model),
        "dense model": "" if dense is None else fingerprint_of_model(dense),
        "data": fingerprint_of_inputs(inputs),
        "arguments": " ".join(map(str, choices)),
    }  # fmt: skip
    # What streaming reads block by block, the fingerprint of the model does not know.
    progress = Progress(state_dir, fingerprint, by_region=streamed is not None)
    work = Reconstruction(model, dense, task, recipe, region, mode, holdout, activations, progress, on_region)
    with evaluation_mode(model), evaluation_mode(model if dense is None else dense), frozen(model):
        if on_start is not None:
            on_start(recipe.steps(len(inputs) - held_out_batches(holdout, len(inputs))))
        if "gradients" in task.needs:
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
