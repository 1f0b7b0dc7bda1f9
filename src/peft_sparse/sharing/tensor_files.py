"""Safetensors files that are read and written tensor by tensor, a large tensor in pieces.

`safetensors.torch.save_file` needs all tensors of a file in memory at once.
"""

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .packed_weight import PackedError, Read


# The bytes at the start of a file that hold the length of its header.
HEADER_LENGTH = 8
# The bytes of a tensor that are in memory at a time.
_PIECE = 1 << 24


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file.

    Args:
        name: its name.
        dtype: its dtype, as safetensors writes it.
        shape: its shape.
        begin: its first byte in the file.
        size: the number of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file that is open for reading. Use it as a context.

    Args:
        path: the file.

    Raises:
        PackedError: the file is damaged: its header cannot be read, or it ends before its tensors do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._lock = threading.Lock()
        try:
            self.header, self.metadata, self.entries = self._described()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, begin: int, size: int) -> bytes:
        """Return bytes of the file. Threads may read at the same time."""
        with self._lock:
            self._file.seek(begin)
            return self._file.read(size)

    def reader(self, entry: Entry) -> Read:
        """Return a function that reads bytes of a tensor: (offset, length) -> bytes."""
        return lambda offset, size: self.read(entry.begin + offset, min(size, entry.size - offset))

    def pieces(self, entry: Entry) -> Iterator[bytes]:
        """Yield the bytes of a tensor, a large one in pieces."""
        for offset in range(0, entry.size, _PIECE):
            yield self.read(entry.begin + offset, min(_PIECE, entry.size - offset))

    def _described(self) -> tuple[bytes, dict[str, str], dict[str, Entry]]:
        length = int.from_bytes(self.read(0, HEADER_LENGTH), "little")
        size = self.path.stat().st_size
        header = self.read(HEADER_LENGTH, min(length, size))
        try:
            metadata, entries = parsed_header(header)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PackedError(
                f"Expected a safetensors file, but the header of {self.path.name!r} cannot be read. Copy or download "
                "the file again."
            ) from error
        cut = [entry.name for entry in entries.values() if entry.begin + entry.size > size]
        if cut:
            others = f", and {len(cut) - 1} more tensors" if len(cut) > 1 else ""
            raise PackedError(
                f"{self.path.name!r} is cut off after {size} bytes: it lacks {cut[0]!r} or a part of it{others}. Copy "
                "or download the file again."
            )
        return header, metadata, entries


def parsed_header(header: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
    """Return the metadata and the tensors of a safetensors header, the JSON between the first 8 bytes and the data.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: `header` is not one.
    """
    found: dict[str, Any] = json.loads(header)
    metadata = found.pop("__metadata__", {})
    start = HEADER_LENGTH + len(header)
    entries = {}
    for name, entry in found.items():
        begin, end = entry["data_offsets"]
        entries[name] = Entry(name, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
    return metadata, entries
