"""Allocation: how many entries each weight loses. All weights together lose exactly what one sparsity asks for.

Allocation knows weights and counts, no model and no masks. To add a method, write its class and its row in
`ALLOCATIONS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.statistics import Need, Statistics
from ..model.masks import count_kept
from ..model.weights import WeightView, to_host
from .budget import Budget, Reading, apportion, check_reachable, in_memory
from .choices import check_numbers, chosen, spelled
from .criteria import Wanda
from .patterns import SemiStructured, Unstructured, count_across, number_to_prune


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


@dataclass(frozen=True)
class OWL:
    """Outlier-weighed sparsity: all weights of a block get one sparsity, which is lower if more scores are outliers.

    With the Wanda scores S of all weights of block l,

        D_l = 100 · mean(S > M · mean(S)),    r_l = 2λ · (D_l - min D) / (max D - min D),
        density_l = r_l - mean(r) + 1 - sparsity.

    The mean of r weighs each block by its number of entries, so that the total is exact. For blocks of equal size it
    is the mean of the paper. Each weight keeps its zeros and at least one entry. A weight outside of blocks is treated
    as a block of its own. With an n:m pattern, blocks get different n, see `mixed`.

    Yin et al. 2023, arXiv:2310.05175, section 3.

    Args:
        outlier_factor: M, above 0. None means the paper's value: 5 for a sparsity, 6 for n:m.
        spread: λ, at least 0. None means the paper's value: 0.08 for a sparsity, 2 for n:m. For n:m it is the largest
            difference between two n before rounding.

    Raises:
        ValueError: a number is outside its range; in `divide` and `mixed`, an input norm is missing.
    """

    outlier_factor: float | None = None
    spread: float | None = None

    needs: ClassVar[tuple[Need, ...]] = ("inputs",)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            outlier_factor=(self.outlier_factor is None or self.outlier_factor > 0, "None or above 0"),
            spread=(self.spread is None or self.spread >= 0, "None or at least 0"),
        )

    def divide(self, budget: Budget) -> dict[str, int]:
        """Return how many entries of each weight are to be zero, by name."""
        factor = 5.0 if self.outlier_factor is None else self.outlier_factor
        spread = 0.08 if self.spread is None else self.spread
        of_block = _stretch(_outlier_ratios(budget, factor), 2 * spread)
        shares = [of_block[_place(name, budget.blocks)] for name in budget.weights]
        entries = sum(budget.sizes)
        mean = sum(share * size for share, size in zip(shares, budget.sizes, strict=True)) / entries
        sparsity = budget.total / entries
        return budget.apportion(
            [size * (sparsity - share + mean) for share, size in zip(shares, budget.sizes, strict=True)]
        )

    def mixed(self, budget: Budget, pattern: SemiStructured) -> dict[str, SemiStructured]:
        """Return an n:m for each weight. The n of a block is higher if more of its Wanda scores are outliers.

        n_l = n + r_l - mean(r), with r_l = λ · (D_l - min D) / (max D - min D), rounded to a whole number. n counts
        kept entries. The paper rounds each n_l by itself. Here they are rounded by largest remainder, so that the sum
        is exact.

        The mean is taken over the blocks whose weights have the same shapes. Together these blocks keep as many
        entries as with `pattern` in all of them; the number is exact if m divides the number of inputs. A block whose
        shapes no other block has therefore keeps `pattern`. Zeros of the weights are not considered.

        Args:
            budget: uses `weights`, `blocks`, `input_norms` and `reading`.
            pattern: its n is the mean of all n_l. Each n_l is in [1, m].
        """
        factor = 6.0 if self.outlier_factor is None else self.outlier_factor
        spread = 2.0 if self.spread is None else self.spread
        of_block = _stretch(_outlier_ratios(budget, factor), spread)
        shapes: dict[str, list[tuple[int, int]]] = {}
        for name, weight in budget.weights.items():
            shapes.setdefault(_place(name, budget.blocks), []).append(weight.shape)
        alike: dict[tuple[tuple[int, int], ...], list[str]] = {}
        for block, own in shapes.items():
            alike.setdefault(tuple(own), []).append(block)
        kept: dict[str, int] = {}
        for group in alike.values():
            mean = sum(of_block[block] for block in group) / len(group)
            wishes = [pattern.n + of_block[block] - mean for block in group]
            count = len(group)
            kept |= zip(group, apportion(wishes, pattern.n * count, [1] * count, [pattern.m] * count), strict=True)
        return {
            name: SemiStructured(kept[_place(name, budget.blocks)], pattern.m, pattern.allow_ragged)
            for name in budget.weights
        }


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
    total_asked = Unstructured(sparsity).sparsity
    sizes = [math.prod(weight.shape) for weight in weights.values()]
    total = number_to_prune(total_asked, sum(sizes))
    budget = Budget(weights, sizes, [], total, blocks, input_norms, reading)
    budget.zeros.extend(_zeros(budget))
    # Scoring takes time, so what cannot be reached is refused first.
    check_reachable(total, budget.zeros, budget.most)
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


def _zeros(budget: Budget) -> list[int]:
    """Return how many entries of each weight are zero."""
    kept = [budget.of_matrix(name, count_kept) for name in budget.weights]
    return [size - nonzero for size, nonzero in zip(budget.sizes, to_host(kept), strict=True)]


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


def _outlier_ratios(budget: Budget, outlier_factor: float) -> dict[str, float]:
    """Return D_l of each block, in percent."""
    norms = budget.input_norms or {}
    if missing := [name for name in budget.weights if name not in norms]:
        raise ValueError(
            f"OWL counts outliers of Wanda scores and needs the input norms of each weight, got none for "
            f"{missing[0]!r}. Pass calibration data, or choose an allocation that needs none."
        )

    def of_scores(measure: Callable[[str, Tensor], Tensor]) -> list[Any]:
        # Scores are computed twice, so that only one weight's scores are in memory at a time.
        return to_host([budget.of_matrix(name, partial(of_matrix, name, measure)) for name in budget.weights])

    def of_matrix(name: str, measure: Callable[[str, Tensor], Tensor], matrix: Tensor) -> Tensor:
        return measure(name, Wanda().score(matrix, Statistics(input_norm=norms[name].to(matrix.device))))

    sizes = dict(zip(budget.weights, budget.sizes or map(_size, budget.weights.values()), strict=True))
    means = of_scores(lambda name, scores: scores.mean())
    entries: dict[str, int] = {}
    sums: dict[str, float] = {}
    for name, mean in zip(budget.weights, means, strict=True):
        block = _place(name, budget.blocks)
        entries[block] = entries.get(block, 0) + sizes[name]
        sums[block] = sums.get(block, 0.0) + mean * sizes[name]
    threshold = {block: outlier_factor * sums[block] / entries[block] for block in entries}
    outliers = of_scores(lambda name, scores: (scores > threshold[_place(name, budget.blocks)]).sum())
    ratios = dict.fromkeys(entries, 0.0)
    for name, count in zip(budget.weights, outliers, strict=True):
        ratios[_place(name, budget.blocks)] += 100 * count / entries[_place(name, budget.blocks)]
    return ratios


def _size(weight: WeightView) -> int:
    return math.prod(weight.shape)


def _stretch(ratios: dict[str, float], width: float) -> dict[str, float]:
    """Map the ratios linearly onto [0, width]. If all ratios are equal, all become 0."""
    low, high = min(ratios.values()), max(ratios.values())
    return {block: width * (ratio - low) / (high - low) if high > low else 0.0 for block, ratio in ratios.items()}


def _place(name: str, blocks: Mapping[str, str | None]) -> str:
    """Return the block of a weight; outside of blocks, the weight's own name."""
    return blocks.get(name) or name
