"""Token sequences for calibration and evaluation, cut as the pruning papers cut them."""

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


# Of a model's 128k context nobody calibrates; the papers use this length.
SEQUENCE_LENGTH = 2048


def sample_sequences(
    documents: Iterable[str], tokenizer: Any, count: int = 128, length: int = SEQUENCE_LENGTH, seed: int = 0
) -> Tensor:
    """Return `count` random windows, each from another random document longer than `length` tokens, (count, length).

    The calibration data of SparseGPT, Wanda and PERP: there 128 windows of C4, of 2,048 or 4,096 tokens.

    Raises:
        ValueError: too few documents are long enough.
    """
    generator = random.Random(seed)
    order = list(documents)
    generator.shuffle(order)
    windows: list[list[int]] = []
    for text in order:
        tokens = tokenizer(text, verbose=False)["input_ids"]
        if len(tokens) > length:
            start = generator.randint(0, len(tokens) - length - 1)
            windows.append(tokens[start : start + length])
        if len(windows) == count:
            return torch.tensor(windows)
    raise ValueError(
        f"Expected {count} documents of more than {length} tokens, found {len(windows)} among {len(order)}. Bring "
        "more text, lower `length` or `count`, or join short documents with `pack_sequences`."
    )


def pack_sequences(
    documents: Iterable[str], tokenizer: Any, length: int = SEQUENCE_LENGTH, *, separator: str = "\n\n"
) -> Tensor:
    """Return the tokens of the joined documents, cut into sequences without overlap, the tail dropped, (n, length).

    With the test split of WikiText-2 this is what the papers measure perplexity on.

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    # In one piece: document by document there would be special tokens, and other tokens, where they meet.
    tokens = tokenizer(separator.join(documents), verbose=False)["input_ids"]
    if len(tokens) < length:
        raise ValueError(
            f"Expected a text of at least one sequence of {length} tokens, got {len(tokens)} tokens. Bring more text, "
            "or lower `length`."
        )
    return torch.tensor(tokens[: len(tokens) - len(tokens) % length]).view(-1, length)
