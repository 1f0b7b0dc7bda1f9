"""The tensors of any checkpoint, and their masks, read in pieces: of safetensors, packed ones, and PyTorch's files."""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .codec import KINDS, Mask
from .packed_file import MARK, PackedFile
from .tensor_files import Entry, TensorFile


_PIECE = 1 << 22
_NAMES = {kind.dtype: name for name, kind in KINDS.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Args:
        name: its name.
        dtype: its dtype, as safetensors writes it. That of a packed weight is the one it had.
        shape: its shape, likewise.
        masks: yields its mask in pieces, True = kept. None for dtypes without one, such as integers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    masks: Callable[[], Iterator[Mask]] | None


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a file. Their masks can be read until the next one is asked for.

    Args:
        path: a safetensors file, which may be packed, or a file that `torch.save` wrote.

    Raises:
        ValueError: the file is damaged, or of another kind.
        pickle.UnpicklingError: a file of `torch.save` holds more than tensors. Nothing of it was run.
    """
    if path.suffix != ".safetensors":
        is_zip = zipfile.is_zipfile(path)
        with path.open("rb") as file:
            first = file.read(1)
        # A file of the older format is a pickle, which begins with this byte.
        if not is_zip and first != b"\x80":
            raise ValueError(
                f"Expected {path.name!r} to be a safetensors file, or one that `torch.save` wrote, got another file. "
                "Give the folder of a saved model or adapter."
            )
        # Nothing but tensors is read, and these only where they are looked at, which the older format does not allow.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                yield _of_tensor(name, tensor)
        return
    with TensorFile(path) as file:
        if MARK not in file.metadata:
            for entry in file.entries.values():
                yield _of_file(file, entry)
            return
    with PackedFile(path) as packed:
        for name, entry in packed.plain.items():
            weight = packed.weight(name)
            if weight is None:
                yield _of_file(packed, packed.entries[name])
            else:
                is_float = KINDS[entry.dtype].signed_zero
                yield StoredTensor(name, entry.dtype, entry.shape, weight.masks if is_float else None)


def _of_file(file: TensorFile, entry: Entry) -> StoredTensor:
    kind = KINDS.get(entry.dtype)
    masks = None
    if kind is not None and kind.signed_zero:
        # Without the sign, a negative zero is zero.
        masks = lambda: (np.frombuffer(piece, kind.bits) << 1 != 0 for piece in file.pieces(entry))  # noqa: E731
    return StoredTensor(entry.name, entry.dtype, entry.shape, masks)


def _of_tensor(name: str, tensor: Tensor) -> StoredTensor:
    dtype = _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    flat = tensor.reshape(-1)
    masks = None
    if tensor.is_floating_point():
        masks = lambda: (piece.bool().numpy() for piece in flat.split(_PIECE))  # noqa: E731
    return StoredTensor(name, dtype, tuple(tensor.shape), masks)
