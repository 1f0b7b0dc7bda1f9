"""Reads texts, conversations and token sequences from what users have: lists, data sets, streams."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from torch import Tensor


# Among so many entries a stream is shuffled, as in `datasets`.
BUFFER = 1000
# The columns of a data set that are read, and what they hold.
COLUMNS: dict[str, Literal["tokens", "text", "conversation"]] = {
    "input_ids": "tokens",
    "text": "text",
    "messages": "conversation",
    "conversations": "conversation",
}


@dataclass(frozen=True)
class Entry:
    """One entry of a source.

    Args:
        kind: what it is.
        value: a text, the messages of a conversation, or token ids.
        counted: of token ids, which of them count. None if all do, and nobody has asked.
    """

    kind: Literal["tokens", "text", "conversation"]
    value: Any
    counted: list[bool] | None = None


def shuffled(source: Iterable[Any], generator: random.Random) -> Iterator[Entry]:
    """Yield the entries of `source` in random order.

    A stream, which has no length or no entries by number, is shuffled among `BUFFER` entries, and is not read further
    than needed.
    """
    stream: Any = [source] if isinstance(source, str) else source
    if hasattr(stream, "__len__") and hasattr(stream, "__getitem__"):
        order = list(range(len(stream)))
        generator.shuffle(order)
        return (entry_of(stream[index]) for index in order)
    if hasattr(stream, "column_names"):
        # A stream of `datasets` can also shuffle the files that it comes from.
        return map(entry_of, stream.shuffle(seed=generator.getrandbits(32), buffer_size=BUFFER))
    return map(entry_of, _from_buffer(stream, generator))


def _from_buffer(stream: Iterable[Any], generator: random.Random) -> Iterator[Any]:
    buffer: list[Any] = []
    for entry in stream:
        if len(buffer) < BUFFER:
            buffer.append(entry)
            continue
        place = generator.randrange(BUFFER)
        yield buffer[place]
        buffer[place] = entry
    generator.shuffle(buffer)
    yield from buffer


def entry_of(entry: Any) -> Entry:
    """Return an entry of a source with its kind.

    Raises:
        TypeError: it is none of these kinds.
        ValueError: it is a row of a data set from which it does not follow what to read.
    """
    if isinstance(entry, Mapping):
        return _of_row(entry)
    if isinstance(entry, str):
        return Entry("text", entry)
    values = entry.tolist() if isinstance(entry, Tensor) and entry.dim() == 1 else entry
    if isinstance(values, (list, tuple)) and values:
        if all(isinstance(value, Mapping) for value in values):
            return Entry("conversation", list(values))
        if all(isinstance(value, Integral) for value in values):
            return Entry("tokens", list(values))
    raise TypeError(
        "Expected documents as texts, as conversations (lists of messages with `role` and `content`), as sequences of "
        f"token ids, or as rows of a data set with one of these, got {type(entry).__name__}. Of a data set, give the "
        'data set itself or the column of its texts, such as `dataset["text"]`.'
    )


def _of_row(row: Mapping[str, Any]) -> Entry:
    columns = [name for name in COLUMNS if row.get(name) is not None]
    if "input_ids" in columns:
        mask = row.get("token_mask")
        return Entry("tokens", _as_list(row["input_ids"]), None if mask is None else list(map(bool, _as_list(mask))))
    kind = COLUMNS[columns[0]] if len(columns) == 1 else None
    if kind is None or isinstance(row[columns[0]], str) != (kind == "text"):
        found = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in row.items())
        raise ValueError(
            f"Expected rows of a data set with a text, with messages or with token ids under one of the names "
            f"{', '.join(map(repr, COLUMNS))}, got {{{found}}}. Rename the column that is meant, such as "
            '`dataset.rename_column("content", "text")`, and leave out others by `dataset.select_columns`.'
        )
    return Entry(kind, row[columns[0]])


def texts_of(documents: Iterable[Any]) -> list[str]:
    """Return the texts of a source that holds nothing else.

    Raises:
        TypeError: it holds something else.
    """
    entries = [entry_of(entry) for entry in ([documents] if isinstance(documents, (str, Mapping)) else documents)]
    other = next((entry for entry in entries if entry.kind != "text"), None)
    if other is not None:
        raise TypeError(
            f"Expected texts to be joined, got a {other.kind if other.kind != 'tokens' else 'sequence of tokens'}. "
            "Use `sample_sequences`, which also takes conversations and token ids."
        )
    return [entry.value for entry in entries]


def _as_list(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)
