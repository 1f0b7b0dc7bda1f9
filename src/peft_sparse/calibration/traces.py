"""Recognises tokens in the rows that experts get, by their values."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from .padding import RowsUnknown


class RowTraces:
    """Tells which rows of an expert's inputs are padding, where experts get copies of the rows of all tokens.

    A later matrix of the same expert gets other values, but its rows are those of the same tokens, in the same order.
    """

    def __init__(self) -> None:
        # Module -> the keys of the rows of tokens that count, and of the others.
        self._tokens: dict[int, tuple[Tensor, Tensor]] = {}
        # (module, expert) -> the mask of the rows that it got last.
        self._masks: dict[tuple[int, Hashable], Tensor] = {}

    def note(self, module: nn.Module, states: Tensor, keep: Tensor) -> None:
        """Note the states (sequences, tokens, features), or flat, that come to `module`, and which of them count."""
        keys, kept = row_keys(states.flatten(0, -2)), keep.flatten().to(states.device)
        self._tokens[id(module)] = keys[kept], keys[~kept]
        self._masks.clear()

    def kept(self, module: nn.Module, expert: Hashable, rows: Tensor) -> Tensor:
        """Return which of `rows` (rows, in) are of tokens that count.

        Args:
            module: the module whose inputs the rows are copies of.
            expert: what the matrices of one expert have in common.
            rows: the inputs of a matrix of the expert.

        Raises:
            RowsUnknown: the rows are neither copies of tokens, nor as many as the expert got before.
        """
        counted, others = self._tokens[id(module)]
        keys = row_keys(rows)
        is_counted, is_other = torch.isin(keys, counted), torch.isin(keys, others)
        if bool((is_counted ^ is_other).all()):
            self._masks[id(module), expert] = is_counted
        mask = self._masks.get((id(module), expert))
        if mask is None or len(mask) != len(rows):
            raise RowsUnknown
        return mask


def row_keys(rows: Tensor) -> Tensor:
    """Return a number for each of `rows` (rows, features), equal for rows of equal bits: a sum in whole numbers."""
    bits = rows.detach().contiguous().view(torch.uint8).long() + 1
    generator = torch.Generator(device="cpu").manual_seed(0)
    weights = torch.randint(1, 2**62, (bits.shape[1],), generator=generator).to(rows.device) | 1
    return (bits * weights).sum(1)
