"""Reads and writes masks: the mask of a weight is True where the weight is not zero."""

import hashlib
import math

import torch
from torch import Tensor


def mask_of(weight: Tensor) -> Tensor:
    """Return the mask of `weight`, of its shape: True = kept, False where `weight` is zero."""
    # Not `weight != 0`: the result is the same, but it takes ten times as long on CPUs.
    return weight.bool()


def count_kept(weight: Tensor) -> Tensor:
    """Return the number of entries of `weight`, or of a mask, that are not zero, as a tensor without dimensions."""
    # Not `mask_of(weight).sum()`: the result is the same, but it takes twenty times as long on CPUs.
    return torch.count_nonzero(weight)


def sparsity_of(weight: Tensor) -> float:
    """Return the fraction of entries of `weight`, or of a mask, that are zero. The host waits for the device."""
    return 1 - int(count_kept(weight)) / weight.numel()


def mask_(values: Tensor, weight: Tensor) -> Tensor:
    """Set `values` to zero where `weight`, of the same shape, is zero, and return them. In place.

    Autograd does not record this.
    """
    if torch.compiler.is_compiling():
        # The operation below does not know symbolic sizes, and a compiler fuses this one.
        return values.masked_fill_(weight == 0, 0)
    # This operation needs one vectorised pass and no mask in memory. `masked_fill_` and a product with a mask take 2
    # to 20 times as long on CPUs.
    return torch.ops.aten.hardshrink_backward.grad_input(values, weight, 0, grad_input=values)


_GATHER_BITS = sum(1 << (56 - 7 * i) for i in range(8))


def pack(mask: Tensor) -> Tensor:
    """Return `mask` as bytes. Each byte holds eight entries, the first in its lowest bit. Zeros fill the last byte."""
    flat = mask.reshape(-1).view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    # Eight bytes of 0 or 1 make one integer. The product moves byte i to bit 56 + i, and no other byte above bit 55.
    return ((flat.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask of shape `shape` that `pack` turned into `packed`."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: math.prod(shape)].view(shape).bool()


def fingerprint(mask: Tensor) -> str:
    """Return a short text that identifies `mask` (out, in): its shape, its number of pruned entries and its hash.

    It does not depend on the device or on the memory layout of `mask`.
    """
    rows, columns = mask.shape
    digest = hashlib.blake2b(pack(mask).cpu().numpy().tobytes(), digest_size=8).hexdigest()
    return f"{rows}x{columns}:{mask.numel() - int(count_kept(mask))}:{digest}"


def sparsity_of_fingerprint(proof: str) -> float:
    """Return the fraction of pruned entries that a `fingerprint` states, or the first of a `fingerprint_of`."""
    shape, pruned, _ = proof.partition(";")[0].split(":")
    rows, columns = shape.split("x")
    return int(pruned) / (int(rows) * int(columns))


# Fingerprints in state dicts are padded to this length. Adapters that replace each other need equal shapes.
PROOF_BYTES = 160


def fingerprint_of(weight: Tensor) -> str:
    """Return the fingerprint of the zeros of `weight` (..., out, in), and those of its casts where these have more.

    A cast to half precision turns very small numbers into zeros. The fingerprint of each cast with more zeros is
    added, so that an adapter that was trained on `weight` is also recognised on the cast weight.
    """
    matrix = weight.reshape(-1, weight.shape[-1])
    found, kept = fingerprint(mask_of(matrix)), count_kept(matrix)
    # The smallest numbers of float16 are larger than those of bfloat16, so it loses entries first.
    for dtype in (torch.float16, torch.bfloat16):
        if weight.dtype in (dtype, torch.float16):
            break
        cast = matrix.to(dtype)
        if torch.equal(count_kept(cast), kept):
            break
        found += f";{fingerprint(mask_of(cast))}"
    return found


def underflowed(expected: str, weight: Tensor) -> int | None:
    """Return how many entries of `weight` a cast turned into zeros, or None if `expected` is of another mask.

    Args:
        expected: a result of `fingerprint_of`.
        weight: the weight (..., out, in) that `expected` was computed of, or a cast of it: then the result may be > 0.
    """
    found = fingerprint(mask_of(weight.reshape(-1, weight.shape[-1])))
    known = expected.split(";")
    return _pruned(found) - _pruned(known[0]) if found in known else None


def _pruned(proof: str) -> int:
    return int(proof.split(":")[1])


def encode_proof(proof: str) -> Tensor:
    """Return a fingerprint as bytes (PROOF_BYTES,), for a state dict. The empty text gives zeros."""
    return torch.tensor(list(proof.encode().ljust(PROOF_BYTES, b"\0")), dtype=torch.uint8)


def decode_proof(encoded: Tensor) -> str:
    """Return the fingerprint that `encode_proof` turned into bytes."""
    return bytes(encoded.tolist()).rstrip(b"\0").decode()
