"""Weights that a model ties, such as an output head and its embedding, after an adapter has changed one of them.

`SparseLoraModel` merges with `settle_ties`, and `save_plain_model` of `training` saves with it.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.sharding import is_sharded


def settle_ties(plain: PreTrainedModel, original: nn.Module) -> list[str]:
    """Give `plain` a configuration of its own, under which nothing is tied that differs.

    It is not enough to write `tie_word_embeddings=False`. Some families tie all the same, some read this field in
    their forward pass, and others derive another field from it. A model without memory is built from the
    configuration as it will be read, and shows what is tied.

    Args:
        plain: the model to be saved.
        original: the same model without its adapters. What it ties, `plain` ties or has untied.

    Returns:
        The names of weights that `plain` shares with others, and that the configuration no longer ties. Each of them
        is to be saved by itself.

    Raises:
        ValueError: the model cannot be loaded with these weights untied.
    """
    plain.config = copy.deepcopy(plain.config)
    broken = [names for names in _shared_names(original) if not _are_one(plain, names)]
    # A model whose file held both weights is not tied, whatever its configuration says.
    told = [{*pair} for pair in plain.get_expanded_tied_weights_keys(True).items()]
    if not broken and all(_are_one(plain, names) or _are_equal(plain, names) for names in told):
        return []
    config, changed = _untied(plain.config)
    with torch.device("meta"):
        # As `from_pretrained` builds it, so that also what the constructor ties is tied.
        built = _class_of(plain)(config)
    built.tie_weights()
    still = [names for names in _shared_names(built) if not _are_one(plain, names)]
    reason = None
    if changed:
        reason = f"without the tie its configuration changes {', '.join(map(repr, changed))} too"
    elif (reader := _reads_the_tie(plain)) is not None:
        reason = f"the forward pass of {reader} depends on `tie_word_embeddings`"
    elif still:
        reason = f"{type(built).__name__} ties {sorted(still[0])} whatever its configuration says"
    if reason is not None and broken:
        raise ValueError(
            f"The weights {sorted(set().union(*broken))} are one tied weight, and an adapter or `modules_to_save` "
            f"changes only a part of them. A saved model cannot hold them apart: {reason}. Save the adapter instead, "
            "with `save_model`, and train the next one without the tied head."
        )
    if reason is not None:
        return []
    plain.config = config
    kept = {name for names in _shared_names(built) for name in names}
    shared = [sorted(names - kept) for names in _shared_names(plain)]
    return [name for names in shared for name in names[1:]]


def check_ties(plain: nn.Module, original: nn.Module) -> None:
    """Check that `plain`, which has no configuration that unties weights, still ties what `original` ties.

    Args:
        plain: the model to be saved.
        original: the same model without its adapters.

    Raises:
        ValueError: weights that were one differ now. Whoever loads them into a model that ties them keeps one of them.
    """
    broken = [names for names in _shared_names(original) if not _are_one(plain, names)]
    if broken:
        raise ValueError(
            f"The weights {sorted(broken[0])} are one tied weight, and an adapter or `modules_to_save` changes only a "
            f"part of them. A {type(plain).__name__} that loads them ties them again. Save the adapter instead, or "
            "untie the weights before training."
        )


def _untied(config: PreTrainedConfig) -> tuple[PreTrainedConfig, list[str]]:
    """Return `config` as it is read from a file that ties nothing, and the other fields that this changes."""
    untied = copy.deepcopy(config)
    for part in _parts(untied):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    again = [type(config).from_dict(version.to_dict()) for version in (config, untied)]
    before, after = (dict(_fields(version.to_dict())) for version in again)
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    return again[1], sorted(path for path in changed if path.rpartition(".")[2] != "tie_word_embeddings")


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _fields(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _reads_the_tie(model: nn.Module) -> str | None:
    """Return the class of a module whose forward pass reads `tie_word_embeddings`, or None."""
    for kind in {type(module) for module in model.modules()}:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        if code is not None and "tie_word_embeddings" in code.co_names:
            return kind.__name__
    return None


def _class_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    # FSDP2 puts a class of its own before that of the model.
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def _shared_names(model: nn.Module) -> list[set[str]]:
    """Return the groups of names that stand for one parameter."""
    groups: dict[Any, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(_identity(parameter), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]


def _identity(tensor: Tensor) -> Any:
    # Parameters of sharded models and on the meta device have no memory of their own.
    known = not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter) and tensor.numel() > 0
    return (tensor.device, tensor.data_ptr(), tensor.shape) if known else id(tensor)


def _are_one(model: nn.Module, names: set[str]) -> bool:
    """Return whether the parameters called `names` are one. Every process finds the same, whatever it holds."""
    return len({_identity(parameter) for parameter in _called(model, names)}) <= 1


def _are_equal(model: nn.Module, names: set[str]) -> bool:
    """Return whether the parameters called `names` have equal values, which `from_pretrained` ties."""
    found = _called(model, names)
    # No process compares weights that it does not hold.
    if any(parameter.is_meta or is_sharded(parameter) for parameter in found):
        return False
    return all(
        one.shape == other.shape and torch.equal(one.cpu(), other.cpu()) for one, other in itertools.pairwise(found)
    )


def _called(model: nn.Module, names: set[str]) -> list[Tensor]:
    """Return the parameters called `names`, without names that the model lacks."""
    known = dict(model.named_parameters(remove_duplicate=False))
    return [known[name] for name in sorted(names) if name in known]


def give_own_weights(model: nn.Module, names: list[str]) -> None:
    """Replace each parameter in `names` by a copy of its own, which is shared with nothing."""
    for name in names:
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter = owner.get_parameter(key)
        owner._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
