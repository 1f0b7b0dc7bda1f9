"""How many entries each weight loses, adding up to exactly what one sparsity of all of them asks for.

Knows weights and counts, no model and no masks. Add a method by writing its function, its row in `METHODS` and its
name in `Allocation`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.statistics import Statistics
from ..model.masks import mask_of
from ..model.weights import WeightView, to_host
from .criteria import wanda
from .patterns import SemiStructured, Unstructured, count_across, number_to_prune


Allocation = Literal["uniform", "uniform+", "global", "erk", "lamp", "owl"]

# What uniform+ prunes of the last linear layer at most.
LAST_LINEAR = 0.8


@dataclass(frozen=True)
class Budget:
    """What a method divides; lists are in the order of `weights`.

    Args:
        weights: the weights by name.
        sizes: entries of each.
        zeros: entries of each that are zero already.
        total: entries that are to be zero in all.
        blocks, input_norms, outlier_factor, spread: as in `allocate`.
    """

    weights: Mapping[str, WeightView]
    sizes: list[int]
    zeros: list[int]
    total: int
    blocks: Mapping[str, str | None]
    input_norms: Mapping[str, Tensor] | None
    outlier_factor: float
    spread: float

    @property
    def most(self) -> list[int]:
        """Zeros that leave each weight one entry, if it has one."""
        return [max(size - 1, zeros) for size, zeros in zip(self.sizes, self.zeros, strict=True)]

    def apportion(self, wishes: Sequence[float], most: Sequence[int] | None = None) -> dict[str, int]:
        """Return whole numbers of zeros near `wishes`, within `zeros` and `most`, as `apportion` does."""
        counts = apportion(wishes, self.total, self.zeros, self.most if most is None else most)
        return dict(zip(self.weights, counts, strict=True))


def allocate(
    method: Allocation | Mapping[str, float],
    weights: Mapping[str, WeightView],
    sparsity: float,
    *,
    blocks: Mapping[str, str | None],
    input_norms: Mapping[str, Tensor] | None = None,
    outlier_factor: float = 5.0,
    spread: float = 0.08,
) -> dict[str, int]:
    """Return how many entries of each weight are to be zero at `sparsity`, counting those that are zero already.

    The numbers add up to floor(sparsity · entries of all weights). Each weight keeps its zeros, and one entry at
    least; what a method wants beyond that goes to the others as in `apportion`. For matrices of less than 10^9
    entries, zeros / entries is a sparsity that prunes exactly that many.

    Args:
        method: "uniform", "uniform+", "global", "erk", "lamp" or "owl", as their functions say; or the sparsity of
            every weight by name, which together must meet the total to within one entry per weight.
        weights: the weights by name, finite; read one at a time, not changed.
        sparsity: fraction of all entries that is to be zero, in [0, 1).
        blocks: the block each weight lies in, by name of the weight; None outside of blocks. For "owl".
        input_norms: ||X_j||_2, (in,), by name of the weight. For "owl".
        outlier_factor: M of "owl".
        spread: λ of "owl".

    Raises:
        ValueError: no such method; a sparsity outside [0, 1), or one that zeros which are there, or entries which the
            method keeps, rule out; "owl" without input norms; a mapping with other names or another total.
    """
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(
            f"Unknown allocation {method!r}. Choose one of {', '.join(map(repr, METHODS))}, or give the sparsity of "
            "every weight by name."
        )
    sizes = [math.prod(weight.shape) for weight in weights.values()]
    total = number_to_prune(Unstructured(sparsity).sparsity, sum(sizes))
    kept = to_host([mask_of(weight.matrix()).sum() for weight in weights.values()])
    zeros = [size - nonzero for size, nonzero in zip(sizes, kept, strict=True)]
    budget = Budget(weights, sizes, zeros, total, blocks, input_norms, outlier_factor, spread)
    # Before weights are scored, which takes time.
    _check_reachable(total, zeros, budget.most)
    return METHODS[method](budget) if isinstance(method, str) else given(budget, method)


def uniform(budget: Budget) -> dict[str, int]:
    """The same sparsity for every weight."""
    rate = budget.total / sum(budget.sizes)
    return budget.apportion([rate * size for size in budget.sizes])


def uniform_plus(budget: Budget) -> dict[str, int]:
    """The same sparsity for every weight but two: the first convolution is dense, the last linear layer at most 0.8.

    First and last are those among the weights that are pruned, in the order of the model. The blocks of a language
    model have no convolution, and their last linear layer stands in for an output head that is not pruned: there the
    method differs from "uniform" only beyond a sparsity of 0.8. Fused experts count as one layer. Gale et al. 2019,
    arXiv:1902.09574.

    Raises:
        ValueError: the sparsity is out of reach with these two kept.
    """
    views = list(budget.weights.values())
    convolutions = [i for i, view in enumerate(views) if isinstance(view.layer, nn.Conv2d)]
    linears = [i for i, view in enumerate(views) if not isinstance(view.layer, nn.Conv2d)]
    most = budget.most
    for i in convolutions[:1]:
        most[i] = budget.zeros[i]
    for i in linears:
        if views[i].storage is views[linears[-1]].storage:
            most[i] = max(budget.zeros[i], min(most[i], number_to_prune(LAST_LINEAR, budget.sizes[i])))
    return budget.apportion(_fill(budget.total, budget.sizes, most), most)


def global_magnitude(budget: Budget) -> dict[str, int]:
    """What one threshold on |W| over all weights prunes of each, the largest entry of each excepted.

    Han et al. 2015, arXiv:1506.02626, with one threshold for all layers.
    """
    return _across(budget, _magnitudes)


def erk(budget: Budget) -> dict[str, int]:
    """Erdős-Rényi-Kernel: density_l = min(1, ε · Σ dims_l / Π dims_l), one ε for all l.

    dims are (out, in) of a matrix and (out, in, height, width) of a convolution. A weight that ε would make more than
    dense is dense, and ε is computed anew for the others. Evci et al. 2020, arXiv:1911.11134, section 3.
    """
    shapes = [
        view.storage.shape if isinstance(view.layer, nn.Conv2d) else view.shape for view in budget.weights.values()
    ]
    # Entries are Π dims, so those that are kept are in proportion to Σ dims.
    kept = _fill(sum(budget.sizes) - budget.total, [sum(shape) for shape in shapes], budget.sizes)
    return budget.apportion([size - own for size, own in zip(budget.sizes, kept, strict=True)])


def lamp(budget: Budget) -> dict[str, int]:
    """What one threshold on LAMP scores over all weights prunes of each, the largest entry of each excepted.

    score(u) = W_u² / Σ_{v ≥ u} W_v², where u and v index the entries of one weight by ascending |W|. Entries that are
    zero already do not enter. Lee et al. 2020, arXiv:2010.07611, section 3.
    """
    return _across(budget, _lamp_scores)


def owl(budget: Budget) -> dict[str, int]:
    """Outlier-weighed: the same sparsity for all weights of a block, lower where more scores are outliers.

    D_l = 100 · mean(S > M · mean(S)) over the Wanda scores S of all weights of block l, and
    density_l = r_l - mean(r) + 1 - sparsity with r_l = 2λ · (D_l - min D) / (max D - min D).

    The mean of r counts each block by its entries, as it must for the total to come out; for blocks of one size it is
    the paper's. Densities end at 0 and 1. A weight outside of blocks is a block of its own. Yin et al. 2023,
    arXiv:2310.05175, section 3.

    Raises:
        ValueError: no `input_norms`, or none for one of the weights.
    """
    ratios = _outlier_ratios(budget.weights, budget.blocks, budget.input_norms, budget.outlier_factor)
    of_block = _stretch(ratios, 2 * budget.spread)
    shares = [of_block[_place(name, budget.blocks)] for name in budget.weights]
    entries = sum(budget.sizes)
    mean = sum(share * size for share, size in zip(shares, budget.sizes, strict=True)) / entries
    sparsity = budget.total / entries
    return budget.apportion(
        [size * (sparsity - share + mean) for share, size in zip(shares, budget.sizes, strict=True)]
    )


METHODS: dict[str, Callable[[Budget], dict[str, int]]] = {
    "uniform": uniform,
    "uniform+": uniform_plus,
    "global": global_magnitude,
    "erk": erk,
    "lamp": lamp,
    "owl": owl,
}


def given(budget: Budget, sparsities: Mapping[str, float]) -> dict[str, int]:
    """The sparsities given by name of the weight, rounded so that the total comes out.

    Raises:
        ValueError: other names than those of the weights, a sparsity outside [0, 1), or another total.
    """
    if odd := [name for name in (*budget.weights, *sparsities) if (name in sparsities) != (name in budget.weights)]:
        problem = "has none for" if odd[0] in budget.weights else "has one for"
        raise ValueError(
            f"Expected a sparsity for each weight that is pruned, got a mapping that {problem} {odd[0]!r}. Give them "
            "all, by their full names, and no others."
        )
    wishes = [
        Unstructured(sparsities[name]).sparsity * size for name, size in zip(budget.weights, budget.sizes, strict=True)
    ]
    # Each of them may have been rounded to whole entries, up or down.
    if abs(sum(wishes) - budget.total) > len(wishes):
        entries = sum(budget.sizes)
        raise ValueError(
            f"Expected sparsities that give {budget.total} zeros in all, {budget.total / entries:.6f} of the entries, "
            f"got sparsities that give {sum(wishes):.0f}, {sum(wishes) / entries:.6f}. Change one or the other."
        )
    return budget.apportion(wishes)


def owl_semi_structured(
    weights: Mapping[str, WeightView],
    pattern: SemiStructured,
    *,
    blocks: Mapping[str, str | None],
    input_norms: Mapping[str, Tensor] | None,
    outlier_factor: float = 6.0,
    spread: float = 2.0,
) -> dict[str, SemiStructured]:
    """Return n:m for each weight, one n per block, higher where more Wanda scores are outliers; the mean n is asked.

    n_l = n + r_l - mean(r) in whole numbers, r_l = λ · (D_l - min D) / (max D - min D), D_l as in `owl`: the paper's
    mixed N:M with n counting kept entries. Where it rounds each n_l, n_l are rounded by largest remainder to add up.

    Blocks whose weights have the same shapes share a mean and keep as many entries as with `pattern` everywhere,
    exactly if m divides the inputs; so does the model. A block like no other therefore keeps `pattern`. Zeros that are
    there do not count. Yin et al. 2023, arXiv:2310.05175.

    Args:
        weights, blocks, input_norms: as in `allocate`.
        pattern: the mean, n kept of every m; n_l is in [1, m].
        outlier_factor: M.
        spread: λ, the most by which two n_l differ before rounding.

    Raises:
        ValueError: no `input_norms`, or none for one of the weights.
    """
    of_block = _stretch(_outlier_ratios(weights, blocks, input_norms, outlier_factor), spread)
    shapes: dict[str, list[tuple[int, int]]] = {}
    for name, weight in weights.items():
        shapes.setdefault(_place(name, blocks), []).append(weight.shape)
    chosen: dict[str, int] = {}
    alike: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for block, own in shapes.items():
        alike.setdefault(tuple(own), []).append(block)
    for group in alike.values():
        mean = sum(of_block[block] for block in group) / len(group)
        wishes = [pattern.n + of_block[block] - mean for block in group]
        count = len(group)
        chosen |= zip(group, apportion(wishes, pattern.n * count, [1] * count, [pattern.m] * count), strict=True)
    return {name: SemiStructured(chosen[_place(name, blocks)], pattern.m, pattern.allow_ragged) for name in weights}


def apportion(wishes: Sequence[float], total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Return whole numbers near `wishes` that add up to `total`, each within its `least` and `most`.

    Wishes are clamped to their bounds; what is then missing or too much is spread in proportion to each one's room up
    to its bound, and the result rounded by largest remainder, ties by order.

    Raises:
        ValueError: the bounds rule `total` out.
    """
    _check_reachable(total, least, most)
    # Fractions, or rounding errors of large numbers could leave the bounds and the total.
    near = [
        min(max(Fraction(wish), Fraction(low)), Fraction(high))
        for wish, low, high in zip(wishes, least, most, strict=True)
    ]
    missing = total - sum(near)
    if missing:
        room = [bound - x for bound, x in zip(most if missing > 0 else least, near, strict=True)]
        share = Fraction(missing, sum(room))
        near = [x + own * share for x, own in zip(near, room, strict=True)]
    counts = [math.floor(x) for x in near]
    remainders = [x - count for x, count in zip(near, counts, strict=True)]
    # Rounded, or what is equal but for rounding errors of the wishes would not go by order.
    order = sorted((i for i, rest in enumerate(remainders) if rest), key=lambda i: -round(remainders[i], 6))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _check_reachable(total: int, least: Sequence[int], most: Sequence[int]) -> None:
    if not sum(least) <= total <= sum(most):
        raise ValueError(
            f"Expected a sparsity of {sum(least)} to {sum(most)} zeros in all, which the zeros that are there and the "
            f"entries that are kept allow, got one of {total}. Choose another sparsity, or another allocation."
        )


def _fill(total: float, shares: Sequence[int], limits: Sequence[int]) -> list[float]:
    """Return min(c · share, limit) for each, with the one c at which they add up to `total`."""
    level: dict[int, float] = {}
    while len(level) < len(shares):
        rest = [i for i in range(len(shares)) if i not in level]
        c = (total - sum(level.values())) / sum(shares[i] for i in rest)
        # All that c overfills at once: without them c only rises.
        over = [i for i in rest if c * shares[i] > limits[i]]
        level |= {i: limits[i] for i in over} if over else {i: c * shares[i] for i in rest}
    return [level[i] for i in range(len(shares))]


def _across(budget: Budget, scores_of: Callable[[Tensor], Tensor]) -> dict[str, int]:
    scores = [lambda view=view: scores_of(view.matrix()) for view in budget.weights.values()]
    return budget.apportion(count_across(scores, budget.total))


def _magnitudes(matrix: Tensor) -> Tensor:
    scores = matrix.abs().flatten()
    largest = scores.argmax()
    scores[largest] = torch.where(scores[largest] > 0, torch.inf, 0)
    return scores


def _lamp_scores(matrix: Tensor) -> Tensor:
    """LAMP scores by descending |W|: counting needs no order. -inf where W is zero, inf for the largest."""
    size = matrix.abs().float().flatten()
    # numpy sorts several times faster than torch on CPUs. Sums are taken there in any case: on GPUs they differ from
    # one call to the next, and scores must repeat themselves.
    ascending = torch.from_numpy(np.sort(size.numpy())) if size.device.type == "cpu" else size.sort().values.cpu()
    squares = ascending.flip(0).double().square_()
    scores = squares.div(squares.cumsum(0)).float()
    scores[0] = torch.inf
    return scores.masked_fill_(squares == 0, -torch.inf)


def _outlier_ratios(
    weights: Mapping[str, WeightView],
    blocks: Mapping[str, str | None],
    input_norms: Mapping[str, Tensor] | None,
    outlier_factor: float,
) -> dict[str, float]:
    """Return D_l of each block, in percent."""
    if missing := [name for name in weights if name not in (input_norms or {})]:
        raise ValueError(
            f"OWL counts outliers among Wanda scores and needs the input norms of each weight, got none for "
            f"{missing[0]!r}. Pass calibration data, or choose an allocation that reads weights alone."
        )
    assert input_norms is not None

    def scores(name: str) -> Tensor:
        matrix = weights[name].matrix()
        return wanda(matrix, Statistics(input_norm=input_norms[name].to(matrix.device)))

    # Scores are computed twice, so that those of one weight are in memory at a time.
    sizes = {name: math.prod(weight.shape) for name, weight in weights.items()}
    means = dict(zip(weights, to_host([scores(name).mean() for name in weights]), strict=True))
    entries: dict[str, int] = {}
    sums: dict[str, float] = {}
    for name in weights:
        block = _place(name, blocks)
        entries[block] = entries.get(block, 0) + sizes[name]
        sums[block] = sums.get(block, 0.0) + means[name] * sizes[name]
    threshold = {block: outlier_factor * sums[block] / entries[block] for block in entries}
    outliers = to_host([(scores(name) > threshold[_place(name, blocks)]).sum() for name in weights])
    ratios = dict.fromkeys(entries, 0.0)
    for name, count in zip(weights, outliers, strict=True):
        ratios[_place(name, blocks)] += 100 * count / entries[_place(name, blocks)]
    return ratios


def _stretch(ratios: dict[str, float], width: float) -> dict[str, float]:
    """Map the ratios linearly onto [0, width]."""
    low, high = min(ratios.values()), max(ratios.values())
    # Where all are alike there is nothing to tell blocks apart by.
    return {block: width * (ratio - low) / (high - low) if high > low else 0.0 for block, ratio in ratios.items()}


def _place(name: str, blocks: Mapping[str, str | None]) -> str:
    """The block of a weight; outside of blocks, its own name."""
    return blocks.get(name) or name
