"""Plans the memory of training: it simulates one optimiser step, and divides the result among the devices."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from ..calibration.text import SEQUENCE_LENGTH
from ..model.blocks import find_blocks, prunable_weights
from ..model.tree import has_adapters
from .optimizer_step import Optimizer, StepBytes, loss_of, simulated_step
from .simulation import GIB, Described, Simulation, bytes_of, described, refusing


Strategy = Literal["ddp", "fsdp", "zero2", "zero3"]

# DeepSpeed's defaults, in elements: `reduce_bucket_size` and `stage3_max_live_parameters`.
_BUCKET, _LIVE_PARAMETERS = 5 * 10**8, 10**9


@dataclass(frozen=True)
class TrainingPlan:
    """The memory of one device in a training run, in bytes.

    Args:
        strategy: how the work is divided among the devices: "ddp", "fsdp", "zero2" or "zero3".
        devices: number of devices.
        parameters: number of parameters of the model.
        trained: number of parameters that are trained.
        parameter_bytes: parameters on this device between steps.
        gradient_bytes: all gradients on this device.
        optimizer_bytes: optimiser state on this device.
        mask_bytes: masks that `ZeroGuardCallback` keeps, 1/8 byte per prunable weight.
        activation_bytes: the most that forward and backward pass hold besides gradients: tensors kept for the backward
            pass, logits, loss and temporaries.
        gathered_bytes: whole parameters that are gathered from all devices while they are used.
        buffer_bytes: gradients that are being sent between devices.
        peak_bytes: the peak of a step. It can be less than the sum of the parts, because gradients grow while
            activations are freed.
    """

    strategy: Strategy
    devices: int
    parameters: int
    trained: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    mask_bytes: int
    activation_bytes: int
    gathered_bytes: int
    buffer_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        parts = {
            "parameters": self.parameter_bytes,
            "gradients": self.gradient_bytes,
            "optimizer": self.optimizer_bytes,
            "masks": self.mask_bytes,
            "activations": self.activation_bytes,
            "gathered parameters": self.gathered_bytes,
            "buffers": self.buffer_bytes,
        }
        where = "one device" if self.devices == 1 else f"each of {self.devices} devices ({self.strategy})"
        return (
            f"{self.trained:,} of {self.parameters:,} parameters trained; on {where}:\n"
            + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items() if size)
            + f"\npeak {self.peak_bytes / GIB:.2f} GiB"
        )


def plan_training(
    model: Described,
    peft_config: PeftConfig | None = None,
    *,
    batch_size: int = 1,
    length: int = SEQUENCE_LENGTH,
    gradient_accumulation_steps: int = 1,
    activation_checkpointing: bool = False,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    optimizer: Optimizer | None = None,
    strategy: Strategy = "ddp",
    devices: int = 1,
) -> TrainingPlan:
    """Return the memory that retraining with `SparseTrainer` will take on each device, before a weight is loaded.

    One optimiser step of the model's own code is run on tensors without values: forward pass, backward pass and
    update. Its memory is then divided among the devices by formulas. The sequences have no padding, as
    `pack_sequences` makes them.

    Args:
        model: a language model, which may be on the meta device or have adapters; a configuration; or the folder or
            name of a saved model. The model is not changed.
        peft_config: the adapters to attach, such as `MaskLoRAConfig`. None trains the parameters that need gradients,
            by default all.
        batch_size: sequences of one device in one forward pass (`per_device_train_batch_size`).
        length: the number of tokens of a sequence.
        gradient_accumulation_steps: batches for each optimiser step.
        activation_checkpointing: whether activations inside the blocks are computed again in the backward pass
            (`gradient_checkpointing` in `TrainingArguments`).
        dtype: dtype of the base parameters. By default that of the model, or the one that its configuration names.
        autocast: dtype of mixed precision, such as `torch.bfloat16` for `TrainingArguments(bf16=True)`. None computes
            in the dtype of the parameters.
        optimizer: function parameters -> optimizer. By default AdamW. It must run on tensors without values, as the
            optimisers of torch do.
        strategy: what is divided among the devices. "ddp": nothing. "zero2": gradients and optimiser state. "zero3"
            and "fsdp": parameters too. DeepSpeed's float32 copies of parameters count as part of the optimiser state.
        devices: number of devices.

    Returns:
        A plan with the memory of each part, and the peak.

    Raises:
        ValueError: the strategy is unknown; a number is below 1; the model has adapters and `peft_config` is given;
            the configuration does not name exactly one class of transformers; parameters are quantised; the model
            computes no loss from tokens, or cannot be run without values.
    """
    _check(strategy, batch_size, length, gradient_accumulation_steps, devices)
    whole = _attached(described(model, dtype), peft_config)
    whole.train()
    if activation_checkpointing:
        checkpointed: Any = whole
        # Older versions of Transformers have only the second name.
        getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    simulated = Simulation().of(whole, whole)
    with refusing(simulated):
        step = simulated_step(
            simulated,
            lambda: loss_of(simulated, torch.zeros(batch_size, length, dtype=torch.long), autocast),
            gradient_accumulation_steps,
            optimizer or partial(torch.optim.AdamW, fused=True),
            gradient_share=1 if strategy == "ddp" else devices,
            units=_units(simulated) if strategy == "fsdp" and devices > 1 else [],
            masters=strategy in ("zero2", "zero3"),
        )
    return _shared_out(simulated, step, strategy, devices)


def _check(strategy: str, *numbers: int) -> None:
    if strategy not in get_args(Strategy):
        choices = ", ".join(map(repr, get_args(Strategy)))
        raise ValueError(f"`strategy` must be one of {choices}, got {strategy!r}.")
    names = ("batch_size", "length", "gradient_accumulation_steps", "devices")
    for name, value in zip(names, numbers, strict=True):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value!r}.")


def _attached(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    if peft_config is None:
        return model
    if has_adapters(model):
        raise ValueError("The model has adapters already. Leave `peft_config` out, or pass a model without adapters.")
    adapted: nn.Module = get_peft_model(model, copy.deepcopy(peft_config), low_cpu_mem_usage=True)
    return adapted


def _shared_out(model: nn.Module, step: StepBytes, strategy: Strategy, devices: int) -> TrainingPlan:
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    sharded = devices if strategy in ("fsdp", "zero3") else 1
    shared_state = 1 if strategy == "ddp" else devices
    masks = sum(-(-weight.matrix().numel() // 8) for weight in prunable_weights(model).values())
    gathered, buffers = _between_devices(model, strategy) if devices > 1 else (0, 0)
    resident = [bytes_of(parameters) // sharded, step.optimizer // shared_state, masks // sharded]
    optimizer_peak = step.gradients + (step.optimizer_peak - step.gradients) // shared_state
    # ZeRO-3 holds memory for all gradients at all times.
    backward_peak = step.gradients + step.activations if strategy == "zero3" else step.backward_peak
    return TrainingPlan(
        strategy=strategy,
        devices=devices,
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in trained),
        parameter_bytes=resident[0],
        gradient_bytes=step.gradients,
        optimizer_bytes=resident[1],
        mask_bytes=resident[2],
        activation_bytes=step.activations,
        gathered_bytes=gathered,
        buffer_bytes=buffers,
        peak_bytes=sum(resident) + buffers + max(gathered + backward_peak, optimizer_peak),
    )


def _between_devices(model: nn.Module, strategy: Strategy) -> tuple[int, int]:
    """Return the bytes of gathered parameters, and of gradients that are being sent. One device has neither."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    outside, *blocks = map(bytes_of, _units(model))
    if strategy == "ddp":
        return 0, bytes_of(trained)
    if strategy == "fsdp":
        # Two blocks, because the next one is gathered while one computes.
        return 2 * max(blocks) + outside, 0
    bucket = _BUCKET * max((p.element_size() for p in trained), default=0)
    live = min(bytes_of(parameters), _LIVE_PARAMETERS * max(parameter.element_size() for parameter in parameters))
    return max(*blocks, live) if strategy == "zero3" else 0, bucket


def _units(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters outside the blocks, followed by those of each block."""
    blocks = [list(block.parameters()) for block in find_blocks(model).values()]
    inside = {id(parameter) for block in blocks for parameter in block}
    return [[parameter for parameter in model.parameters() if id(parameter) not in inside], *blocks]
