"""Bytes that operations read and write, counted from the sizes of their tensors.

`benchmarks/gpu.py` and `benchmarks/tuners.py` import this module.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_sparse.tuners import fused


class Traffic(TorchDispatchMode):
    """Sum up the bytes of the tensors that every operation within the context reads and writes.

    Each operation reads each of its inputs once and writes each result once. Views move nothing. What caches hold is
    counted as well, and partial sums inside of one operation are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        named = {argument.name: value for argument, value in zip(function._schema.arguments, args)}  # noqa: B905
        results = ("out", "grad_input")
        read = [t for name, value in (named | kwargs).items() if name not in results for t in tensors(value)]
        if function in ALLOCATIONS or (function.is_view):
            return result
        self.bytes += sum(size_of(t) for t in read) + sum(size_of(t) for t in tensors(result))
        return result


ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.detach.default}


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def size_of(tensor: Tensor) -> int:
    """Return the bytes of the entries of a tensor. Entries that `expand` repeats count once."""
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride else 1
    return entries * tensor.element_size()


def counted(step: Callable[[], Any]) -> int:
    with Traffic() as traffic:
        step()
    return traffic.bytes


def bytes_per_weight(size: int, rank: int, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Count the bytes per weight of the effective weight, and of dA and dB from G, for each way to compute them."""
    weight = torch.randn(size, size, device=device).masked_fill_(torch.rand(size, size, device=device) < 0.5, 0)
    weight, A, B = weight.to(dtype), torch.randn(rank, size, device=device), torch.randn(size, rank, device=device)
    G = torch.randn(size, size, device=device).to(dtype)
    published: dict[str, Callable[[], Any]] = {
        "effective weight": lambda: (weight + 2.0 * (B @ A).masked_fill(weight == 0, 0)).to(dtype),
        "dA and dB from G": lambda: (B.T @ (G * (weight != 0)).float(), (G * (weight != 0)).float() @ A.T),
    }
    ours: dict[str, Callable[[], Any]] = {
        "effective weight": lambda: fused.effective_weight(weight, A, B, True, 1.0, 2.0),
        "dA and dB from G": lambda: fused.masked_gradients(G.clone() if unfused else G, weight, A, B, True, 2.0),
    }
    for part in ours:
        yield {"part": part, "variant": "formula", "bytes_per_weight": counted(published[part]) / weight.numel()}
        before = os.environ.pop("PEFT_SPARSE_FUSED", None)
        for variant, unfused in (("kernels", False), ("operations", True)):
            if not unfused and not fused.has_kernels(weight.device):
                continue
            os.environ["PEFT_SPARSE_FUSED"] = str(int(not unfused))
            copied = 2 * G.element_size() if unfused and part != "effective weight" else 0
            found = counted(ours[part]) / weight.numel() - copied
            yield {"part": part, "variant": variant, "bytes_per_weight": found}
        os.environ.pop("PEFT_SPARSE_FUSED")
        if before is not None:
            os.environ["PEFT_SPARSE_FUSED"] = before
