"""Which parameters are protected in training: all that hold zeros, whatever is pruned or adapted."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..model.blocks import base_model, find_blocks, fused_experts, layers_in, storage_of
from ..model.kinds import is_quantised
from ..model.masks import count_kept, fingerprint, mask_of, sparsity_of_fingerprint
from ..model.sharding import own_part, totals, whole, whole_shape
from ..model.tree import base_layer


# The fraction of zeros from which on the zeros of a parameter are a mask. Trained weights have a few by chance: those
# that underflow in half precision, or the row of an embedding for padding.
PROTECTED_SHARE = 0.002


@dataclass(frozen=True)
class Place:
    """Where a parameter is stored: an attribute of a module. Shards are gathered and put back at the same place."""

    module: nn.Module
    key: str

    @property
    def parameter(self) -> Tensor:
        parameter = self.module._parameters[self.key]
        assert parameter is not None
        return parameter

    def found(self) -> Tensor | None:
        """Return the parameter, None if it has been taken away since, or its values have."""
        parameter = self.module._parameters.get(self.key)
        return None if parameter is None or parameter.is_meta else parameter


def stored_matrices(model: nn.Module) -> dict[str, Place]:
    """Return every floating-point parameter of two or more dimensions of `model`, once, except those of adapters.

    The copies in `modules_to_save` are among them, also of adapters that are not active. Quantised parameters cannot
    be trained, and those on the meta device hold no values: both are left out. The name is that of the layer, or of
    the parameter if it is not called "weight", without the parts that PEFT and `torch.compile` add.
    """
    base = base_model(model)
    known = _of_adapters(base)
    found: dict[str, Place] = {}
    for name, module in base.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in known or not _is_matrix(parameter):
                continue
            known.add(id(parameter))
            found[_plain_name(name, key)] = Place(module, key)
    return found


def protected_names(
    places: Mapping[str, Place], trained: Iterable[str], model: nn.Module, pruned: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the names of the parameters whose zeros are kept, and of those among them that can never learn.

    A parameter is protected if at least `PROTECTED_SHARE` of its entries are zero, or if it was pruned. A trained
    parameter that is all zeros is protected only if it is a prunable weight inside the blocks. Elsewhere it is an
    initial value, such as that of a new classifier. All processes must call this together.

    Args:
        places: the parameters by name.
        trained: the names of those that are trained.
        model: the model, with or without adapters.
        pruned: the names of those whose zeros are known to be a mask.
    """
    parameters = [place.parameter for place in places.values()]
    kept = totals([count_kept(own_part(parameter)) for parameter in parameters], parameters)
    trained, prunable = set(trained), _prunable(model)
    protected, all_zero = [], []
    for name, parameter, nonzero in zip(places, parameters, kept, strict=True):
        size = whole_shape(parameter).numel()
        learns = nonzero == 0 and name in trained
        least = 1 if name in pruned else PROTECTED_SHARE * size
        if size - nonzero < least or not size or (learns and id(parameter) not in prunable):
            continue
        protected.append(name)
        if learns:
            all_zero.append(name)
    return protected, all_zero


def fingerprints_of(places: Mapping[str, Place]) -> dict[str, str]:
    """Return the fingerprint of the mask of each parameter, as a matrix of its last dimension.

    If parameters are sharded, all processes must call this together.
    """
    found = {}
    for name, place in places.items():
        with whole(place.module, recurse=False):
            parameter = place.parameter.detach()
            found[name] = fingerprint(mask_of(parameter.reshape(-1, parameter.shape[-1])))
    return found


def check_fingerprints(saved: Mapping[str, str], found: Mapping[str, str], trained: Iterable[str]) -> None:
    """Compare the fingerprints of a checkpoint with those of the model that is resumed from it.

    Args:
        saved: the fingerprints of the checkpoint.
        found: the fingerprints of the model.
        trained: the names of the weights that are trained. They may have more zeros than the checkpoint knows.

    Raises:
        ValueError: they differ.
    """
    trained = set(trained)
    differing = [
        name
        for name in {**saved, **found}
        if saved.get(name) != found.get(name) and not _may_differ(saved.get(name), found.get(name), name in trained)
    ]
    if differing:
        raise ValueError(
            f"The masks of the checkpoint and of the model differ in {len(differing)} weights, the first of which is "
            f"{differing[0]!r}. Resume with the same base model, pruning arguments and calibration data."
        )


def _may_differ(saved: str | None, found: str | None, trained: bool) -> bool:
    if found is None:
        # Weights with fewer zeros are not protected, and are not compared.
        return saved is not None and sparsity_of_fingerprint(saved) < PROTECTED_SHARE
    before = 0.0 if saved is None else sparsity_of_fingerprint(saved)
    return trained and sparsity_of_fingerprint(found) > before


def _of_adapters(base: nn.Module) -> set[int]:
    """Return the ids of the adapters' own parameters: those that tuner layers hold beside their base layer."""
    found: set[int] = set()
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            found.update(id(parameter) for parameter in module.parameters(recurse=False))
            for name, child in module.named_children():
                if name != "base_layer":
                    found.update(id(parameter) for parameter in child.parameters())
    return found


def _is_matrix(parameter: Tensor) -> bool:
    if len(whole_shape(parameter)) < 2 or parameter.is_meta:
        return False
    # A DTensor is a tensor subclass, as quantised tensors are.
    packed = not isinstance(parameter, DTensor) and is_quantised(parameter)
    return not packed and parameter.is_floating_point() and parameter.dtype.itemsize > 1


def _plain_name(module: str, key: str) -> str:
    parts = [part for part in module.split(".") if part not in ("base_layer", "_orig_mod", "token_adapter", "")]
    return ".".join(parts if key == "weight" and parts else [*parts, key])


def _prunable(model: nn.Module) -> set[int]:
    """Return what `id` gives for each parameter that is pruned by default.

    These are the weights of the layers, and the fused experts, inside the blocks.
    """
    layers = [
        base_layer(layer)
        for name, block in find_blocks(model).items()
        for _, layer, reason in layers_in(name, block)
        if reason is None
    ]
    experts = [storage_of(fused.module, fused.parameter) for fused in fused_experts(model).values()]
    return {storage_of(layer) for layer in layers} | set(experts)
