"""The zeros of a weight are its mask, True = kept: only `mask_of` and `mask_` say what counts as a zero."""

import hashlib
import math

import torch
from torch import Tensor


def mask_of(weight: Tensor) -> Tensor:
    """Return the mask that the zeros of `weight` spell: True where kept, of the shape of `weight`."""
    # Not `weight != 0`, which says the same and takes ten times as long on CPUs.
    return weight.bool()


def mask_(values: Tensor, weight: Tensor) -> Tensor:
    """Write zeros into `values` where `weight`, of the same shape, is zero, and return them.

    Outside autograd, as are all operations with an output given.
    """
    # The one operation that selects by zeros in a single vectorised pass, without a mask in memory: `masked_fill_` and
    # multiplying by a mask take 2 to 20 times as long on CPUs.
    return torch.ops.aten.hardshrink_backward.grad_input(values, weight, 0, grad_input=values)


_GATHER_BITS = sum(1 << (56 - 7 * i) for i in range(8))


def pack(mask: Tensor) -> Tensor:
    """Return `mask` as bytes, eight entries each, lowest bit first, zero-padded at the end: 1/8 byte per entry."""
    flat = mask.reshape(-1).view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    # Eight bytes of 0 or 1 are one integer; the product moves byte i to bit 56 + i, with nothing else above bit 55.
    return ((flat.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask of `shape` that `pack` made `packed` from."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: math.prod(shape)].view(shape).bool()


def fingerprint(mask: Tensor) -> str:
    """Return a short proof of `mask` (out, in): shape, pruned entries and hash, the same on every device."""
    rows, columns = mask.shape
    digest = hashlib.blake2b(pack(mask).cpu().numpy().tobytes(), digest_size=8).hexdigest()
    return f"{rows}x{columns}:{mask.numel() - int(mask.sum())}:{digest}"


def sparsity_of_fingerprint(proof: str) -> float:
    """Return the fraction of pruned entries that a `fingerprint` tells."""
    shape, pruned, _ = proof.split(":")
    rows, columns = shape.split("x")
    return int(pruned) / (int(rows) * int(columns))
