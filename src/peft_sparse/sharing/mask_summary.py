"""What a mask tells, found out in pieces: its zeros, n:m, and the fingerprint that `model.masks` defines."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .codec import Bits, Mask


# The m of n:m, the smallest first. Each is twice the one before.
GROUP_SIZES = (2, 4, 8, 16, 32)
# How much of n the groups of n:m keep on average, at least. Unstructured masks with very few entries left have no
# group with many, but far fewer than n in most.
_FILLED = 0.95
# Entries of a piece. Pieces have whole groups of rows.
_PIECE = 1 << 22


@dataclass(frozen=True)
class MaskSummary:
    """What a mask tells.

    Args:
        zeros: number of its pruned entries.
        pattern: "n:m" with the smallest m that fits, along the inputs, or None.
        pattern_across: the same along the other axis.
        fingerprint: that of the matrix (out, in), or of stacked matrices as one matrix.
    """

    zeros: int
    pattern: str | None
    pattern_across: str | None
    fingerprint: str


def summary_of(pieces: Iterable[Mask], shape: tuple[int, ...], transposed: bool = False) -> MaskSummary:
    """Return what a mask tells.

    Args:
        pieces: its entries in order, True = kept, in pieces of any length.
        shape: (out, in), (., out, in) for stacked matrices, or (out, in, k, k) for a convolution.
        transposed: whether the file holds (in, out). The mask then is in memory as a whole.
    """
    # The inputs of a convolution are its channels and their places.
    matrices, rows, columns = shape if len(shape) == 3 else (1, shape[0], math.prod(shape[1:]))
    if transposed:
        whole = np.concatenate(list(pieces)).reshape(rows, columns).T
        # Memory in the order of (out, in).
        pieces, rows, columns = [np.ascontiguousarray(whole).reshape(-1)], columns, rows
    along, across, digest, kept = _Groups(columns), _Groups(rows), hashlib.blake2b(digest_size=8), 0
    for block in _blocks(pieces, columns):
        kept += int(np.count_nonzero(block))
        along.add(_padded(block))
        if rows % GROUP_SIZES[-1] == 0 or matrices == 1:
            across.add(_padded(block.T))
        digest.update(np.packbits(block, bitorder="little").tobytes())
    entries = matrices * rows * columns
    zeros, share = entries - kept, kept / max(entries, 1)
    return MaskSummary(
        zeros,
        along.pattern(share),
        across.pattern(share),
        f"{matrices * rows}x{columns}:{zeros}:{digest.hexdigest()}",
    )


@dataclass
class _Groups:
    """The largest number of entries that a group keeps, by the size of the groups.

    Args:
        length: the number of entries along the axis. An axis of a single group tells nothing.
    """

    length: int
    most: dict[int, int] = field(default_factory=lambda: dict.fromkeys(GROUP_SIZES, 0))

    def add(self, mask: Mask) -> None:
        counts: Bits = mask.view(np.uint8)
        for size in GROUP_SIZES:
            counts = counts[:, ::2] + counts[:, 1::2]
            self.most[size] = max(self.most[size], int(counts.max(initial=0)))

    def pattern(self, share: float) -> str | None:
        for size, most in self.most.items():
            if 0 < most < size <= self.length // 2 and share * size >= _FILLED * most:
                return f"{most}:{size}"
        return None


def _padded(mask: Mask) -> Mask:
    """Return a matrix whose columns are whole groups. The last groups keep less."""
    missing = -mask.shape[1] % GROUP_SIZES[-1]
    return np.pad(mask, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(mask)


def _blocks(pieces: Iterable[Mask], columns: int) -> Iterator[Mask]:
    """Yield whole rows, as many as the largest group has or a multiple, except for the last ones."""
    step = columns * GROUP_SIZES[-1] * max(1, _PIECE // max(columns * GROUP_SIZES[-1], 1))
    waiting: list[Mask] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        if count >= step:
            joined = np.concatenate(waiting)
            whole = count - count % step
            for begin in range(0, whole, step):
                yield joined[begin : begin + step].reshape(-1, columns)
            waiting, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(waiting).reshape(-1, columns)
