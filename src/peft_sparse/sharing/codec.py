"""The codec of packed weights: mask bits, and the kept entries split into planes of bytes, which are deflated.

A chunk of a weight, whose entries have b bytes each, becomes 2 + b streams:

    mask     one bit for each entry, 1 = kept; no bytes if all are kept
    signs    one bit for each zero, 1 = negative zero; no bytes if there are no negative zeros
    planes   byte after byte of the kept entries, the highest first

The bits of a kept entry are first rotated left by one. The sign is then the lowest bit, and the highest plane holds
nothing but the exponent (with three more bits in float16), which a Huffman code shortens. A stream is deflated if that
saves a twentieth of it. Deflating needs nothing but the standard library.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


CODEC = "peft_sparse_planes"
VERSION = 1
# Entries of a chunk.
CHUNK = 1 << 18

Bits = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

# What deflating must leave of a stream, at most. Less gain is not worth the time that inflating takes.
_WORTH = 0.95
# What a Huffman code must leave for deflate to search for repetitions too. It finds them where bytes are constant.
_REPEATS = 0.15
_RAW_DEFLATE = -15


@dataclass(frozen=True)
class Kind:
    """A dtype as the codec sees it.

    Args:
        dtype: the dtype of tensors.
        bits: the unsigned integer of the same number of bytes.
        signed_zero: whether the bit pattern with only the highest bit set is a zero.
    """

    dtype: torch.dtype
    bits: Any
    signed_zero: bool = True

    @property
    def bytes(self) -> int:
        return int(np.dtype(self.bits).itemsize)


# By the names that safetensors gives to dtypes.
KINDS = {
    "F64": Kind(torch.float64, np.uint64),
    "F32": Kind(torch.float32, np.uint32),
    "BF16": Kind(torch.bfloat16, np.uint16),
    "F16": Kind(torch.float16, np.uint16),
    "F8_E4M3": Kind(torch.float8_e4m3fn, np.uint8),
    "F8_E5M2": Kind(torch.float8_e5m2, np.uint8),
    "U8": Kind(torch.uint8, np.uint8, signed_zero=False),
}


@dataclass(frozen=True)
class Stream:
    """Bytes of a chunk, as they are stored.

    Args:
        data: the bytes.
        deflated: whether they are deflated.
    """

    data: bytes
    deflated: bool = False


def encode(bits: Bits, kind: Kind) -> list[Stream]:
    """Return the streams of a chunk.

    Args:
        bits: the entries of the chunk as unsigned integers.
        kind: the dtype of the weight.
    """
    sign = bits.dtype.type(1 << (8 * kind.bytes - 1))
    mask = (bits & ~sign if kind.signed_zero else bits) != 0
    kept = bits[np.flatnonzero(mask)]
    zeros = bits[np.flatnonzero(~mask)] != 0
    rotated = (kept << 1) | (kept >> (8 * kind.bytes - 1))
    planes = rotated.view(np.uint8).reshape(-1, kind.bytes)
    return [
        _deflated(b"" if mask.all() else _packed(mask)),
        _deflated(_packed(zeros) if zeros.any() else b""),
        *(_deflated(planes[:, byte].tobytes()) for byte in reversed(range(kind.bytes))),
    ]


def decode(streams: list[Stream], entries: int, kind: Kind) -> Bits:
    """Return the entries of a chunk, as unsigned integers: the inverse of `encode`.

    Raises:
        zlib.error, ValueError: the streams are not those of a chunk of so many entries.
    """
    mask = decode_mask(streams[0], entries)
    count = int(np.count_nonzero(mask))
    rotated = np.zeros(count, kind.bits)
    for byte, stream in zip(reversed(range(kind.bytes)), streams[2:], strict=True):
        rotated |= _inflated(stream, count).astype(kind.bits) << (8 * byte)
    kept = (rotated >> 1) | (rotated << (8 * kind.bytes - 1))
    if count == entries:
        return kept
    bits = np.zeros(entries, kind.bits)
    # Not `bits[mask] = kept`: the result is the same, but it takes four times as long.
    bits[np.flatnonzero(mask)] = kept
    if streams[1].data:
        signs = _unpacked(_inflated(streams[1], -(-(entries - count) // 8)), entries - count)
        bits[np.flatnonzero(~mask)] = signs.astype(kind.bits) << (8 * kind.bytes - 1)
    return bits


def decode_mask(stream: Stream, entries: int) -> Mask:
    """Return the mask of a chunk, True = kept, from its first stream.

    Raises:
        zlib.error, ValueError: the stream is not that of a mask of so many entries.
    """
    if not stream.data:
        return np.ones(entries, np.bool_)
    return _unpacked(_inflated(stream, -(-entries // 8)), entries)


def _packed(flags: Mask) -> bytes:
    return np.packbits(flags, bitorder="little").tobytes()


def _unpacked(packed: Bits, count: int) -> Mask:
    return np.unpackbits(packed, count=count, bitorder="little").view(np.bool_)


def _deflated(data: bytes) -> Stream:
    """Return a stream, deflated if that is worth it.

    Bytes of exponents and of masks hardly repeat, so a Huffman code alone is as short as what deflate finds at any
    level, and both are made and read faster.
    """
    short = _deflate(data, 1, zlib.Z_HUFFMAN_ONLY)
    if len(short) < _REPEATS * len(data):
        short = min(short, _deflate(data, 6, zlib.Z_DEFAULT_STRATEGY), key=len)
    return Stream(short, True) if len(short) < _WORTH * len(data) else Stream(data)


def _deflate(data: bytes, level: int, strategy: int) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, _RAW_DEFLATE, 9, strategy)
    return packer.compress(data) + packer.flush()


def _inflated(stream: Stream, expected: int) -> Bits:
    data = stream.data
    if stream.deflated:
        # A limit, so that a damaged stream does not fill the memory.
        data = zlib.decompressobj(_RAW_DEFLATE).decompress(data, expected + 1)
    if len(data) != expected:
        raise ValueError(f"a stream has {len(data)} bytes, where {expected} were expected")
    return np.frombuffer(data, np.uint8)
