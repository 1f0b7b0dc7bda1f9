"""`residual_lora`: a LoRA adapter, computed in closed form, that corrects the outputs of a pruned model."""

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..calibration.activations import Activations
from ..calibration.inputs import Calibration, as_inputs, evaluation_mode, in_words
from ..calibration.measure import measure, relative_error, warn_of_few_tokens
from ..calibration.observing import Sight
from ..calibration.proof import prove
from ..calibration.residence import on_device
from ..calibration.runner import BlockRunner, stack_runners
from ..model.blocks import Targets, base_model, called_layers
from ..model.environment import check_device, peak_memory
from ..model.offload import loaded_layer
from ..model.processes import agree, stopping_together
from ..model.settings import ordinary_settings
from ..model.tree import without_adapters
from ..model.weights import to_host
from ..pruning.one_weight import noting
from .low_rank import low_rank_residual, squares
from .residual_checks import ResidualTask, residual_task
from .residual_report import ResidualReport, ResidualWeightReport, mark


@ordinary_settings()
def residual_lora(
    model: nn.Module,
    dense: nn.Module,
    calibration: Calibration,
    *,
    r: int = 16,
    damping: float = 0.01,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    rank_pattern: dict[str, int] | None = None,
    task_type: str | None = None,
    adapter_name: str = "default",
    batch_size: int = 1,
    activations: Activations = "device",
    device: torch.device | str | None = None,
) -> tuple[PeftModel, ResidualReport]:
    """Correct a pruned model by an ordinary LoRA adapter, which is computed in closed form and not trained.

    For each pruned weight W' (out, in) with the dense weight W and inputs X, the adapter holds the best L of rank r:

        min over L = B A of ‖(W - W' - L)X‖² + λ‖W - W' - L‖²

    With H + λI = C Cᵀ, H = XᵀX and the singular value decomposition U S Vᵀ of (W - W')C, it is L = U_r S_r V_rᵀ C⁻¹.
    This equals U_r U_rᵀ(W - W'), whose U_r are the r leading eigenvectors of (W - W')(H + λI)(W - W')ᵀ. It is computed
    in this form, in the dtype of H: float32, or float64 for inputs in float64. L projects the error of the outputs, so
    it makes the error of no input larger. Column i of B and row i of A have equal norms, and their products are
    ordered by the error that they take away. `lora_alpha` equals the rank of each layer, so the scaling is 1.

    Blocks are corrected one after the other. X has passed through the blocks before, which are pruned and corrected.
    The inputs of all weights of a block are measured before the first of them is corrected. The weights of `model` do
    not change. If an error occurs, the adapter is taken out again. If `torch.distributed` runs several processes, each
    of them makes the same call. They share the batches, and all of them get the same adapter.

    The adapter belongs to the pruned model. Merging it fills the zeros of the weights. It is a start for retraining,
    too: pass the returned model to `SparseTrainer`.

    Liu et al. 2024, arXiv:2410.21271 (EoRA).

    Args:
        model: a pruned model whose weights are in memory and not quantised, without adapters.
        dense: the model before it was pruned. It is read and not run.
        calibration: token ids (sequences, tokens), what a tokenizer returns, or an iterable of model inputs, such as a
            list, a `DataLoader` or a tokenised `datasets.Dataset`. Padding does not count, that is tokens whose
            `attention_mask` is 0. A batch may also hold a `token_mask` (sequences, tokens), or a `decoder_token_mask`,
            which the model does not see: only tokens where it is 1 count.
        r: the rank of the corrections, at most min(out, in).
        damping: λ as a fraction of the mean of the diagonal of H, at least 0. It counts the directions of the inputs
            that few calibration tokens have.
        target_modules: which layers are corrected: a list of names or name endings, or a regular expression for the
            whole name, as in PEFT. By default every linear or convolution layer inside the blocks that was pruned.
            Fused experts and convolutions with groups, with dilation or with another padding than zeros are left out,
            because LoRA does not adapt them. The report lists what is left out.
        exclude_modules: which layers are not corrected, in the same form.
        rank_pattern: other ranks than `r`, as in `LoraConfig`: names, name endings or regular expressions for the
            whole name -> rank.
        task_type: that of the `LoraConfig`, such as "CAUSAL_LM".
        adapter_name: the name of the adapter.
        batch_size: how many sequences run together, where they do not come in batches.
        activations: where the hidden states of the calibration data wait between blocks: "device", "cpu" or "disk".
        device: where each block is moved while it is processed. None computes where the block is.

    Returns:
        The `PeftModel` around `model`, and a report with the output error of each weight without and with the adapter.

    Raises:
        ValueError: an argument is invalid; calibration is missing, or never reaches the block of a target; a weight or
            its input is not finite; a weight cannot be read, is offloaded or lies outside the blocks; a model has
            adapters; `dense` is the same model, has other weights, or is as sparse as `model`; no weight differs, or
            LoRA can adapt none of those that do; processes were called differently.
        RuntimeError: another process failed.
    """
    started = time.perf_counter()
    check_device(device, is_there=False)
    with stopping_together():
        task = residual_task(
            model,
            dense,
            calibration,
            r=r,
            damping=damping,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            rank_pattern=rank_pattern,
            batch_size=batch_size,
            activations=activations,
        )
        # An adapter that is attached outside of the wrappers of DDP and `torch.compile` would have their names.
        model = base_model(model)
        inputs = as_inputs(model, calibration, batch_size)
        agree(f"to correct {len(task.pruned)} weights by rank {r}, {rank_pattern}, {damping}, by {in_words(inputs)}")
        residence = on_device(device)
        with evaluation_mode(model):
            proof = prove(model, inputs, task.inside, residence)
            task.leave_out({n: "a layer that is never called" for n in task.pruned if n in proof.sight.products})
            config = _config(task, model, r, rank_pattern, task_type)
            with _attached(model, config, adapter_name) as adapted:
                runners = stack_runners(
                    model,
                    inputs,
                    task.inside,
                    activations=activations,
                    residence=residence,
                    proof=proof,
                )
                weights = _correct(model, task, runners, proof.sight, damping, adapter_name)
    entries = sum(p.numel() for name, p in adapted.named_parameters() if ".lora_" in name)
    seconds = time.perf_counter() - started
    report = ResidualReport(r, damping, entries, seconds, peak_memory(), weights, task.left_out)
    mark(config, report, task.sparsity)
    return adapted, report


def _config(
    task: ResidualTask, model: nn.Module, r: int, rank_pattern: dict[str, int] | None, task_type: str | None
) -> LoraConfig:
    """Return the configuration of an adapter with a scaling of 1 on exactly the weights of the task."""
    targets = list(task.pruned)
    # PEFT also adapts layers whose names end in the whole name of a target.
    longer = [n for n, _ in model.named_modules() if any(n.endswith(f".{target}") for target in targets)]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets,
        exclude_modules=longer or None,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(rank_pattern or {}),
        task_type=task_type,
        fan_in_fan_out=any(isinstance(weight.layer, Conv1D) for weight in task.pruned.values()),
    )


@contextlib.contextmanager
def _attached(model: nn.Module, config: LoraConfig, adapter_name: str) -> Iterator[PeftModel]:
    """Attach an adapter that changes nothing yet. If the context ends by an error, the adapter is taken out again."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings():
            # In a model with layers of both kinds, PEFT sets this for each layer and says so.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted = get_peft_model(cast(Any, model), config, adapter_name)
        yield adapted
    except BaseException:
        without_adapters(model)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise


@torch.no_grad()
def _correct(
    model: nn.Module, task: ResidualTask, runners: Iterable[BlockRunner], sight: Sight, damping: float, adapter: str
) -> tuple[ResidualWeightReport, ...]:
    """Compute the corrections block by block and write them into the adapter. Return the errors of each weight."""
    found: dict[str, Tensor] = {}
    warned = False
    layers = called_layers(model)
    for runner in runners:
        for index in tqdm(runner.order, desc="correcting", unit="block", disable=None):
            weights = task.inside(runner.names[index])
            with noting(f"While correcting {runner.names[index]!r}. The model is as before."), runner.resident(index):
                if weights:
                    measured = measure(model, runner, index, weights, ("hessian",), sight)
                    for name in measured.inputs:
                        warned = warned or warn_of_few_tokens(name, measured.of(name))
                        found[name] = _write(task, name, layers, measured.inputs[name].hessian, damping, adapter)
                runner.advance(index)
    missed = {name: "an expert that no calibration token reached" for name in task.pruned if name not in found}
    task.left_out |= missed
    errors = to_host([error for whole, *lost in found.values() for error in (relative_error(e, whole) for e in lost)])
    return tuple(
        ResidualWeightReport(name, task.pruned[name].shape, task.ranks[name], *errors[2 * number : 2 * number + 2])
        for number, name in enumerate(found)
    )


def _write(
    task: ResidualTask, name: str, layers: dict[int, nn.Module], hessian: Tensor | None, damping: float, adapter: str
) -> Tensor:
    """Write the correction of one weight into its LoRA layer. Return ‖WX‖² and the squared errors before and after."""
    assert hessian is not None, "it is what was measured"
    weight, dense = task.pruned[name], task.dense[name]
    pruned = weight.matrix().to(hessian.dtype)
    with loaded_layer(dense.layer):
        matrix = dense.matrix().to(pruned)
    B, A = low_rank_residual(matrix - pruned, hessian, task.ranks[name], damping)
    layer: Any = layers[id(weight.layer)]
    for stored, factor in ((layer.lora_B[adapter].weight, B), (layer.lora_A[adapter].weight, A)):
        stored.copy_(factor.view_as(stored))
    return squares(matrix, [pruned, pruned.addmm(B, A)], hessian)
