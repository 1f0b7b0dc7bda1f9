"""Prunes a checkpoint on disk block by block, for models that are larger than memory.

The weights of one block are in memory at a time, and the weights outside of the blocks all the time.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..calibration.activations import Activations, check_activations
from ..calibration.findings import Proof
from ..calibration.inputs import Calibration, as_inputs, count_sequences, evaluation_mode
from ..calibration.proof import prove
from ..calibration.runner import stack_runners
from ..model.blocks import Targets
from ..model.settings import ordinary_settings
from .all_weights import allocated_patterns
from .allocation import Allocation
from .by_name import PatternLike
from .checks import check_calibration, pruning_task
from .criteria import CriterionLike
from .least_squares import LeastSquares
from .patterns import Group
from .prune import prune_blocks, prune_stack
from .refinement import Refinement
from .report import PruningReport
from .streamed_model import StreamedModel
from .task import OnUnreached, PruningTask


@ordinary_settings()
def prune_checkpoint(
    source: str | Path,
    output: str | Path,
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
    batch_size: int | None = None,
    activations: Activations = "cpu",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PruningReport:
    """Prune a saved model without loading it as a whole, and save the result for `from_pretrained`.

    One block at a time is read from safetensors, pruned as `prune` does it, written and dropped. The tensors are those
    that `from_pretrained`, `prune` and `save_pretrained` would give: transformers' own conversions are made block by
    block, so experts may be stored one by one, as on the hub. `source` is only read. If the run is killed, `output`
    holds the finished blocks but no index, so no loader takes it for a complete checkpoint.

    Of the other files, those that are known to belong to a model are copied: configuration, tokenizer, processor, chat
    templates, licence, model card, and Python code that the configuration refers to. A warning names the files and the
    tensors that were not copied.

    Args:
        source: a local folder as `save_pretrained` writes it, with config.json and safetensors.
        output: a folder that does not exist, is empty, or holds what a killed run left. Such remains are overwritten.
        pattern: a sparsity in [0, 1); or "n:m", which keeps n of every m entries along the inputs; or an
            `Unstructured` or `SemiStructured`. A dict gives one of these per layer: its keys are names, name endings
            or regular expressions for the whole name, the first key that matches counts, and a layer that no key
            matches is not pruned.
        calibration: token ids (sequences, tokens), what a tokenizer returns, or an iterable of model inputs, such as a
            list, a `DataLoader` or a tokenised `datasets.Dataset`. Padding does not count, that is tokens whose
            `attention_mask` is 0. A batch may also hold a `token_mask` (sequences, tokens), or a `decoder_token_mask`,
            which the model does not see: only tokens where it is 1 count. A criterion that needs no calibration uses
            it to report output errors.
        sparsity: another way to write a `pattern` that is a number.
        criterion: "magnitude", "random", "wanda", "ria", "sparsegpt" or "gblm"; or one of these as a value with its
            numbers, such as `SparseGPT(damping=0.1)`; or a function (weight (out, in), `Statistics`) -> scores
            (out, in), higher = kept; or a `Criterion`, which also says what the function needs.
        group: which entries are compared with each other: "row" (one output), "matrix" or "model". By default the
            group of the criterion's paper. n:m compares within each m entries and SparseGPT within blocks of columns,
            so these take no group. "model" is refused, because it needs the whole model.
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
        batch_size: how many sequences run together, where they do not come in batches. By default as many of one
            length as have up to 256 tokens together, and one where processes share the batches. The statistics do not
            depend on it beyond rounding.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu" or "disk".
        device: where each block is loaded.
        trust_remote_code: whether Python code in `source` may run to define the model, as in `from_pretrained`.

    Returns:
        A report with the sparsity and, with calibration, the relative output error of each weight.

    Raises:
        TypeError: `pattern` or `update` has another type than these.
        ValueError: an argument is invalid, or does not go with another one; a target is tied to an embedding, or lies
            outside the blocks; n:m does not divide the inputs; calibration is missing, or never reaches the block of a
            target; a weight, a statistic or a score is not finite; `source` holds no safetensors, lacks a tensor of
            the model, or holds it quantised or in another shape; no class of the configuration fits; tensors of
            several blocks are converted together or tied; `output` holds other files; the criterion or `group` needs
            the whole model; several processes run. If an error occurs after some blocks were pruned, its note names
            the block.
    """
    started = time.perf_counter()
    streamed = StreamedModel(source, output, device, trust_remote_code)
    model = streamed.model
    task = pruning_task(
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
        loaded=False,
    )
    check_activations(activations)
    check_calibration(task, calibration)
    inputs = None if calibration is None else as_inputs(model, calibration, batch_size)
    task.sequences = count_sequences(inputs or [])
    streamed.start(task)
    with evaluation_mode(model):
        proof = None if inputs is None else _proved(streamed, task, inputs)
        if task.allocation is not None:
            task.patterns = allocated_patterns(
                model, task, inputs, activations, streamed.resident, streamed.weight_in_memory, proof
            )
        if inputs is None or proof is None:
            prune_blocks(task, streamed.blocks, streamed.resident, streamed.save)
        else:
            for runner in stack_runners(
                model,
                inputs,
                task.inside,
                activations=activations,
                residence=streamed.resident,
                proof=proof,
            ):
                prune_stack(model, runner, task, proof, streamed.save)
    streamed.finish()
    return task.report(time.perf_counter() - started)


def _proved(streamed: StreamedModel, task: PruningTask, inputs: list[dict[str, Any]]) -> Proof:
    every = task.on_unreached == "error"
    try:
        return prove(streamed.model, inputs, task.inside, streamed.resident, every_expert=every)
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        raise ValueError(
            "The model uses weights of a block outside of calls of this block, and on disk a block is loaded when it "
            "is called. Load the model and use `prune`."
        ) from error
