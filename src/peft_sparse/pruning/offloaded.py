"""Offloaded weights in a pruning run: they are in memory, and can be checked and read, only part of the time."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from ..calibration.residence import Residence
from ..model.offload import is_offloaded, loaded_layer
from ..model.weights import WeightView, check_finite
from .budget import Reading


def checked_when_loaded(residence: Residence, weights_in: Callable[[str], dict[str, WeightView]]) -> Residence:
    """Return `residence` with a check: offloaded weights are finite when their block is first in memory.

    Args:
        residence: (block name, block) -> a context within which the block's weights are in memory.
        weights_in: block name -> the weights in it that are to be finite.
    """
    checked: set[str] = set()

    @contextlib.contextmanager
    def resident(name: str, block: nn.Module) -> Iterator[None]:
        unknown = name not in checked and any(is_offloaded(weight.layer) for weight in weights_in(name).values())
        with residence(name, block):
            if unknown:
                checked.add(name)
                check_finite(weights_in(name))
            yield

    return resident


@contextlib.contextmanager
def one_layer_at_a_time(weights: Mapping[str, WeightView]) -> Iterator[Reading]:
    """Give a function: weight name -> a context within which the weight can be read. One offloaded layer is loaded.

    A layer is loaded once for all its experts, if they are read one after the other.
    """
    with contextlib.ExitStack() as loaded:
        current: nn.Module | None = None

        @contextlib.contextmanager
        def reading(name: str) -> Iterator[None]:
            nonlocal current
            if weights[name].layer is not current:
                loaded.close()
                current = weights[name].layer
                loaded.enter_context(loaded_layer(current))
            yield

        yield reading
