"""The base weights that a pruning schedule changed: they are saved beside the adapters, proven, and loaded again."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model.blocks import Targets, prunable_weights
from ..model.sharding import whole
from ..model.tree import adapters_off
from ..reconstruction.progress import fingerprint_of_tensors
from ..tuners.layer import SparseLoraLayer


def save_base(
    model: nn.Module, path: Path, target_modules: Targets = None, exclude_modules: Targets = None, *, write: bool
) -> None:
    """Save the base weights that a schedule changes: those that are pruned, and those of adapted layers.

    The file gets its name when it is complete.

    Args:
        model: the model with its adapters.
        path: the file to write.
        target_modules, exclude_modules: the layers that are pruned, as in `prune`.
        write: whether this process writes the file. The other processes only take part in gathering the weights.
    """
    state: dict[str, Tensor] = {}
    for name, weight in _changed_weights(model, target_modules, exclude_modules):
        if write:
            state[name] = weight.detach().cpu().contiguous()
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        save_file(state, unfinished)
        os.replace(unfinished, path)


def load_base(
    model: nn.Module,
    path: Path,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    *,
    frozen: set[str],
    proof: str | None = None,
    proven: bool = False,
) -> None:
    """Load the base weights that `save_base` saved. In place.

    Args:
        model: the model with its adapters.
        path: the file to read.
        target_modules, exclude_modules: the layers that are pruned, as in `prune`.
        frozen: the names of those weights that training does not change.
        proof: what `proof_of_base` returned in the run that wrote the file. None if that run did not note it.
        proven: whether the file is known to be that of the resumed checkpoint. Otherwise `proof` is needed.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the file holds other weights than `proof` says, or there is no proof.
    """
    if not path.is_file():
        raise FileNotFoundError(
            "The adapter was trained on base weights that were pruned several times during training. The file "
            f"{str(path)!r} should hold them, and it does not exist. Resume with the `output_dir` of that run and all "
            "files of its checkpoints."
        )
    with safe_open(path, framework="pt") as file:
        held = set(file.keys())
        places = dict(_places(model, target_modules, exclude_modules))
        compared = [name for name in places if name in frozen and name in held]
        found = fingerprint_of_tensors((name, file.get_tensor(name)) for name in compared)
        if not held >= places.keys() or (found != proof if proof else not proven):
            raise ValueError(
                f"The base weights in {str(path)!r} are not those on which the resumed adapter was trained. Resume "
                "from a checkpoint in the `output_dir` of its own run. Or train with SparseTrainer, which reads the "
                "base weights from the checkpoint that it resumes, wherever that is."
            )
        for name, place in places.items():
            with whole(place.module, write=True):
                place.write(file.get_tensor(name))


def frozen_names(model: nn.Module, target_modules: Targets = None, exclude_modules: Targets = None) -> set[str]:
    """Return the names of the base weights that `save_base` saves and that are not trained."""
    found = set()
    for name, place in _places(model, target_modules, exclude_modules):
        if not getattr(place.module, place.parameter).requires_grad:
            found.add(name)
    return found


def proof_of_base(
    model: nn.Module, frozen: set[str], target_modules: Targets = None, exclude_modules: Targets = None
) -> str:
    """Return a hash of the base weights that `save_base` saves and that training does not change.

    All processes must call this together, if weights are sharded.

    Args:
        model: the model with its adapters.
        frozen: the names of those weights that training does not change.
        target_modules, exclude_modules: the layers that are pruned, as in `prune`.
    """
    weights = _changed_weights(model, target_modules, exclude_modules)
    return fingerprint_of_tensors((name, weight) for name, weight in weights if name in frozen)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, SparseLoraLayer]]:
    """Yield name and layer of every MaskLoRA or ScaledLoRA layer of `model`."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, SparseLoraLayer))


@torch.no_grad()
def restart_adapters(model: nn.Module) -> None:
    """Merge the adapters into the base weights and reset the adapters. In place."""
    for _, layer in adapted_layers(model):
        with whole(layer, write=True):
            layer.restart()


@dataclass(frozen=True)
class _Place:
    """Where a base weight is: a module, the name of its parameter, and the layer that adapts it if there is one."""

    module: nn.Module
    parameter: str
    adapted: SparseLoraLayer | None = None

    def read(self) -> Tensor:
        stored: Tensor = getattr(self.module, self.parameter)
        return stored.detach() if self.adapted is None else self.adapted.read_weight()

    def write(self, weight: Tensor) -> None:
        if self.adapted is not None:
            self.adapted.write_weight(weight)
        else:
            self.read().copy_(weight)


def _changed_weights(model: nn.Module, *targets: Targets) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole weight) of each base weight that a schedule changes."""
    for name, place in _places(model, *targets):
        with whole(place.module):
            yield name, place.read()


def _places(model: nn.Module, *targets: Targets) -> Iterator[tuple[str, _Place]]:
    """Yield (name, place) of the weights with adapters of this package and of the pruned ones, each parameter once."""
    known: set[tuple[int, str]] = set()
    for name, layer in adapted_layers(model):
        base, parameter = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
        known.add((id(base), parameter))
        yield name, _Place(base, parameter, layer)
    with adapters_off(model):
        weights = prunable_weights(model, *targets)
    for name, weight in weights.items():
        key = (id(weight.layer), weight.parameter)
        if key not in known:
            known.add(key)
            yield name, _Place(weight.layer, weight.parameter)
