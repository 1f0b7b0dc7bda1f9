"""The effective weight that a layer keeps between calls: in evaluation, and on request in training on a CPU.

Without it, every token that is generated would compute the effective weight of every layer anew.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


# How many entries of W, of A and of B are compared on the CPU, at most about twice as many each. Comparing all of them
# would take a tenth of the time of a product with 32 rows of inputs.
SAMPLED = 256
# Values are compared for single rows too if the effective weight has no more entries than this.
SMALL = 2**16


@dataclass
class KeptWeight:
    """An effective weight, and all that it was computed from. Copies and pickles of a layer do not contain it.

    Args:
        weight: the effective weight, as the layer computes with it.
        places: where the modules of the layer are: (dict, key in it, module).
        sources: where W, A and B are, in this order: (dict, key in it, tensor).
        active: the active adapter, or the list of them.
        scalings: the scaling s of each adapter in `weight`, by name.
        dtype: the dtype of autocast, or None.
    """

    weight: Tensor
    places: list[tuple[dict[str, Any], str, nn.Module]]
    sources: list[tuple[dict[str, Any], str, Tensor]]
    active: str | list[str]
    scalings: dict[str, float]
    dtype: torch.dtype | None
    _states: list[tuple[dict[str, Any], str, Tensor, int, int]] = field(init=False)
    _held: list[Tensor] = field(init=False)
    _samples: list[tuple[Tensor, Tensor]] = field(init=False)
    _scalings: list[tuple[str, float]] = field(init=False)
    _device: str = field(init=False)
    _columns: int = field(init=False)

    def __post_init__(self) -> None:
        self._device = self.weight.device.type
        # Held as well, because memory that is freed may be given to the next tensor, which then has the old pointer.
        self._held = [tensor.detach() for _, _, tensor in self.sources]
        self._states = [(*source, source[2]._version, source[2].data_ptr()) for source in self.sources]
        # A write through `.data` does not change the version of a tensor. On the CPU some values are compared too.
        samples = map(_sample, self._held) if self._device == "cpu" else ()
        self._samples = [(sample, sample.clone()) for sample in samples]
        self._scalings = list(self.scalings.items())
        # How many entries a single row of inputs has, or -1 if values are compared for single rows too.
        self._columns = self.weight.shape[-1] if self.weight.numel() > SMALL else -1

    def serves(self, layer: Any, x: Tensor) -> bool:
        """Return whether `layer` would compute the same weight again, and no gradient of it or of `x` is needed.

        Every call of every layer asks this, so it looks into the dicts of modules, which is faster than attributes,
        and calls as few functions as it can.
        """
        state = vars(layer)
        if torch.compiler.is_compiling() or state["training"] or type(x) is not Tensor or self._differs(x):
            return False
        # Tokens are generated one row at a time, after a prompt whose rows were compared. Comparing values there would
        # take several hundredths of the time of a large product.
        return self._is_of(state) and (x.numel() == self._columns or self._has_same_values())

    def trains(self, layer: Any, names: list[str]) -> bool:
        """Return whether `layer` would compute the same weight of the adapters `names` again, in training."""
        return list(self.scalings) == names and self._is_of(vars(layer)) and self._has_same_values()

    def _is_of(self, state: dict[str, Any]) -> bool:
        """Return whether a layer with this `__dict__` has the modules, tensors and scalings of the weight."""
        if (
            state["_disable_adapters"]
            or state["merged_adapters"]
            or state["_unsettled"]
            or state["_unproved"]
            or state["_active_adapter"] != self.active
        ):
            return False
        for place, key, module in self.places:
            if place.get(key) is not module:
                return False
        for place, key, tensor, version, pointer in self._states:
            if place.get(key) is not tensor or tensor._version != version or tensor.data_ptr() != pointer:
                return False
        scaling = state["scaling"]
        for name, value in self._scalings:
            if scaling.get(name) != value:
                return False
        # A replica of `torch.nn.DataParallel` has modules of its own.
        return state["_modules"] is self.places[0][0]

    def _has_same_values(self) -> bool:
        return all(torch.equal(tensor, copy) for tensor, copy in self._samples)

    def _differs(self, x: Tensor) -> bool:
        """Return whether autocast is another than before, a CUDA graph is captured, or a gradient is needed."""
        device = self._device
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (
            dtype != self.dtype
            or (device == "cuda" and torch.cuda.is_current_stream_capturing())
            or (torch.is_grad_enabled() and needs_gradient(x, [tensor for _, _, tensor in self.sources]))
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts on the device of `x`, or None if it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def needs_gradient(x: Tensor, sources: list[Tensor]) -> bool:
    """Return whether one of the tensors requires a gradient."""
    return x.requires_grad or any(t.requires_grad for t in sources)


def is_capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph is captured. It runs again without Python, which would see no change."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def can_keep(x: Tensor, sources: list[Tensor]) -> bool:
    """Return whether an effective weight of `sources` can be kept for the input `x`.

    It cannot while code is compiled or a CUDA graph is captured, and for tensors that are sharded, that functional
    transforms have wrapped, or that have no version by which a change is seen.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta or is_capturing(x):
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() for tensor in sources)


def _sample(weight: Tensor) -> Tensor:
    """Return some entries of `weight`, spread over its memory, as a view."""
    size = sum((count - 1) * stride for count, stride in zip(weight.shape, weight.stride(), strict=True)) + 1
    # The step is odd, so that patterns such as 2:4 do not repeat with it.
    step = size // SAMPLED | 1
    return weight.as_strided((-(-size // step),), (step,), weight.storage_offset())
