"""A packed weight: one row of bytes that says what it is, and holds its own checksums.

    MAGIC          8 bytes
    length         of the description
    checksum       CRC-32 of the description and the table
    description    JSON: codec, version, name, dtype, shape, chunk
    table          for each stream of each chunk: 2 · (its length) + (1 if it is deflated), and its CRC-32
    streams        those of the first chunk, as `codec` orders them, then those of the next
    zeros          up to a multiple of 8 bytes

Numbers have 32 bits, no sign, and the lowest byte first.
"""

import json
import math
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from .codec import CHUNK, CODEC, KINDS, VERSION, Bits, Kind, Mask, Stream, decode, decode_mask, encode


MAGIC = b"PSPACKED"
# Tensors that follow in the file start at a multiple of this many bytes, as the largest dtype needs it.
ALIGNMENT = 8
_PREFIX = struct.Struct("<8sII")

# (offset, length) -> bytes. Past the end there are fewer.
Read = Callable[[int, int], bytes]
Result = TypeVar("Result")


class PackedError(ValueError):
    """A packed weight is damaged, or of a codec that this version does not know."""


@dataclass(frozen=True)
class Description:
    """What a packed weight says of itself.

    Args:
        name: its name in the checkpoint.
        dtype: a dtype of `KINDS`.
        shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> Kind:
        return KINDS[self.dtype]

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    @property
    def chunks(self) -> int:
        return -(-self.entries // CHUNK)

    def size_of(self, chunk: int) -> int:
        """Return the number of entries of a chunk. Only the last one may have fewer than the others."""
        return min(CHUNK, self.entries - chunk * CHUNK)

    def to_json(self) -> bytes:
        """Return the description as it is stored."""
        codec = {"codec": CODEC, "version": VERSION, "chunk": CHUNK}
        return json.dumps(codec | {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}).encode()


def write_packed(description: Description, read: Read, file: BinaryIO) -> int:
    """Pack a weight and write it where `file` stands. Return the number of bytes.

    A few chunks are in memory at a time. Each is unpacked and compared before it is written.

    Args:
        description: name, dtype and shape of the weight.
        read: gives the bytes of the dense weight.
        file: a file that can seek.

    Raises:
        PackedError: a chunk did not unpack to what was packed.
    """
    start, kind, described = file.tell(), description.kind, description.to_json()
    table = np.zeros((description.chunks, 2 + kind.bytes, 2), "<u4")
    file.seek(start + _PREFIX.size + len(described) + table.nbytes)

    def packed(chunk: int) -> list[Stream]:
        entries = description.size_of(chunk)
        dense = read(chunk * CHUNK * kind.bytes, entries * kind.bytes)
        streams = encode(np.frombuffer(dense, kind.bits), kind)
        if decode(streams, entries, kind).tobytes() != dense:
            raise PackedError(
                f"Chunk {chunk} of {description.name!r} did not unpack to what was packed. Run it again. If this "
                "happens again, the memory of this machine or peft_sparse has a defect."
            )
        return streams

    for chunk, streams in enumerate(in_threads(packed, range(description.chunks))):
        for index, stream in enumerate(streams):
            table[chunk, index] = 2 * len(stream.data) + stream.deflated, zlib.crc32(stream.data)
            file.write(stream.data)
    file.write(bytes(-(file.tell() - start) % ALIGNMENT))
    end = file.tell()
    file.seek(start)
    checksum = zlib.crc32(table.tobytes(), zlib.crc32(described))
    file.write(_PREFIX.pack(MAGIC, len(described), checksum) + described + table.tobytes())
    file.seek(end)
    return end - start


class PackedWeight:
    """A packed weight. It is read piece by piece, and no piece is used before its checksum was compared.

    Args:
        read: gives its bytes.
        size: the number of its bytes.
        name: the name under which it is stored. None where it is not known.

    Raises:
        PackedError: its description is damaged, names a codec that is not known, or another weight.
    """

    def __init__(self, read: Read, size: int, name: str | None = None) -> None:
        self.read, self.name = read, name
        prefix = read(0, _PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
            raise self._damaged("it does not begin as one")
        _, length, checksum = _PREFIX.unpack(prefix)
        described = read(_PREFIX.size, min(length, size))
        self.description = self._parsed(described)
        shape = self.description.chunks, 2 + self.description.kind.bytes, 2
        stored = read(_PREFIX.size + length, 4 * math.prod(shape))
        if len(stored) != 4 * math.prod(shape) or zlib.crc32(stored, zlib.crc32(described)) != checksum:
            raise self._damaged("the checksum of its description is another one")
        if name not in (None, self.description.name):
            raise self._damaged(f"it is {self.description.name!r}")
        self.name = self.description.name
        self.table: npt.NDArray[np.uint32] = np.frombuffer(stored, "<u4").reshape(shape)
        lengths = (self.table[..., 0] >> 1).astype(np.int64)
        self.ends = _PREFIX.size + length + len(stored) + np.cumsum(lengths).reshape(lengths.shape)
        end = int(self.ends[-1, -1]) if self.ends.size else _PREFIX.size + length
        if size != end + -end % ALIGNMENT:
            raise self._damaged(f"it has {size} bytes and needs {end + -end % ALIGNMENT}")

    def _parsed(self, described: bytes) -> Description:
        try:
            found = json.loads(described)
            codec = found["codec"], found["version"], found["chunk"]
            description = Description(found["name"], found["dtype"], tuple(found["shape"]))
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged("its description cannot be read") from error
        if codec != (CODEC, VERSION, CHUNK) or description.dtype not in KINDS:
            raise PackedError(
                f"{description.name!r} is packed by the codec {codec[0]!r}, version {codec[1]}, as "
                f"{description.dtype}. This peft_sparse reads {CODEC!r}, version {VERSION}. Update peft_sparse."
            )
        return description

    def _damaged(self, what: str) -> PackedError:
        name = "A packed weight" if self.name is None else f"The packed weight {self.name!r}"
        return PackedError(f"{name} is damaged: {what}. Copy or download the file again.")

    def verify(self) -> None:
        """Compare all checksums with what is stored.

        Raises:
            PackedError: one differs.
        """
        for chunk in range(self.description.chunks):
            self._streams(chunk)

    def chunks(self) -> Iterator[Bits]:
        """Yield the entries chunk by chunk, as unsigned integers.

        Raises:
            PackedError: a checksum differs.
        """
        yield from in_threads(self._chunk, range(self.description.chunks))

    def masks(self) -> Iterator[Mask]:
        """Yield the mask chunk by chunk, True = kept. Nothing else is read.

        Raises:
            PackedError: a checksum differs.
        """
        for chunk in range(self.description.chunks):
            yield decode_mask(self._stream(chunk, 0), self.description.size_of(chunk))

    def tensor(self) -> torch.Tensor:
        """Return the weight.

        Raises:
            PackedError: a checksum differs.
        """
        bits = np.empty(self.description.entries, self.description.kind.bits)
        begin = 0
        for chunk in self.chunks():
            bits[begin : begin + len(chunk)] = chunk
            begin += len(chunk)
        # PyTorch gives bytes of a NumPy array any dtype, but has none of NumPy's for bfloat16.
        return torch.from_numpy(bits.view(np.uint8)).view(self.description.kind.dtype).view(self.description.shape)

    def _chunk(self, chunk: int) -> Bits:
        return decode(self._streams(chunk), self.description.size_of(chunk), self.description.kind)

    def _streams(self, chunk: int) -> list[Stream]:
        return [self._stream(chunk, index) for index in range(self.table.shape[1])]

    def _stream(self, chunk: int, index: int) -> Stream:
        word, checksum = self.table[chunk, index].tolist()
        data = self.read(int(self.ends[chunk, index]) - (word >> 1), word >> 1)
        if len(data) != word >> 1 or zlib.crc32(data) != checksum:
            raise self._damaged(f"a checksum of chunk {chunk} is another one")
        return Stream(data, bool(word & 1))


def in_threads(step: Callable[[int], Result], numbers: Iterable[int]) -> Iterator[Result]:
    """Yield `step` of each number, in order, computed ahead by as many threads as PyTorch uses.

    NumPy and zlib let other threads run while they work. Few results wait, so memory stays bounded.
    """
    numbers, workers = list(numbers), torch.get_num_threads()
    if min(workers, len(numbers)) < 2:
        yield from map(step, numbers)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for number in numbers:
            waiting.append(pool.submit(step, number))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
