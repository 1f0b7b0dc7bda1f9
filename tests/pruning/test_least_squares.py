"""Masked least squares against each row's own problem, solved by torch.linalg."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.pruning.least_squares import masked_least_squares
from peft_sparse.pruning.patterns import SemiStructured, Unstructured, select
from peft_sparse.pruning.sparsegpt import sparsegpt


EXACT = {"damping": 0.0, "tolerance": 0.0, "max_iterations": 500}


def problem(rows=6, columns=12, tokens=60, seed=0, pattern=None, dtype=torch.float64):
    """W, a mask, X and XᵀX, with inputs whose covariance has a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1)[:, None] ** -0.5
    X = (torch.randn(tokens, columns, generator=generator) @ mixing).to(dtype)
    W = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return W, select(W.abs(), pattern or Unstructured(0.5), "matrix"), X, X.T @ X


def by_rows(W, mask, X, ridge=0.0):
    """Each row's kept weights by torch.linalg.lstsq; λ||W' - W||² as one more row of inputs for each weight."""
    columns = W.shape[1]
    inputs = torch.cat([X, ridge**0.5 * torch.eye(columns, dtype=X.dtype)]) if ridge else X
    solution = torch.zeros_like(W)
    for row, kept in enumerate(mask):
        if kept.any():
            found = torch.linalg.lstsq(inputs[:, kept], (inputs @ W[row])[:, None], driver="gelsd").solution
            solution[row, kept] = found.squeeze(1)
    return solution


def error(W, solution, X, ridge=0.0):
    difference = solution - W
    return (X @ difference.T).square().sum() + ridge * difference.square().sum()


PATTERNS = [Unstructured(0.5), Unstructured(0.8), SemiStructured(2, 4), SemiStructured(1, 4), Unstructured(0.0)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_row_reaches_its_own_optimum(pattern):
    W, mask, X, H = problem(pattern=pattern)
    found = masked_least_squares(W, mask, H, **EXACT)
    torch.testing.assert_close(found, by_rows(W, mask, X), rtol=1e-6, atol=1e-8)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_damping_holds_the_weights_back(damping):
    W, mask, X, H = problem()
    found = masked_least_squares(W, mask, H, **EXACT | {"damping": damping})
    ridge = float(damping * H.diagonal().mean())
    torch.testing.assert_close(found, by_rows(W, mask, X, ridge), rtol=1e-6, atol=1e-8)
    assert error(W, found, X) > error(W, by_rows(W, mask, X), X)


def test_the_scale_of_the_hessian_does_not_matter():
    W, mask, _, H = problem(dtype=torch.float32)
    torch.testing.assert_close(masked_least_squares(W, mask, H), masked_least_squares(W, mask, H * 2.0**-20))


def test_the_default_stops_where_nothing_more_is_to_be_won():
    W, mask, X, H = problem(rows=32, columns=48, tokens=400, dtype=torch.float32)
    ridge = float(0.01 * H.diagonal().mean())
    found, best = masked_least_squares(W, mask, H), by_rows(W, mask, X, ridge)
    assert error(W, found, X, ridge) <= 1.001 * error(W, best, X, ridge)
    assert error(W, W * mask, X, ridge) > 1.2 * error(W, best, X, ridge)


def test_the_error_falls_with_every_iteration():
    W, mask, X, H = problem(columns=16)
    errors = [
        float(error(W, masked_least_squares(W, mask, H, **EXACT | {"max_iterations": count}), X))
        for count in range(12)
    ]
    assert errors[0] == pytest.approx(float(error(W, W * mask, X)))
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))


def test_sparsegpts_weights_are_no_better_on_their_own_mask():
    W, _, X, H = problem(rows=16, columns=32, tokens=200, dtype=torch.float32)
    updated, mask = sparsegpt(W, H, Unstructured(0.5))
    found = masked_least_squares(W, mask, H, **EXACT)
    assert error(W, found, X) <= error(W, updated, X)
    assert error(W, updated, X) < error(W, W * mask, X)


def test_a_start_changes_the_way_and_not_the_end():
    W, mask, X, H = problem()
    start = torch.randn_like(W)
    found = masked_least_squares(W, mask, H, start=start, **EXACT)
    torch.testing.assert_close(found, by_rows(W, mask, X), rtol=1e-6, atol=1e-8)
    untouched = masked_least_squares(W, mask, H, start=start, max_iterations=0)
    assert torch.equal(untouched, start * mask)
    assert torch.equal(masked_least_squares(W, mask, H, max_iterations=0), W * mask)


def test_a_solved_problem_stays_as_it_is():
    W, mask, X, H = problem()
    best = by_rows(W, mask, X)
    again = masked_least_squares(W, mask, H, start=best, **EXACT)
    torch.testing.assert_close(again, best)
    everything = torch.ones_like(mask)
    assert torch.equal(masked_least_squares(W, everything, H, **EXACT), W)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("start", ["pruned", "elsewhere"])
def test_weights_of_inputs_that_were_never_active_stay_as_they_are(damping, start):
    W, mask, X, _ = problem()
    X[:, 3] = 0
    before = W * mask if start == "pruned" else torch.randn_like(W) * mask
    found = masked_least_squares(W, mask, X.T @ X, start=before, **EXACT | {"damping": damping})
    assert torch.equal(found[:, 3], before[:, 3])
    assert error(W, found, X) < error(W, before, X)


def test_nothing_to_solve_changes_nothing():
    W, mask, _, H = problem()
    mask[2] = False
    assert torch.equal(masked_least_squares(W, mask, torch.zeros_like(H)), W * mask)
    assert (masked_least_squares(W, mask, H)[2] == 0).all()


def test_fewer_tokens_than_inputs_leave_a_finite_solution():
    W, mask, X, H = problem(columns=24, tokens=7)
    found = masked_least_squares(W, mask, H, **EXACT)
    assert found.isfinite().all()
    assert error(W, found, X) <= 1e-6 * error(W, W * mask, X)


def test_it_computes_in_the_precision_of_the_hessian():
    W, mask, X, H = problem(dtype=torch.float32)
    half = W.bfloat16()
    found = masked_least_squares(half, mask, H, start=(half * mask))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, masked_least_squares(half.float(), mask, H))
    assert torch.equal(half, W.bfloat16())


def test_arguments_are_left_alone():
    W, mask, _, H = problem()
    start = W * mask
    kept = [value.clone() for value in (W, mask, H, start)]
    masked_least_squares(W, mask, H, start=start)
    for value, before in zip((W, mask, H, start), kept, strict=True):
        assert torch.equal(value, before)


def test_it_stops_once_two_iterations_lower_the_objective_by_too_little():
    W, mask, X, H = problem(columns=24, tokens=200)
    objectives, weights = [], []
    for count in range(0, 13, 2):
        weights.append(masked_least_squares(W, mask, H, damping=0.0, tolerance=0.0, max_iterations=count))
        objectives.append(float(error(W, weights[-1], X)))
    falls = [(before - after) / after for before, after in itertools.pairwise(objectives)]
    assert falls == sorted(falls, reverse=True)
    for stop, fall in enumerate(falls[:-1], start=1):
        found = masked_least_squares(W, mask, H, damping=0.0, tolerance=1.01 * fall)
        assert torch.equal(found, weights[stop])
        assert not torch.equal(found, weights[stop + 1])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(broken):
    W, mask, _, H = problem()
    H[1, 2] = H[2, 1] = broken
    with pytest.raises(ValueError, match="Expected a finite solution .* got NaN or infinity. Check the calibration"):
        masked_least_squares(W, mask, H)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 20),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    sparsity=st.floats(0, 0.95),
    damping=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_any_problem_gets_better_and_none_better_than_the_optimum(rows, columns, tokens, seed, sparsity, damping):
    W, mask, X, H = problem(rows, columns, tokens, seed, Unstructured(sparsity))
    ridge = float(damping * H.diagonal().mean())
    found = masked_least_squares(W, mask, H, damping=damping, tolerance=0.0)
    assert (found[~mask] == 0).all()
    reached, best = error(W, found, X, ridge), error(W, by_rows(W, mask, X, ridge), X, ridge)
    slack = 1e-6 * error(W, torch.zeros_like(W), X, ridge)
    assert best - slack <= reached <= best + slack
    assert reached <= error(W, W * mask, X, ridge) + slack
