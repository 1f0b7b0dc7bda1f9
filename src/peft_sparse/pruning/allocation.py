"""Allocation: how many entries each weight loses. All weights together lose exactly what one sparsity asks for.

Allocation knows weights and counts, no model and no masks. To add a method, write its class and its row in
`ALLOCATIONS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.statistics import Need
from ..model.weights import WeightView
from .budget import Budget, Reading, check_reachable, in_memory
from .choices import check_numbers, chosen, spelled
from .owl import OWL
from .patterns import Unstructured, count_across, number_to_prune


class Allocation(Protocol):
    """What every allocation has: `needs`, the statistics that calibration has to measure, and `divide`."""

    @property
    def needs(self) -> tuple[Need, ...]: ...

    def divide(self, budget: Budget) -> dict[str, int]:
        """Return how many entries of each weight are to be zero, by name."""


@dataclass(frozen=True)
class Uniform:
    """The same sparsity for every weight."""

    needs: ClassVar[tuple[Need, ...]] = ()

    def divide(self, budget: Budget) -> dict[str, int]:
        """Return how many entries of each weight are to be zero, by name."""
        rate = budget.total / sum(budget.sizes)
        return budget.apportion([rate * size for size in budget.sizes])


@dataclass(frozen=True)
class UniformPlus:
    """The same sparsity for all weights, except the first convolution and the last linear layer.

    The first convolution stays dense, and the last linear layer loses at most the fraction `last_linear`. First and
    last refer to the weights that are pruned, in the order of the model. The blocks of a language model have no
    convolution, and their last linear layer takes the place of the output head. For a language model the method
    therefore differs from `Uniform` only at a sparsity above `last_linear`. The experts that one parameter holds count
    as one layer. Gale et al. 2019, arXiv:1902.09574.

    Args:
        last_linear: the largest sparsity of the last linear layer, in [0, 1]. The paper uses 0.8.

    Raises:
        ValueError: `last_linear` is outside [0, 1]; in `divide`, the sparsity cannot be reached.
    """

    last_linear: float = 0.8

    needs: ClassVar[tuple[Need, ...]] = ()

    def __post_init__(self) -> None:
        check_numbers(self, last_linear=(0 <= self.last_linear <= 1, "in [0, 1]"))

    def divide(self, budget: Budget) -> dict[str, int]:
        """Return how many entries of each weight are to be zero, by name."""
        views = list(budget.weights.values())
        convolutions = [i for i, view in enumerate(views) if isinstance(view.layer, nn.Conv2d)]
        linears = [i for i, view in enumerate(views) if not isinstance(view.layer, nn.Conv2d)]
        most = budget.most
        for i in convolutions[:1]:
            most[i] = budget.zeros[i]
        for i in linears:
            if views[i].storage is views[linears[-1]].storage:
                most[i] = max(budget.zeros[i], min(most[i], number_to_prune(self.last_linear, budget.sizes[i])))
        return budget.apportion(_fill(budget.total, budget.sizes, most), most)


@dataclass(frozen=True)
class GlobalMagnitude:
    """One threshold on |W| for all weights. The largest entry of each weight is kept.

    Han et al. 2015, arXiv:1506.02626, with one threshold for all layers.
    """

    needs: ClassVar[tuple[Need, ...]] = ()

    def divide(self, budget: Budget) -> dict[str, int]:
        """Return how many entries of each weight are to be zero, by name."""
        return _across(budget, _magnitudes)


@dataclass(frozen=True)
class ERK:
    """Erdős-Rényi-Kernel: density_l = min(1, ε · Σ dims_l / Π dims_l), with the same ε for all weights l.

    dims are (out, in) of a matrix, and (out, in, height, width) of a convolution. A weight whose density would exceed
    1 is dense, and ε is computed again for the other weights. Evci et al. 2020, arXiv:1911.11134, section 3.
    """

    needs: ClassVar[tuple[Need, ...]] = ()

    def divide(self, budget: Budget) -> dict[str, int]:
        """Return how many entries of each weight are to be zero, by name."""
        shapes = [
            view.storage.shape if isinstance(view.layer, nn.Conv2d) else view.shape for view in budget.weights.values()
        ]
        # Π dims is the number of entries, so the number of kept entries is proportional to Σ dims.
        kept = _fill(sum(budget.sizes) - budget.total, [sum(shape) for shape in shapes], budget.sizes)
        return budget.apportion([size - own for size, own in zip(budget.sizes, kept, strict=True)])


@dataclass(frozen=True)
class LAMP:
    """One threshold on LAMP scores for all weights. The largest entry of each weight is kept.

    score(u) = W_u² / Σ_{v ≥ u} W_v², where u and v index the entries of one weight in the order of ascending |W|.
    Entries that are zero already are left out. Lee et al. 2020, arXiv:2010.07611, section 3.
    """

    needs: ClassVar[tuple[Need, ...]] = ()

    def divide(self, budget: Budget) -> dict[str, int]:
        """Return how many entries of each weight are to be zero, by name."""
        return _across(budget, _lamp_scores)


ALLOCATIONS: dict[str, type] = {
    "uniform": Uniform,
    "uniform+": UniformPlus,
    "global": GlobalMagnitude,
    "erk": ERK,
    "lamp": LAMP,
    "owl": OWL,
}


def find_allocation(allocation: str | Allocation) -> tuple[str, Allocation]:
    """Return what reports call an allocation, and its value.

    Args:
        allocation: a name of `ALLOCATIONS`, or a value of one of its classes.

    Raises:
        ValueError: there is no such allocation.
    """
    value = chosen("allocation", ALLOCATIONS, allocation, also=" A dict of sparsities by layer is also accepted.")
    return spelled(ALLOCATIONS, value), value


def allocate(
    allocation: str | Allocation | Mapping[str, float],
    weights: Mapping[str, WeightView],
    sparsity: float,
    *,
    blocks: Mapping[str, str | None],
    input_norms: Mapping[str, Tensor] | None = None,
    reading: Reading = in_memory,
) -> dict[str, int]:
    """Return how many entries of each weight are to be zero at `sparsity`, including those that are zero already.

    The numbers add up to floor(sparsity · entries of all weights). Each weight keeps its zeros and at least one entry.
    What a method wants beyond these limits goes to the other weights, see `apportion`. For matrices of less than 10⁹
    entries, zeros / entries is a sparsity that prunes exactly this number.

    Args:
        allocation: a name of `ALLOCATIONS`, a value of one of its classes, or the sparsity of every weight by name.
            Given sparsities must meet the total to within one entry per weight.
        weights: the weights by name, with finite entries. They are read one at a time and are not changed.
        sparsity: the fraction of all entries that is to be zero, in [0, 1).
        blocks: the name of the block that each weight lies in, by the name of the weight; None outside of blocks.
        input_norms: ‖X_j‖₂, (in,), by the name of the weight. `OWL` needs them.
        reading: weight name -> a context within which the weight is in memory.

    Raises:
        ValueError: the allocation is unknown; the sparsity is outside [0, 1), or cannot be reached because of zeros
            that are there or of entries that the method keeps; `OWL` without input norms; given sparsities with other
            names or another total.
    """
    method = None if isinstance(allocation, Mapping) else find_allocation(allocation)[1]
    budget = Budget(weights, Unstructured(sparsity).sparsity, blocks, input_norms, reading)
    # Scoring takes time, so what cannot be reached is refused first.
    check_reachable(budget.total, budget.zeros, budget.most)
    if method is None:
        assert isinstance(allocation, Mapping)
        return given(budget, allocation)
    return method.divide(budget)


def given(budget: Budget, sparsities: Mapping[str, float]) -> dict[str, int]:
    """Return the zeros of each weight for sparsities given by name, rounded so that the total is exact.

    Raises:
        ValueError: the names are not those of the weights, a sparsity is outside [0, 1), or the total differs.
    """
    if odd := [name for name in (*budget.weights, *sparsities) if (name in sparsities) != (name in budget.weights)]:
        problem = "has none for" if odd[0] in budget.weights else "has one for"
        raise ValueError(
            f"Expected a sparsity for each weight that is pruned, got a mapping that {problem} {odd[0]!r}. Give the "
            "sparsity of all of them, by their full names, and of no others."
        )
    wishes = [
        Unstructured(sparsities[name]).sparsity * size for name, size in zip(budget.weights, budget.sizes, strict=True)
    ]
    # The caller may have rounded each of them to whole entries, up or down.
    if abs(sum(wishes) - budget.total) > len(wishes):
        entries = sum(budget.sizes)
        raise ValueError(
            f"Expected sparsities that give {budget.total} zeros in total, {budget.total / entries:.6f} of the "
            f"entries, got sparsities that give {sum(wishes):.0f}, {sum(wishes) / entries:.6f}. Change the "
            "sparsities, or the requested total."
        )
    return budget.apportion(wishes)


def _fill(total: float, shares: Sequence[int], limits: Sequence[int]) -> list[float]:
    """Return min(c · share, limit) for each, with the one c for which they add up to `total`."""
    level: dict[int, float] = {}
    while len(level) < len(shares):
        rest = [i for i in range(len(shares)) if i not in level]
        c = (total - sum(level.values())) / sum(shares[i] for i in rest)
        # All that exceed their limit at this c can be fixed at once: without them c only rises.
        over = [i for i in rest if c * shares[i] > limits[i]]
        level |= {i: limits[i] for i in over} if over else {i: c * shares[i] for i in rest}
    return [level[i] for i in range(len(shares))]


def _across(budget: Budget, scores_of: Callable[[Tensor], Tensor]) -> dict[str, int]:
    scores = [partial(budget.of_matrix, name, scores_of) for name in budget.weights]
    return budget.apportion(count_across(scores, budget.total))


def _magnitudes(matrix: Tensor) -> Tensor:
    scores = matrix.abs().flatten()
    largest = scores.argmax()
    scores[largest] = torch.where(scores[largest] > 0, torch.inf, 0)
    return scores


def _lamp_scores(matrix: Tensor) -> Tensor:
    """Return LAMP scores in the order of descending |W|: inf for the largest entry, -inf for zeros."""
    size = matrix.abs().float().flatten()
    # On CPUs numpy sorts several times faster than torch. Sums are computed on the CPU in any case: on GPUs they
    # differ from one call to the next, and scores must be the same in each call.
    ascending = torch.from_numpy(np.sort(size.numpy())) if size.device.type == "cpu" else size.sort().values.cpu()
    squares = ascending.flip(0).double().square_()
    scores = squares.div(squares.cumsum(0)).float()
    scores[0] = torch.inf
    return scores.masked_fill_(squares == 0, -torch.inf)
