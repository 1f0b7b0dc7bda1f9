"""Time and layer error of pruning one matrix, against the loops that published code runs.

    python benchmarks/pruning.py --output benchmarks/results/pruning-matrices-cpu.json
    python benchmarks/pruning.py --model --output benchmarks/results/pruning-smollm2-cpu.json
    python benchmarks/pruning.py --beside --shapes 4096x4096 4096x14336 --output benchmarks/results/pruning-h100.json

The steps are the selection of n of every m scores, Wanda's scores with their selection per row, and SparseGPT. The
default shapes are those of SmolLM2-135M and of a 7B model's MLP. The published side is written from the papers and
keeps the structure of the published loops: `topk` per group of columns, a full sort of every row, and for SparseGPT
three dense n³ steps before one rank-1 update per column. Each round runs both sides in turn. A ratio compares the two
sides of one round, so a machine that becomes slower slows both. `--beside` adds two steps that start from Wanda's mask
and have no published side: the swaps and the least-squares update.

With `--model`, the script measures whole runs on the first blocks of SmolLM2-135M-Instruct: `prune` with its defaults
against the published loop, which runs every block twice, with a hook on every layer. Both take one sequence at a time.
The first round is not timed.

The inputs X = (C; σI) are correlated, and their spectrum decays: row i of the random matrix C is scaled by i^-1/2, and
every column by a log-normal number. The layer error is ||(W - W') X^T||² / ||W X^T||². Everything is float32.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import environment, prune, sample_sequences
from peft_sparse.pruning.least_squares import masked_least_squares
from peft_sparse.pruning.patterns import Pattern, SemiStructured, Unstructured, select
from peft_sparse.pruning.sparsegpt import sparsegpt
from peft_sparse.pruning.swap import swap

from common import DEVICE, parser, python_documents, seconds_of, smollm2_dir, write_json


SHAPES = [(576, 576), (1536, 576), (576, 1536), (4096, 11008)]

HALF, TWO_OF_FOUR, FOUR_OF_EIGHT = Unstructured(0.5), SemiStructured(2, 4), SemiStructured(4, 8)


@dataclass
class Layer:
    """A weight W (out, in) and its inputs X = (C; noise · I)."""

    weight: Tensor
    C: Tensor
    noise: float

    @property
    def hessian(self) -> Tensor:
        hessian = self.C.T @ self.C
        hessian.diagonal().add_(self.noise**2)
        return hessian

    def power(self, weight: Tensor) -> float:
        """Return ||weight X^T||²."""
        squares = (weight @ self.C.T).square().sum() + self.noise**2 * weight.square().sum()
        return squares.item()

    def error(self, pruned: Tensor) -> float:
        return self.power(self.weight - pruned) / self.power(self.weight)


def random_layer(rows: int, columns: int) -> Layer:
    components = min(columns, 2048)
    decay = torch.arange(1, components + 1, device=DEVICE)[:, None] ** -0.5
    scale = torch.randn(columns, device=DEVICE).mul(0.5).exp()
    C = torch.randn(components, columns, device=DEVICE) * decay * scale
    return Layer(torch.randn(rows, columns, device=DEVICE), C, noise=0.1)


def published_groups(scores: Tensor, pattern: SemiStructured) -> Tensor:
    """Return the mask that keeps n of every m scores, by one `topk` per group of columns."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], pattern.m):
        group = scores[:, start : start + pattern.m]
        lowest = torch.topk(group, pattern.m - pattern.n, dim=1, largest=False).indices
        mask.scatter_(1, start + lowest, False)
    return mask


def published_rows(scores: Tensor, pattern: Unstructured) -> Tensor:
    """Return the mask that keeps the highest scores of every row, by a stable sort and a scatter."""
    order = torch.sort(scores, dim=1, stable=True).indices
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(1, order[:, : int(scores.shape[1] * pattern.sparsity)], False)


def published_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Return the upper U in H^-1 = U^T U, by a factorisation, an inverse, and another factorisation."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def published_sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern, block_size: int = 128) -> Tensor:
    """Return SparseGPT's weight. Each column of a block is followed by a rank-1 update of the rest of the block."""
    W, U = weight.clone(), published_factor(hessian)
    for start in range(0, W.shape[1], block_size):
        stop = min(start + block_size, W.shape[1])
        block, U_block = W[:, start:stop].clone(), U[start:stop, start:stop]
        errors, updated = torch.zeros_like(block), torch.zeros_like(block)
        prune = torch.zeros_like(block, dtype=torch.bool)
        if isinstance(pattern, Unstructured):
            scores = block**2 / U_block.diagonal()[None] ** 2
            prune = scores <= scores.flatten().sort().values[int(scores.numel() * pattern.sparsity)]
        for j in range(stop - start):
            if isinstance(pattern, SemiStructured) and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                scores = block[:, group] ** 2 / U_block.diagonal()[None, group] ** 2
                lowest = torch.topk(scores, pattern.m - pattern.n, dim=1, largest=False).indices
                prune.scatter_(1, j + lowest, True)
            w = block[:, j]
            q = w.clone()
            q[prune[:, j]] = 0
            updated[:, j] = q
            error = (w - q) / U_block[j, j]
            block[:, j:] -= error[:, None] @ U_block[j, j:][None]
            errors[:, j] = error
        W[:, start:stop] = updated
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W


Step = Callable[[], Tensor]


def steps(layer: Layer) -> dict[str, tuple[Step, Step]]:
    """Return our way and the published way to prune the weight of `layer`, by name."""
    W, hessian = layer.weight, layer.hessian
    magnitude, input_norm = W.abs(), hessian.diagonal().sqrt()
    return {
        "2:4 selection": (
            lambda: select(magnitude, TWO_OF_FOUR, "row"),
            lambda: published_groups(magnitude, TWO_OF_FOUR),
        ),
        "4:8 selection": (
            lambda: select(magnitude, FOUR_OF_EIGHT, "row"),
            lambda: published_groups(magnitude, FOUR_OF_EIGHT),
        ),
        "Wanda, 50 %": (
            lambda: select(W.abs() * input_norm, HALF, "row"),
            lambda: published_rows(W.abs() * input_norm, HALF),
        ),
        "Wanda, 2:4": (
            lambda: select(W.abs() * input_norm, TWO_OF_FOUR, "row"),
            lambda: published_groups(W.abs() * input_norm, TWO_OF_FOUR),
        ),
        "SparseGPT, 50 %": (
            lambda: sparsegpt(W, hessian, HALF)[0],
            lambda: published_sparsegpt(W, hessian, HALF),
        ),
        "SparseGPT, 2:4": (
            lambda: sparsegpt(W, hessian, TWO_OF_FOUR)[0],
            lambda: published_sparsegpt(W, hessian, TWO_OF_FOUR),
        ),
    }


def steps_beside(layer: Layer) -> dict[str, tuple[Step]]:
    """Return the steps that may follow a criterion, by name. They start from Wanda's mask of half of each row."""
    W, hessian = layer.weight, layer.hessian
    mask = select(W.abs() * hessian.diagonal().sqrt(), HALF, "row")
    return {
        "update after Wanda, 50 %": (lambda: masked_least_squares(W, mask, hessian),),
        "swaps after Wanda, 50 %": (lambda: swap(W, mask, hessian, HALF)[0],),
    }


def measure(name: str, layer: Layer, sides: tuple[Step] | tuple[Step, Step], rounds: int) -> dict[str, Any]:
    """Return the median times and the layer errors of one side or both, and the median ratio of their times."""
    seconds: list[list[float]] = [[] for _ in sides]
    errors = []
    for round_ in range(rounds):
        for side, step in enumerate(sides):
            if rounds > 1 and round_ == 0:
                step()
            spent, result = seconds_of(step)
            seconds[side].append(spent)
            if round_ == 0:
                errors.append(layer.error(layer.weight * result if result.dtype == torch.bool else result))
    ours = {"seconds": statistics.median(seconds[0]), "error": errors[0]}
    row = {"shape": tuple(layer.weight.shape), "step": name, "rounds": rounds, **ours}
    if len(sides) == 2:
        row["published_seconds"] = statistics.median(seconds[1])
        row["times_faster"] = statistics.median(p / o for o, p in zip(*seconds, strict=True))
        row["published_error"] = errors[1]
    return row


def measure_matrices(arguments: argparse.Namespace, write: Callable[[list[dict[str, Any]]], None]) -> None:
    """Measure every step at every shape. `write` is called after each step, with all rows that are measured."""
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        layer = random_layer(*shape)
        wanted: dict[str, Any] = steps(layer) | (steps_beside(layer) if arguments.beside else {})
        for name, sides in tqdm(wanted.items(), desc=f"{shape[0]} x {shape[1]}", unit="step"):
            rounds = arguments.large_rounds if max(shape) > 8192 else arguments.rounds
            rows.append(measure(name, layer, sides, rounds))
            write(rows)
    print_matrices(rows)


def print_matrices(rows: list[dict[str, Any]]) -> None:
    print("\n| matrix | step | time | published loop | times faster | layer error | published |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        cells = [f"{row['shape'][0]} x {row['shape'][1]}", row["step"], f"{row['seconds'] * 1e3:.1f} ms"]
        if "published_seconds" in row:
            cells += [f"{row['published_seconds'] * 1e3:.1f} ms", f"{row['times_faster']:.2f}", f"{row['error']:.5f}"]
            cells += [f"{row['published_error']:.5f}"]
        else:
            cells += ["", "", f"{row['error']:.5f}", ""]
        print("|", " | ".join(cells), "|")


@torch.no_grad()
def published_run(model: Any, tokens: Tensor, criterion: str) -> None:
    """Prune half of every weight of the blocks, one after the other."""
    hidden = [model.model.embed_tokens(row[None]) for row in tokens]
    rotary = model.model.rotary_emb(hidden[0], torch.arange(tokens.shape[1])[None])
    call = {"position_embeddings": rotary, "attention_mask": None}
    for block in model.model.layers:
        layers = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        sums = {
            name: torch.zeros(m.in_features, m.in_features) if criterion == "sparsegpt" else torch.zeros(m.in_features)
            for name, m in layers.items()
        }
        hooks = [m.register_forward_hook(published_hook(sums[name], len(tokens))) for name, m in layers.items()]
        for x in hidden:
            block(x, **call)
        for hook in hooks:
            hook.remove()
        for name, m in layers.items():
            if criterion == "sparsegpt":
                m.weight.copy_(published_sparsegpt(m.weight, sums[name], HALF))
            else:
                m.weight[~published_rows(m.weight.abs() * sums[name].sqrt(), HALF)] = 0
        hidden = [block(x, **call) for x in hidden]


def published_hook(total: Tensor, count: int) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].flatten(0, -2).T
        total.add_(x @ x.T if total.dim() == 2 else torch.norm(x, p=2, dim=1) ** 2, alpha=1 / count)

    return hook


def measure_model(rounds: int, blocks: int, sequences: int, length: int) -> list[dict[str, Any]]:
    """Return the time of both sides on the first blocks, and the relative error of the outputs of the last of them."""
    dense = AutoModelForCausalLM.from_pretrained(smollm2_dir())
    dense.model.layers = dense.model.layers[:blocks]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    tokens = sample_sequences(python_documents()[0], tokenizer, sequences, length)
    with torch.no_grad():
        target = dense.model(tokens).last_hidden_state
    rows = []
    for criterion in ("wanda", "sparsegpt"):
        seconds: tuple[list[float], list[float]] = ([], [])
        errors: list[float] = []
        for round_ in range(rounds + 1):
            for side in (0, 1):
                model = copy.deepcopy(dense)
                started = time.perf_counter()
                if side == 0:
                    prune(model, 0.5, criterion=criterion, calibration=tokens)
                else:
                    published_run(model, tokens, criterion)
                if round_:
                    seconds[side].append(time.perf_counter() - started)
                else:
                    with torch.no_grad():
                        difference = model.model(tokens).last_hidden_state - target
                    errors.append((difference.norm() / target.norm()).item())
        ours, published = seconds
        rows.append(
            {
                "criterion": criterion,
                "seconds": statistics.median(ours),
                "published_seconds": statistics.median(published),
                "times_faster": statistics.median(p / o for o, p in zip(ours, published, strict=True)),
                "error": errors[0],
                "published_error": errors[1],
            }
        )
        print(rows[-1], flush=True)
    return rows


def shape_of(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", action="store_true", help="whole runs instead of single matrices")
    options.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, help="out x in, such as 4096x14336")
    options.add_argument("--beside", action="store_true", help="measure the swaps and the update too")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--large-rounds", type=int, default=1, help="of matrices with a side longer than 8192")
    options.add_argument("--output", type=Path)
    arguments = options.parse_args()
    torch.manual_seed(0)
    settings: dict[str, Any] = {"rounds": arguments.rounds, "dtype": "torch.float32"}

    def write(rows: list[dict[str, Any]]) -> None:
        if arguments.output:
            result = {"settings": settings, "seed": 0, "rows": rows, "environment": environment()}
            write_json(arguments.output, result)

    if arguments.model:
        settings |= {"blocks": 4, "sequences": 16, "tokens_per_sequence": 256}
        write(measure_model(arguments.rounds, 4, 16, 256))
    else:
        settings["large_rounds"] = arguments.large_rounds
        measure_matrices(arguments, write)


if __name__ == "__main__":
    main()
