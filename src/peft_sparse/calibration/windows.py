"""Cuts tokens into sequences of one length: windows of documents, and conversations one after the other."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A sequence of tokens.

    Args:
        ids: its tokens.
        counted: which of them count. None if all do, and nobody has asked.
    """

    ids: list[int]
    counted: list[bool] | None = None


@dataclass
class Packer:
    """Puts conversations one after the other into sequences of one length, so that there is no padding.

    Each sequence begins with a conversation. The last one is cut off where the sequence is full, and its rest is
    dropped, so that no sequence begins in the middle of one.

    Args:
        length: tokens of a sequence.
        count: how many sequences are wanted.
    """

    length: int
    count: int
    ids: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    dropped: int = 0

    def add(self, ids: list[int], counted: list[bool]) -> Window | None:
        """Append a conversation. Return the sequence that it completes, if one of its tokens counts.

        Raises:
            ValueError: more sequences than wanted hold no token that counts.
        """
        self.ids += ids
        self.counted += counted
        if len(self.ids) < self.length:
            return None
        window = Window(self.ids[: self.length], self.counted[: self.length])
        self.ids, self.counted = [], []
        if any(window.counted or ()):
            return window
        self.dropped += 1
        if self.dropped > self.count:
            raise ValueError(
                f"Expected sequences with tokens that count, and in {self.dropped} sequences of {self.length} tokens "
                "there was none, before the wanted ones were complete: all tokens were those of the chat template"
                " or of other roles. Raise `length`, or leave out `assistant_only`."
            )
        return None


def joined(windows: list[Window]) -> Tensor | list[dict[str, Tensor]]:
    """Return the windows as token ids (windows, length), or as rows with a token mask if one of them has a mask."""
    if all(window.counted is None for window in windows):
        return torch.tensor([window.ids for window in windows])
    return [_row(window) for window in windows]


def _row(window: Window) -> dict[str, Tensor]:
    ids = torch.tensor(window.ids)
    mask = torch.ones_like(ids) if window.counted is None else torch.tensor(window.counted, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "token_mask": mask}
