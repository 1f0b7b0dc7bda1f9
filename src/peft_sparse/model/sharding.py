"""Reads and writes sharded parameters: DTensors of FSDP2 and partitions of DeepSpeed's ZeRO-3."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from .processes import total_of


def is_sharded(parameter: Tensor) -> bool:
    """Return whether this process holds only a part of `parameter`."""
    return isinstance(parameter, DTensor) or is_partitioned(parameter)


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 has split `parameter` among processes."""
    return hasattr(parameter, "ds_tensor")


FSDP1 = (
    "FSDP1 flattens weights, so that their zeros cannot be kept. Set `fsdp_version: 2` in the configuration of "
    'accelerate, as in examples/accelerate_configs/fsdp2.yaml, or `fsdp_config={"version": 2}`.'
)


def check_strategy(model: nn.Module) -> None:
    """Check that `model` is one, and that FSDP1 does not hold its weights.

    FSDP1 flattens weights, so that their entries cannot be located.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: FSDP1 holds weights of `model`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected a model, that is an nn.Module, got a value of type {type(model).__name__}. Load it by "
            "`from_pretrained`, or prune a folder by `prune_checkpoint`."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(FSDP1)


def has_shards(module: nn.Module) -> bool:
    """Return whether any parameter within `module` is sharded."""
    return any(is_sharded(parameter) for parameter in module.parameters())


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole `parameter`, also if this process holds only a part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_part(parameter: Tensor) -> Tensor:
    """Return the part of `parameter` that this process holds, detached. Writing to it writes to `parameter`."""
    if isinstance(parameter, DTensor):
        return cast(DTensor, parameter.detach()).to_local()
    if not is_partitioned(parameter):
        return parameter.detach()
    partition: Any = parameter
    flat = partition.ds_tensor.detach()
    # The last partitions are padded, so that all have one size.
    before = dist.get_rank(partition.ds_process_group) * flat.numel()
    return flat[: max(0, min(flat.numel(), partition.ds_numel - before))]


def totals(values: list[Tensor], parameters: list[Tensor]) -> list[int]:
    """Return the sum of each value over the processes that hold parts of its parameter.

    The host waits for the device once.

    Args:
        values: for each parameter, a count in the part that this process holds.
        parameters: the parameters, in the same order.
    """
    sums = torch.stack([value.to(values[0].device, torch.long) for value in values]) if values else torch.zeros(0)
    shared: dict[tuple[Any, ...], list[int]] = {}
    for index, parameter in enumerate(parameters):
        shared.setdefault(_holders(parameter), []).append(index)
    for groups, indices in shared.items():
        for group in groups:
            sums[indices] = total_of(sums[indices], group)
    return sums.tolist()


def _holders(parameter: Tensor) -> tuple[Any, ...]:
    """Return the process groups among which `parameter` is split."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return tuple(mesh.get_group(axis) for axis, placement in enumerate(placements) if placement.is_shard())
    return (parameter.ds_process_group,) if hasattr(parameter, "ds_process_group") else ()


@contextlib.contextmanager
def whole(module: nn.Module, *, write: bool = False, recurse: bool = True) -> Iterator[None]:
    """Gather every parameter of `module` within the context, and shard it again after.

    All processes must enter the context together. Within it, no FSDP module may run: it would drop what was gathered.

    Args:
        module: the module that holds the parameters.
        write: keep what is written to the parameters. It must be the same in every process. It is also written to the
            copies that DeepSpeed's optimiser updates.
        recurse: gather the parameters of the modules inside `module` too.
    """
    modules = list(module.modules()) if recurse else [module]
    parameters = list({id(p): p for part in modules for p in part.parameters(recurse=False)}.values())
    reshard(module)
    with _gathered_tensors(modules, write), _gathered_partitions(parameters, write):
        yield
    for parameter in parameters if write else ():
        for part, master in deepspeed_copies(parameter):
            # The master copy has more digits. Entries that were not written to keep them.
            master.copy_(torch.where(master.to(part.dtype) == part, master, part.to(master.dtype)))


def reshard(module: nn.Module) -> None:
    """Make FSDP drop what it gathered within `module`, so that its parameters are those that the optimiser updates."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextlib.contextmanager
def _gathered_tensors(modules: list[nn.Module], write: bool) -> Iterator[None]:
    known: dict[int, nn.Parameter] = {}
    places: list[tuple[dict[str, Any], str, DTensor]] = []
    for part in modules:
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DTensor):
                places.append((part._parameters, name, parameter))
                if id(parameter) not in known:
                    full = parameter.detach().full_tensor()
                    known[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
    try:
        for parameters, name, sharded in places:
            parameters[name] = known[id(sharded)]
        yield
    finally:
        for parameters, name, sharded in places:
            parameters[name] = cast(nn.Parameter, sharded)
    if write:
        for sharded in {id(parameter): parameter for _, _, parameter in places}.values():
            full = known[id(sharded)].detach()
            # Without a source rank, nothing is sent: each process takes its part out of its own copy.
            mine = distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=None)
            own_part(sharded).copy_(own_part(mine))


@contextlib.contextmanager
def _gathered_partitions(parameters: list[nn.Parameter], write: bool) -> Iterator[None]:
    partitions = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitions:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitions, modifier_rank=0 if write else None):
        yield


def uses_deepspeed(module: nn.Module) -> bool:
    """Return whether DeepSpeed's optimiser updates copies of trained weights of `module`."""
    return any(_has_master(parameter) for parameter in module.parameters())


def deepspeed_copies(parameter: Tensor, optimizer: Optimizer | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (part of `parameter`, tensor that DeepSpeed's optimiser holds for this part in this process), both flat.

    What the caller writes to the second tensor is kept when the caller asks for the next pair. Without DeepSpeed's
    optimiser, nothing is yielded.

    Args:
        parameter: the parameter.
        optimizer: yield its states with a value per entry, such as momentum. With None, yield the copy of the weight
            that the optimiser updates.
    """
    if not _has_master(parameter):
        return
    states = [None] if optimizer is None else _states_of_entries(optimizer)
    deepspeed: Any = parameter
    if is_partitioned(parameter):
        for key in states:
            held = deepspeed._z3_optimizer.get_local_fp32_param(parameter, key).detach()
            yield deepspeed.ds_tensor.detach().to(held.device), held
            deepspeed._z3_optimizer.set_local_hp_param(held, parameter, key)
    elif (mapping := deepspeed._hp_mapping) is not None:
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        part = parameter.detach().flatten()[here.start : here.start + here.numel]
        for key in states:
            held = mapping.hp_fragment.detach()
            if key is not None and optimizer is not None:
                partition = optimizer.param_groups[mapping.param_group_index]["params"][0]
                held = optimizer.state[partition][key][there.start : there.start + there.numel]
            yield part.to(held.device), held


def _has_master(parameter: Tensor) -> bool:
    return parameter.requires_grad and (hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"))


def _states_of_entries(optimizer: Optimizer) -> list[str | None]:
    """Return the names of the optimiser's states that have a value per entry of a parameter."""
    pairs = [(flat, key, value) for flat, state in optimizer.state.items() for key, value in state.items()]
    return sorted({key for flat, key, value in pairs if isinstance(value, Tensor) and value.shape == flat.shape})
