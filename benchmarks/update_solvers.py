"""Error and operations of three solvers of the least-squares update, on weights of one block after swaps.

    python benchmarks/update_solvers.py --output benchmarks/results/update-solvers-smollm2-cpu.json

The solvers are `masked_least_squares` at several tolerances, one factorisation for each row in float64, which is the
exact solution, and raPDHG of MPAX (`pip install mpax`; left out if it is not installed). OPTIMA (arXiv:2512.13886)
calls raPDHG. As in its code, an equation w_j = 0 is a box of width 1e-4, both tolerances are equal, and H = XᵀX is
divided by the number of tokens. Its default tolerance is 1e-2. Afterwards pruned entries are set to zero here.

The model is SmolLM2-135M-Instruct from PyPI. The mask is Wanda's at 50 % after swaps. The first rows of each weight
are solved, without damping, so that all solvers minimise the same. A row of the result says how far the error lies
above the exact one, in total over these rows, and how many operations a row took: 2 in² for each product with H, and
k³ / 3 for the factorisation of a row with k kept entries. raPDHG is counted with one product for each iteration, which
is the least that it can take. It is MPAX at its defaults, called as OPTIMA's code does; it is not OPTIMA itself.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import Unstructured, prune, sample_sequences
from peft_sparse.pruning import least_squares, one_weight
from peft_sparse.pruning.rows import row_error

from common import Rows, add_text_arguments, described, documents, parser, smollm2_dir


TOLERANCES = {"conjugate gradients": (5e-4, 1e-5), "raPDHG": (1e-2, 1e-3, 1e-4)}


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    train, text = documents(args)
    calibration = sample_sequences(train, tokenizer, 64, 128, args.seed)
    settings = described(args, train, text, calibration, calibration[:0])
    rows = Rows(args.output, settings | {"block": args.block, "rows_of_each": args.rows})
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir())
    for name, (weight, mask, hessian) in problems(model, calibration, args.block).items():
        if name.endswith(("k_proj", "v_proj", "gate_proj")):
            continue
        W, M, H = weight[: args.rows], mask[: args.rows], hessian
        best = total(W, exact(W, M, H), H)
        shared = {"weight": name, "in": W.shape[1], "start_above_exact": total(W, W * M, H) / best - 1}
        kept = M.sum(1).double()
        rows.add(shared | {"solver": "Cholesky", "operations": float((kept**3 / 3).mean()), "above_exact": 0.0})
        solvers = {"conjugate gradients": conjugate_gradients}
        if importlib.util.find_spec("mpax"):
            solvers["raPDHG"] = primal_dual
        for solver, solve in solvers.items():
            for tolerance in TOLERANCES[solver]:
                solution, iterations = solve(W, M, H, tolerance, calibration.numel())
                found = {"solver": solver, "tolerance": tolerance, "iterations": iterations}
                above = total(W, solution, H) / best - 1
                rows.add(shared | found | {"operations": iterations * 2 * W.shape[1] ** 2, "above_exact": above})


def problems(model: Any, calibration: Tensor, block: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return W, the mask and XᵀX of every weight of a block, as `prune` hands them to the update."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    updated = one_weight.updated

    def spy(update: Any, matrix: Tensor, mask: Tensor, statistics: Any, start: Tensor | None) -> Tensor:
        found.append((matrix.clone(), mask.clone(), statistics.hessian.clone()))
        return updated(update, matrix, mask, statistics, start)

    options: dict[str, Any] = {"criterion": "wanda", "refinement": "swap", "update": True, "batch_size": 8}
    with mock.patch.object(one_weight, "updated", spy):
        report = prune(model, Unstructured(0.5), calibration, target_modules=rf".*layers\.{block}\..*", **options)
    return {weight.name: problem for weight, problem in zip(report.weights, found, strict=True)}


def total(weight: Tensor, solution: Tensor, hessian: Tensor) -> float:
    return float(row_error(weight.double(), solution.double(), hessian.double()).sum())


def exact(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Return the solution of each row in float64."""
    H, solution = hessian.double(), torch.zeros_like(weight, dtype=torch.float64)
    for row, w, kept in zip(solution, weight.double(), mask, strict=True):
        factor = torch.linalg.cholesky(H[kept][:, kept])
        row[kept] = torch.cholesky_solve((H[kept] @ w)[:, None], factor)[:, 0]
    return solution


def conjugate_gradients(
    weight: Tensor, mask: Tensor, hessian: Tensor, tolerance: float, tokens: int
) -> tuple[Tensor, float]:
    """Return the solution and the number of products with H."""
    with mock.patch.object(torch, "addmm", wraps=torch.addmm) as product:
        options: dict[str, Any] = {"damping": 0.0, "tolerance": tolerance}
        solution = least_squares.masked_least_squares(weight, mask, hessian, **options)
    return solution, product.call_count


def primal_dual(weight: Tensor, mask: Tensor, hessian: Tensor, tolerance: float, tokens: int) -> tuple[Tensor, float]:
    """Return the solution of raPDHG and its mean number of iterations."""
    import jax
    from mpax import create_qp, raPDHG

    columns = weight.shape[1]
    lower = weight.neg().masked_fill(mask, -torch.inf).numpy()
    upper = (1e-4 - weight).masked_fill(mask, torch.inf).numpy()
    Q, zeros, bound = (hessian / tokens).numpy(), torch.zeros(1, columns).numpy(), torch.full((1,), -1e5).numpy()

    def solve(low: Any, high: Any) -> tuple[Any, Any]:
        ones, zero = torch.ones(1, columns).numpy(), torch.zeros(1).numpy()
        problem = create_qp(Q, zeros[0], zeros, zero, ones, bound, low, high, use_sparse_matrix=False)
        solver = raPDHG(eps_abs=tolerance, eps_rel=tolerance, verbose=False, iteration_limit=100_000)
        result = solver.optimize(problem)
        return result.primal_solution, result.iteration_count

    change, iterations = jax.vmap(solve)(lower, upper)
    return (weight + torch.tensor(change.tolist())) * mask, float(iterations.mean())


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    add_text_arguments(options)
    options.add_argument("--block", type=int, default=0)
    options.add_argument("--rows", type=int, default=16, help="rows of each weight")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, required=True)
    return options.parse_args()


if __name__ == "__main__":
    main()
