"""Makes token sequences of text for calibration and evaluation, as the pruning papers do."""

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


# The length that SparseGPT uses. A model's context may be far longer than calibration needs.
SEQUENCE_LENGTH = 2048


def sample_sequences(
    documents: Iterable[str], tokenizer: Any, count: int = 128, length: int = SEQUENCE_LENGTH, seed: int = 0
) -> Tensor:
    """Return token ids of random windows of text, each from another document, (count, length).

    Documents are taken in random order. Those of at most `length` tokens are skipped. SparseGPT (Frantar and Alistarh
    2023, arXiv:2301.00774), Wanda (Sun et al. 2023, arXiv:2306.11695) and PERP (Zimmer et al. 2023, arXiv:2312.15230)
    calibrate on 128 such windows of the C4 data set.

    Args:
        documents: texts.
        tokenizer: a tokenizer of transformers.
        count: number of windows.
        length: length of a window, in tokens.
        seed: seed of the random choices. The state of Python's random generator is neither read nor changed.

    Raises:
        TypeError: `documents` holds something else than texts.
        ValueError: fewer than `count` documents have more than `length` tokens.
    """
    generator = random.Random(seed)
    order = _texts(documents)
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
        f"Expected {count} documents of more than {length} tokens, found {len(windows)} among {len(order)}. Give "
        "more text, lower `length` or `count`, or join short documents with `pack_sequences`."
    )


def pack_sequences(
    documents: Iterable[str], tokenizer: Any, length: int = SEQUENCE_LENGTH, *, separator: str = "\n\n"
) -> Tensor:
    """Return token ids of the joined documents, cut into sequences without overlap, (sequences, length).

    Tokens at the end that do not fill a sequence are dropped. With the test split of WikiText-2, these are the
    sequences that SparseGPT, Wanda and PERP measure perplexity on.

    Args:
        documents: texts, in the order in which they are joined; or one text.
        tokenizer: a tokenizer of transformers.
        length: length of a sequence, in tokens.
        separator: text between two documents.

    Raises:
        TypeError: `documents` holds something else than texts.
        ValueError: the joined text has fewer than `length` tokens.
    """
    # The text is tokenised in one piece. Document by document, there would be special tokens between them, and tokens
    # that span two documents would be missing.
    tokens = tokenizer(separator.join(_texts(documents)), verbose=False)["input_ids"]
    if len(tokens) < length:
        raise ValueError(
            f"Expected a text of at least one sequence of {length} tokens, got {len(tokens)} tokens. Give more text, "
            "or lower `length`."
        )
    return torch.tensor(tokens[: len(tokens) - len(tokens) % length]).view(-1, length)


def _texts(documents: Iterable[str]) -> list[str]:
    texts = [documents] if isinstance(documents, str) else list(documents)
    other = next((text for text in texts if not isinstance(text, str)), "")
    if not isinstance(other, str):
        raise TypeError(
            f"Expected `documents` as texts, got {type(other).__name__}. Of a data set, give the column of its texts, "
            'such as `dataset["text"]`.'
        )
    return texts
