"""Outlier-weighed sparsity: blocks whose scores have more outliers keep more entries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ..calibration.statistics import Need, Statistics
from ..model.weights import to_host
from .budget import Budget, apportion
from .choices import check_numbers
from .criteria import Wanda
from .patterns import SemiStructured


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

    sizes = dict(zip(budget.weights, budget.sizes, strict=True))
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


def _stretch(ratios: dict[str, float], width: float) -> dict[str, float]:
    """Map the ratios linearly onto [0, width]. If all ratios are equal, all become 0."""
    low, high = min(ratios.values()), max(ratios.values())
    return {block: width * (ratio - low) / (high - low) if high > low else 0.0 for block, ratio in ratios.items()}


def _place(name: str, blocks: Mapping[str, str | None]) -> str:
    """Return the block of a weight; outside of blocks, the weight's own name."""
    return blocks.get(name) or name
