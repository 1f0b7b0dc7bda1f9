"""Packed safetensors files: how one is made of a plain file, checked, and turned back into the same bytes.

Every tensor keeps its name. A packed weight is stored as a row of bytes (dtype U8), and every tensor of dtype U8 is a
packed weight. The other tensors are stored as they were. The header names the codec, and holds the header and the
SHA-256 of the plain file, and the CRC-32 of the tensors that are stored as they were.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Self

from .codec import CODEC, KINDS, VERSION
from .packed_weight import ALIGNMENT, Description, PackedError, PackedWeight, in_threads, write_packed
from .tensor_files import HEADER_LENGTH, Entry, TensorFile, parsed_header


# What a file is marked with, in its metadata.
MARK = "peft_sparse_packed"
_PACKED_DTYPE = "U8"
# Norms and biases are not worth a table.
_SMALLEST = 4096
# What packing must leave of a weight, at most. Else it is stored as it is.
_WORTH = 0.95

Done = Callable[[int], object]


class PackedFile(TensorFile):
    """A packed file that is open for reading. Use it as a context.

    Args:
        path: the file.

    Raises:
        PackedError: the file is not packed, or by a codec that is not known, or its header is damaged, or it lacks a
            tensor.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.plain_header, self.digest, self.checksums, self.plain = self._plain()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def weight(self, name: str) -> PackedWeight | None:
        """Return a tensor if it is packed, else None.

        Raises:
            PackedError: its description is damaged, or of another tensor.
        """
        entry, plain = self.entries[name], self.plain[name]
        if entry.dtype != _PACKED_DTYPE:
            return None
        weight = PackedWeight(self.reader(entry), entry.size, name)
        if (weight.description.dtype, weight.description.shape) != (plain.dtype, plain.shape):
            raise PackedError(
                f"{name!r} is packed as {weight.description.dtype} {list(weight.description.shape)}, but the header "
                f"of {self.path.name!r} says {plain.dtype} {list(plain.shape)}. Copy or download the file again."
            )
        return weight

    def verify(self) -> None:
        """Compare the checksums of all tensors.

        Raises:
            PackedError: one differs.
        """
        names = list(self.plain)
        for _ in in_threads(lambda index: self._verify(names[index]), range(len(names))):
            pass

    def _verify(self, name: str) -> None:
        weight = self.weight(name)
        if weight is None:
            self.check_plain(name)
        else:
            weight.verify()

    def check_plain(self, name: str) -> None:
        """Compare the checksum of a tensor that is not packed.

        Raises:
            PackedError: it differs.
        """
        if _checksum(self, self.entries[name]) != self.checksums.get(name):
            raise PackedError(
                f"{name!r} in {self.path.name!r} is damaged: its checksum is another one. Copy or download the file "
                "again."
            )

    def _plain(self) -> tuple[bytes, str, dict[str, int], dict[str, Entry]]:
        if MARK not in self.metadata:
            raise PackedError(f"Expected a packed file, but the header of {self.path.name!r} says nothing of it.")
        try:
            mark = json.loads(self.metadata[MARK])
            codec, header, digest = (mark["codec"], mark["version"]), mark["header"].encode(), mark["sha256"]
            checksums = dict(mark["checksums"])
            _, plain = parsed_header(header)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PackedError(
                f"The header of {self.path.name!r} does not say how it is packed. Copy or download the file again."
            ) from error
        if codec != (CODEC, VERSION):
            raise PackedError(
                f"{self.path.name!r} is packed by the codec {codec[0]!r}, version {codec[1]}. This peft_sparse reads "
                f"{CODEC!r}, version {VERSION}. Update peft_sparse."
            )
        for name, entry in plain.items():
            found = self.entries.get(name)
            if found is None:
                raise PackedError(f"{self.path.name!r} lacks the tensor {name!r}. Copy or download the file again.")
            if found.dtype != _PACKED_DTYPE and (found.dtype, found.shape) != (entry.dtype, entry.shape):
                raise PackedError(
                    f"{name!r} in {self.path.name!r} is {found.dtype} {list(found.shape)}, where {entry.dtype} "
                    f"{list(entry.shape)} was packed. Copy or download the file again."
                )
        return header, digest, checksums, plain


def pack_file(source: Path, target: Path, done: Done) -> str:
    """Write `source`, a safetensors file, packed as `target`, and return the SHA-256 of `source`.

    Args:
        source: the file to read.
        target: the file to write.
        done: is told of bytes of `source` that were worked on.

    Raises:
        PackedError: `source` is damaged, or packed already.
    """
    with TensorFile(source) as plain, target.open("wb") as file:
        if MARK in plain.metadata:
            raise PackedError(f"{source.name!r} is packed already.")
        with source.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        mark = {"codec": CODEC, "version": VERSION, "sha256": digest, "header": plain.header.decode()}

        def header(tensors: dict[str, dict[str, Any]], checksums: dict[str, int]) -> bytes:
            metadata = plain.metadata | {MARK: json.dumps(mark | {"checksums": checksums})}
            text = json.dumps({"__metadata__": metadata} | tensors, separators=(",", ":")).encode()
            return text.ljust(len(text) + -len(text) % ALIGNMENT)

        # The header comes first in the file, and its numbers are known last: leave room for the longest.
        longest = {name: _described(entry, 10**15, 10**15) for name, entry in plain.entries.items()}
        room = len(header(longest, dict.fromkeys(plain.entries, 2**32)))
        file.seek(HEADER_LENGTH + room)
        tensors = _write_tensors(plain, file, HEADER_LENGTH + room, done)
        kept = {name: entry for name, entry in plain.entries.items() if tensors[name]["dtype"] != _PACKED_DTYPE}
        checksums = {name: _checksum(plain, entry) for name, entry in kept.items()}
        file.seek(0)
        file.write(room.to_bytes(HEADER_LENGTH, "little") + header(tensors, checksums).ljust(room))
    return digest


def unpack_file(source: Path, target: Path, done: Done) -> None:
    """Write the plain file that was packed as `source`, byte for byte.

    Args:
        source: the file to read.
        target: the file to write.
        done: is told of bytes of `source` that were worked on.

    Raises:
        PackedError: `source` is damaged, or what was unpacked is not what was packed.
    """
    with PackedFile(source) as packed, target.open("w+b") as file:
        file.write(len(packed.plain_header).to_bytes(HEADER_LENGTH, "little") + packed.plain_header)
        for name, plain in packed.plain.items():
            done(packed.entries[name].size)
            file.seek(plain.begin)
            weight = packed.weight(name)
            if weight is None:
                packed.check_plain(name)
                file.writelines(packed.pieces(packed.entries[name]))
            else:
                for bits in weight.chunks():
                    file.write(bits.data)
        file.flush()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != packed.digest:
            raise PackedError(
                f"The file unpacked from {source.name!r} has the SHA-256 {digest}, where {packed.digest} was packed. "
                "Copy or download the packed file again."
            )


def _write_tensors(plain: TensorFile, file: BinaryIO, start: int, done: Done) -> dict[str, dict[str, Any]]:
    written: dict[str, dict[str, Any]] = {}
    last: list[Entry] = []

    def copy(entry: Entry) -> None:
        begin = file.tell() - start
        file.writelines(plain.pieces(entry))
        written[entry.name] = _described(entry, begin, begin + entry.size)

    for entry in plain.entries.values():
        begin = file.tell()
        done(entry.size)
        if entry.dtype == _PACKED_DTYPE or (entry.dtype in KINDS and entry.entries >= _SMALLEST):
            size = write_packed(Description(entry.name, entry.dtype, entry.shape), plain.reader(entry), file)
            if entry.dtype == _PACKED_DTYPE or size < _WORTH * entry.size:
                packed = Entry(entry.name, _PACKED_DTYPE, (size,), 0, size)
                written[entry.name] = _described(packed, begin - start, begin - start + size)
                continue
            file.seek(begin)
            file.truncate()
        if entry.size % ALIGNMENT:
            last.append(entry)
        else:
            copy(entry)
    # Every tensor must start at a multiple of the bytes of its entries.
    for entry in sorted(last, key=lambda entry: -(entry.size // max(entry.entries, 1))):
        copy(entry)
    return written


def _described(entry: Entry, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}


def _checksum(file: TensorFile, entry: Entry) -> int:
    checksum = 0
    for piece in file.pieces(entry):
        checksum = zlib.crc32(piece, checksum)
    return checksum
