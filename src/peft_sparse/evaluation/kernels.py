"""Measures whether sparse kernels are faster than dense ones, for the matrices of a model on this machine."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..model.blocks import prunable_weights
from ..model.environment import environment
from ..model.masks import sparsity_of
from .generation import synchronize
from .tables import markdown


# A ratio below this one is within what repeated runs differ by.
FASTER = 1.05


@dataclass(frozen=True)
class KernelTime:
    """One shape of matrix, with one number of tokens and one kernel.

    Args:
        shape: (out, in) of the matrix.
        matrices: how many matrices of the model have this shape.
        sparsity: the fraction of zeros of the matrix that was measured, the first of its shape.
        tokens: rows of the input: 1 when a model generates, more when it reads a prompt.
        dtype: the dtype of matrix and input.
        kernel: the sparse kernel. Empty if none exists for this matrix.
        dense: the median seconds of `torch.nn.functional.linear` with the dense matrix.
        sparse: the median seconds of the sparse kernel. None without a kernel.
        ratio: the median over the rounds of dense divided by sparse seconds. None without a kernel.
        missing: why no kernel exists.
    """

    shape: tuple[int, int]
    matrices: int
    sparsity: float
    tokens: int
    dtype: str
    kernel: str
    dense: float
    sparse: float | None
    ratio: float | None
    missing: str = ""

    @property
    def verdict(self) -> str:
        """What the ratio says: "1.42 times faster", "no faster" below a ratio of 1.05, or why there is no kernel."""
        if self.ratio is None:
            return f"no kernel: {self.missing}"
        return f"{self.ratio:.2f} times faster" if self.ratio >= FASTER else "no faster"


@dataclass(frozen=True)
class KernelReport:
    """Sparse kernels against dense ones. `str()` is a table in Markdown, with one line for each number of tokens.

    Args:
        rows: what was measured.
        environment: versions, hardware and threads.
    """

    rows: list[KernelTime]
    environment: dict[str, Any]

    def totals(self) -> dict[tuple[str, int], float]:
        """Return dense / sparse time of all matrices of the model together, by kernel and number of tokens.

        A kernel that lacks a shape has no total.
        """
        shapes = {row.shape for row in self.rows}
        found = {}
        for kernel, tokens in dict.fromkeys((row.kernel, row.tokens) for row in self.rows if row.kernel):
            own = [row for row in self.rows if (row.kernel, row.tokens) == (kernel, tokens)]
            if {row.shape for row in own} == shapes:
                sparse = sum(row.matrices * (row.sparse or 0) for row in own)
                found[kernel, tokens] = sum(row.matrices * row.dense for row in own) / sparse
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        rows = [{**vars(row), "shape": list(row.shape), "verdict": row.verdict} for row in self.rows]
        totals = [{"kernel": k, "tokens": t, "ratio": ratio} for (k, t), ratio in self.totals().items()]
        return {"rows": rows, "totals": totals, "environment": self.environment}

    def __str__(self) -> str:
        head = ["matrix", "number", "sparsity", "tokens", "dtype", "kernel", "dense µs", "sparse µs", "result"]
        body = []
        for row in self.rows:
            shape, sparse = (
                f"{row.shape[0]} x {row.shape[1]}",
                "" if row.sparse is None else f"{1e6 * row.sparse:,.1f}",
            )
            body.append([shape, str(row.matrices), f"{row.sparsity:.2f}", f"{row.tokens:,}", row.dtype, row.kernel])
            body[-1] += [f"{1e6 * row.dense:,.1f}", sparse, row.verdict]
        lines = [markdown(head, body), ""]
        for (kernel, tokens), ratio in self.totals().items():
            result = f"{ratio:.2f} times faster" if ratio >= FASTER else f"no faster ({ratio:.2f} times as fast)"
            number = "1 token" if tokens == 1 else f"{tokens:,} tokens"
            lines.append(f"All matrices with {kernel}, {number}: {result}.")
        return "\n".join(lines).rstrip()


@torch.no_grad()
def kernel_speed(
    model: nn.Module, *, tokens: Sequence[int] = (1, 512), rounds: int = 15, seed: int = 0
) -> KernelReport:
    """Return whether the sparse kernels of torch are faster than dense ones, for the matrices of a pruned model.

    The prunable weights are grouped by shape, and the first weight of each shape is measured, with the dtype and on
    the device that it has. Kernels:

    - CUDA, 2:4 sparsity, float16 or bfloat16, outputs a multiple of 32 and inputs of 64:
      `torch.sparse.to_sparse_semi_structured` (cuSPARSELt), if torch is built with it.
    - CUDA, any zeros: CSR (cuSPARSE).
    - CPU, any zeros, float32 or float64: CSR (MKL, or torch's own where it is built without MKL).

    Dense and sparse products take turns, and ratios are taken within a round. Only the products are timed: neither the
    rest of the model nor the conversion, which is done once. The model is not changed.

    Args:
        model: a pruned model. Of one with adapters, the base weights are measured.
        tokens: numbers of rows of the inputs: 1 for generation, more for a prompt.
        rounds: how many rounds are counted.
        seed: seed of the inputs.

    Raises:
        ValueError: `tokens` or `rounds` are below 1; the model has no prunable weights; one is not in memory.
    """
    if rounds < 1 or not tokens or min(tokens) < 1:
        raise ValueError(f"Expected `tokens` and `rounds` of 1 or more, got {list(tokens)} and {rounds}.")
    weights = prunable_weights(model)
    if absent := [name for name, weight in weights.items() if weight.storage.is_meta]:
        raise ValueError(f"The weight of {absent[0]!r} is not in memory. Load the model without offloading first.")
    numbers = Counter(weight.shape for weight in weights.values())
    rows: list[KernelTime] = []
    for shape, number in numbers.items():
        matrix = next(weight for weight in weights.values() if weight.shape == shape).matrix().contiguous()
        sparsity, dtype = sparsity_of(matrix), str(matrix.dtype).removeprefix("torch.")
        kernels = kernels_for(matrix)
        for count in tokens:
            generator = torch.Generator().manual_seed(seed)
            inputs = torch.randn(count, shape[1], generator=generator).to(matrix.device, matrix.dtype)
            for name, convert in kernels.items():
                common = (shape, number, sparsity, count, dtype)
                if isinstance(convert, str):
                    dense = statistics.median(_alternate([lambda: linear(inputs, matrix)], rounds, inputs.device)[0])  # noqa: B023
                    rows.append(KernelTime(*common, "", dense, None, None, convert))
                    continue
                rows.append(KernelTime(*common, name, *_times(matrix, inputs, convert, rounds)))
    return KernelReport(rows, {key: value for key, value in environment().items() if key != "command"})


def kernels_for(matrix: Tensor) -> dict[str, Any]:
    """Return what turns `matrix` (out, in) into the operand of each sparse kernel, by the name of the kernel.

    If there is no kernel, the value is the reason, a text.
    """
    if matrix.device.type == "cuda":
        found: dict[str, Any] = {"CSR (cuSPARSE)": _csr}
        halves = matrix.dtype in (torch.float16, torch.bfloat16) and torch.backends.cusparselt.is_available()
        if halves and _fits(matrix.shape) and is_two_of_four(matrix):
            found = {"semi-structured 2:4 (cuSPARSELt)": torch.sparse.to_sparse_semi_structured} | found
        return found
    if matrix.device.type == "cpu" and matrix.dtype in (torch.float32, torch.float64):
        return {"CSR (MKL)" if torch.backends.mkl.is_available() else "CSR (torch)": _csr}
    return {"": f"torch has none for {str(matrix.dtype).removeprefix('torch.')} on {matrix.device.type}"}


def _fits(shape: Sequence[int]) -> bool:
    """Return whether every version of torch takes this shape (out, in) as a semi-structured matrix of 16 bits."""
    return shape[0] % 32 == 0 and shape[1] % 64 == 0


def is_two_of_four(matrix: Tensor) -> bool:
    """Return whether of every 4 inputs in `matrix` (out, in) at most 2 are not zero."""
    if matrix.shape[1] % 4:
        return False
    return bool((matrix.bool().unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def _csr(matrix: Tensor) -> Tensor:
    return matrix.to_sparse_csr()


def _times(
    matrix: Tensor, inputs: Tensor, convert: Callable[[Tensor], Tensor], rounds: int
) -> tuple[float, float, float]:
    """Return (median dense seconds, median sparse seconds, median ratio)."""
    with warnings.catch_warnings():
        # torch calls both formats a prototype or beta on first use.
        warnings.simplefilter("ignore", UserWarning)
        operand = convert(matrix)
        dense, sparse = _alternate(
            [lambda: linear(inputs, matrix), lambda: linear(inputs, operand)], rounds, inputs.device
        )
    ratios = [a / b for a, b in zip(dense, sparse, strict=True)]
    return statistics.median(dense), statistics.median(sparse), statistics.median(ratios)


def _alternate(products: list[Callable[[], Any]], rounds: int, device: torch.device) -> list[list[float]]:
    """Return the seconds of one call of each product, for each round. In every round all of them take turns."""
    calls = [_calls(product, device) for product in products]
    times: list[list[float]] = [[] for _ in products]
    for _ in range(rounds):
        for own, product, count in zip(times, products, calls, strict=True):
            own.append(_seconds(product, count, device))
    return times


def _calls(product: Callable[[], Any], device: torch.device) -> int:
    """Return how many calls take about two milliseconds, so that the clock and the launch do not count."""
    _seconds(product, 3, device)
    return max(1, min(1000, round(0.002 / max(_seconds(product, 3, device), 1e-6))))


def _seconds(product: Callable[[], Any], calls: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        product()
    synchronize(device)
    return (time.perf_counter() - started) / calls
