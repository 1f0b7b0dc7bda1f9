r"""The effective weight, and dA and dB from G, computed in several ways: microseconds and relative errors.

    python benchmarks/fused_variants.py --output benchmarks/results/fused-variants-h200.json
    python benchmarks/fused_variants.py --shapes 576x576 1536x576 576x1536 2048x2048 \
        --output benchmarks/results/fused-variants-cpu.json

The ways are PyTorch's operations, the formula under `torch.compile` with dynamic shapes, and the Triton kernels with
several tiles, if there is a GPU. W and G are in bfloat16 on a GPU and in float32 on a CPU, A and B in float32, and the
rank is 16. The time is the median of 20 calls on three sets of inputs in turn: of the GPU by events, or of the thread.
The errors are relative to float64. TB/s count W and its result, or G and W, once each.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_sparse import environment
from peft_sparse.tuners import fused

from common import DEVICE, parser, write_json


DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Way = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def inputs(rows: int, columns: int, rank: int = 16) -> Inputs:
    """Return W, A, B and G."""
    weight = torch.randn(rows, columns, device=DEVICE).mul_(0.02)
    weight.masked_fill_(torch.rand_like(weight) < 0.5, 0)
    A, B = torch.randn(rank, columns, device=DEVICE) * 0.05, torch.randn(rows, rank, device=DEVICE) * 0.01
    return weight.to(DTYPE), A, B, (torch.randn(rows, columns, device=DEVICE) * 1e-3).to(DTYPE)


def microseconds(way: Way, sets: list[Inputs], repeats: int = 20) -> float:
    for some in sets:
        way(*some)
    events: list[tuple[Any, Any]] = []
    seconds: list[float] = []
    for some in itertools.islice(itertools.cycle(sets), repeats):
        before = time.thread_time()
        if DEVICE == "cuda":
            events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            events[-1][0].record()
        way(*some)
        if DEVICE == "cuda":
            events[-1][1].record()
        seconds.append(time.thread_time() - before)
    if not events:
        return 1e6 * statistics.median(seconds)
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events)


@torch.compile(dynamic=True)
def compiled_weight(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.where(W != 0, W.to(A.dtype) + 2.0 * (B @ A), 0).to(W.dtype)


@torch.compile(dynamic=True)
def compiled_gradients(G: Tensor, W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    masked = torch.where(W != 0, G, 0).to(A.dtype)
    return 2.0 * (B.T @ masked), 2.0 * (masked @ A.T)


def kernel(name: str, tile: tuple[int, int], warps: int, split: bool = True) -> Way:
    from peft_sparse.tuners import triton_kernels

    module: Any = triton_kernels

    def weight(W: Tensor, A: Tensor, B: Tensor, G: Tensor) -> Tensor:
        module.TILE, module.WARPS = tile, warps
        return fused.effective_weight(W, A, B, True, 1.0, 2.0)

    def gradients(W: Tensor, A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        module.GRADIENT_TILE, module.GRADIENT_WARPS, module.SPLIT = tile, warps, split
        return fused.masked_gradients(G, W, A, B, True, 2.0)

    return weight if name == "effective weight" else gradients


def ways() -> Iterator[tuple[str, dict[str, Any], Way]]:
    plain: Any = fused
    weight, gradients = "effective weight", "dA and dB from G"
    yield weight, {"way": "operations"}, lambda W, A, B, G: plain.plain_effective_weight(W, A, B, True, 1.0, 2.0)
    yield weight, {"way": "torch.compile"}, lambda W, A, B, G: compiled_weight(W, A, B)
    yield gradients, {"way": "operations"}, lambda W, A, B, G: plain.plain_masked_gradients(G, W, A, B, True, 2.0)
    yield gradients, {"way": "torch.compile"}, lambda W, A, B, G: compiled_gradients(G, W, A, B)
    if not fused.has_kernels(torch.device(DEVICE)):
        return
    for tile, warps in itertools.product([(64, 64), (64, 128), (32, 128), (128, 128)], [4, 8]):
        yield weight, {"way": "kernel", "tile": tile, "warps": warps}, kernel(weight, tile, warps)
    for tile, warps, split in itertools.product([(64, 64), (64, 128), (32, 128), (64, 256)], [4, 8], [True, False]):
        described = {"way": "kernel", "tile": tile, "warps": warps, "precision": "split" if split else "tf32x3"}
        yield gradients, described, kernel(gradients, tile, warps, split)


def relative_error(found: Any, exact: Any) -> float:
    pairs = [(found, exact)] if isinstance(found, Tensor) else list(zip(found, exact, strict=True))
    return max(float((one.double() - other).norm() / other.norm()) for one, other in pairs)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"])
    options.add_argument("--output", type=Path)
    arguments = options.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        sets = [inputs(*map(int, shape.split("x"))) for _ in range(3)]
        W, A, B, G = (t.double() for t in sets[0])
        plain: Any = fused
        exact = {"effective weight": plain.plain_effective_weight(W, A, B, True, 1.0, 2.0)}
        exact["dA and dB from G"] = plain.plain_masked_gradients(G, W, A, B, True, 2.0)
        for part, described, way in ways():
            taken = microseconds(way, sets)
            rate = 2 * W.numel() * sets[0][0].element_size() / taken / 1e6
            error = relative_error(way(*sets[0]), exact[part])
            rows.append(
                {"shape": shape, "part": part, **described, "microseconds": taken, "TB/s": rate, "error": error}
            )
            print(rows[-1], flush=True)
    if arguments.output:
        write_json(arguments.output, {"dtype": str(DTYPE), "seed": 0, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
