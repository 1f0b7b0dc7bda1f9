"""Makes token sequences of text for calibration and evaluation, as the pruning papers do."""

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from .chat import tokens_of
from .forms import check_counts
from .sources import Entry, shuffled, texts_of
from .windows import Packer, Window, joined


# The length that SparseGPT uses. A model's context may be far longer than calibration needs.
SEQUENCE_LENGTH = 2048


@overload
def sample_sequences(
    documents: Iterable[str], tokenizer: Any, count: int = 128, length: int = SEQUENCE_LENGTH, seed: int = 0
) -> Tensor: ...


@overload
def sample_sequences(
    documents: Iterable[Any] | Mapping[str, Iterable[Any]],
    tokenizer: Any,
    count: int = 128,
    length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    *,
    shares: Mapping[str, float] | None = None,
    assistant_only: bool = False,
) -> Tensor | list[dict[str, Tensor]]: ...


def sample_sequences(
    documents: Iterable[Any] | Mapping[str, Iterable[Any]],
    tokenizer: Any,
    count: int = 128,
    length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    *,
    shares: Mapping[str, float] | None = None,
    assistant_only: bool = False,
) -> Tensor | list[dict[str, Tensor]]:
    """Return random sequences of text for calibration, each of `length` tokens, from one source or from several.

    Texts are taken in random order. A sequence is a random window of a text, and each comes from another one. Texts of
    at most `length` tokens are skipped. SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774), Wanda (Sun et al.
    2023, arXiv:2306.11695) and PERP (Zimmer et al. 2023, arXiv:2312.15230) calibrate on 128 such windows of the C4
    data set.

    Conversations get the chat template of the tokenizer. They follow each other in random order until a sequence is
    full, so there is no padding. Each sequence begins with a conversation, and the last one is cut off. Tokens of the
    template do not count: neither roles, nor marks of beginnings and ends, nor a system prompt that the template adds.

    Args:
        documents: a source, or a dict of sources by name. A source is a list or another iterable of texts, of
            conversations or of token sequences, such as those of `generate_sequences`; or a `datasets.Dataset` or
            `IterableDataset` with one of the columns "text", "messages", "conversations" and "input_ids". A
            conversation is a list of messages, dicts with the texts `role` and `content`. A stream is shuffled among
            1,000 entries, and is read only as far as needed.
        tokenizer: a tokenizer of transformers. Conversations need a fast one with a chat template.
        count: number of sequences.
        length: length of a sequence, in tokens.
        seed: seed of the random choices. The state of Python's random generator is neither read nor changed.
        shares: of several sources, how much each contributes, such as `{"c4": 0.75, "own": 0.25}`. Positive numbers,
            which are divided by their sum. The numbers of sequences are rounded by largest remainder, so that they add
            up to `count`. The sequences of a source are those that it alone would give.
        assistant_only: whether of conversations only what the assistant says counts. By default the contents of all
            messages count.

    Returns:
        Token ids (count, length) if all sources hold texts or token ids without a mask. Otherwise a list of dicts, one
        for each sequence, with `input_ids`, `labels` and `token_mask` (length,). The mask is 1 at tokens that count,
        and labels are -100 elsewhere. `prune`, `reconstruct` and `perplexity` take both forms. The list is also a
        training set of `SparseTrainer`. Sequences of several sources are in the order of the sources.

    Raises:
        TypeError: a source holds something else.
        ValueError: `count` or `length` is no whole number of at least 1; a source is too small; it has none of these
            columns or several; a message has another form, or the template changes its content; `shares` does not fit
            the sources.
    """
    check_counts(count=count, length=length)
    if not isinstance(documents, Mapping):
        if shares is not None:
            raise ValueError(
                f"`shares` divides the sequences among several sources, got one source ({type(documents).__name__}). "
                'Give a dict, such as `{"c4": documents, "own": conversations}`.'
            )
        return joined(_sample(documents, "documents", tokenizer, count, length, seed, assistant_only))
    windows: list[Window] = []
    for name, part in _counts(documents, shares, count).items():
        windows += _sample(documents[name], f"documents[{name!r}]", tokenizer, part, length, seed, assistant_only)
    return joined(windows)


def _counts(documents: Mapping[str, Any], shares: Mapping[str, float] | None, count: int) -> dict[str, int]:
    """Return how many sequences each source contributes, by largest remainder, in the order of the sources."""
    if shares is None or set(shares) != set(documents):
        raise ValueError(
            f"Expected `shares` with a number for each source ({', '.join(map(repr, documents))}), got "
            f"{'none' if shares is None else ', '.join(map(repr, shares))}. If these are the splits of one data set, "
            'choose one, such as `documents["train"]`.'
        )
    total = sum(shares.values())
    if not all(math.isfinite(share) and share > 0 for share in shares.values()):
        raise ValueError(f"Expected positive numbers in `shares`, got {dict(shares)}. Leave out unused sources.")
    exact = {name: count * shares[name] / total for name in documents}
    counts = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: count - sum(counts.values())]:
        counts[name] += 1
    if missing := [name for name, part in counts.items() if not part]:
        raise ValueError(
            f"Expected at least one sequence of each source, got none of {', '.join(map(repr, missing))}: `count` is "
            f"{count}. Raise `count`, or leave out these sources."
        )
    return counts


def _sample(
    source: Iterable[Any], name: str, tokenizer: Any, count: int, length: int, seed: int, assistant_only: bool
) -> list[Window]:
    """Return `count` windows of one source, which error messages call `name`."""
    generator, packer = random.Random(seed), Packer(length, count)
    windows: list[Window] = []
    seen: dict[str, int] = {}
    for entry in shuffled(source, generator):
        seen[entry.kind] = seen.get(entry.kind, 0) + 1
        if entry.kind == "conversation":
            window = packer.add(*tokens_of(entry.value, tokenizer, assistant_only))
        else:
            window = _cut(entry, tokenizer, length, generator)
        if window is not None:
            windows.append(window)
        if len(windows) == count:
            return windows
    if "conversation" in seen:
        raise ValueError(
            f"Expected conversations in `{name}` that fill {count} sequences of {length} tokens, and "
            f"{seen['conversation']} conversations fill {len(windows)}. Give more, or lower `length` or `count`."
        )
    raise ValueError(
        f"Expected {count} documents of more than {length} tokens in `{name}`, found {len(windows)} among "
        f"{sum(seen.values())}. Give more text, lower `length` or `count`, or join short documents with "
        "`pack_sequences`."
    )


def _cut(entry: Entry, tokenizer: Any, length: int, generator: random.Random) -> Window | None:
    """Return a random window of a text or of token ids; None if there are too few tokens."""
    if entry.kind == "tokens":
        if len(entry.value) < length:
            return None
        start = generator.randint(0, len(entry.value) - length)
        counted = None if entry.counted is None else entry.counted[start : start + length]
        return Window(entry.value[start : start + length], counted)
    tokens = tokenizer(entry.value, verbose=False)["input_ids"]
    if len(tokens) <= length:
        return None
    # As in the papers' scripts, the last window of a document is never drawn.
    start = generator.randint(0, len(tokens) - length - 1)
    return Window(tokens[start : start + length])


def pack_sequences(
    documents: Iterable[Any], tokenizer: Any, length: int = SEQUENCE_LENGTH, *, separator: str = "\n\n"
) -> Tensor:
    """Return token ids of the joined documents, cut into sequences without overlap, (sequences, length).

    Tokens at the end that do not fill a sequence are dropped. With the test split of WikiText-2, these are the
    sequences that SparseGPT, Wanda and PERP measure perplexity on.

    Args:
        documents: texts, in the order in which they are joined; or a `datasets.Dataset` with a column "text"; or one
            text.
        tokenizer: a tokenizer of transformers.
        length: length of a sequence, in tokens.
        separator: text between two documents.

    Raises:
        TypeError: `documents` holds something else than texts.
        ValueError: `length` is no whole number of at least 1; the joined text has fewer tokens; the data set has no
            column "text".
    """
    check_counts(length=length)
    # The text is tokenised in one piece. Document by document, there would be special tokens between them, and tokens
    # that span two documents would be missing.
    tokens = tokenizer(separator.join(texts_of(documents)), verbose=False)["input_ids"]
    if len(tokens) < length:
        raise ValueError(
            f"Expected a text of at least one sequence of {length} tokens, got {len(tokens)} tokens. Give more text, "
            "or lower `length`."
        )
    return torch.tensor(tokens[: len(tokens) - len(tokens) % length]).view(-1, length)
