"""SparseGPT against the paper's equations, written out column by column in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.pruning.patterns import SemiStructured, Unstructured, select
from peft_sparse.pruning.sparsegpt import sparsegpt


def correlated(tokens, columns, seed=0):
    """Inputs whose covariance has a decaying spectrum, as those of language models have."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1)[:, None] ** -0.5
    return torch.randn(tokens, columns, generator=generator) @ mixing


def layer(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    X = correlated(4 * columns, columns, seed)
    return torch.randn(rows, columns, generator=generator), X.T @ X


def error(weight, pruned, hessian):
    difference = (weight - pruned).double()
    return ((difference @ hessian.double()) * difference).sum()


def by_equations(weight, hessian, pattern=None, mask=None, damping=0.01, block_size=128):
    """Algorithm 1 of the paper, one column at a time."""
    W, H = weight.double().clone(), hessian.double().clone()
    rows, columns = W.shape
    zero, dead = W == 0, H.diagonal() == 0
    H += (damping * H.diagonal().sum() / (~dead).sum()) * torch.eye(columns)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    kept = ~zero if mask is None else mask & ~zero
    chosen = 0
    for j in range(columns):
        scores = (W / U.diagonal()).square()
        scores[:, dead] = 0
        scores[zero] = -torch.inf
        if isinstance(pattern, Unstructured) and j % block_size == 0:
            stop = min(j + block_size, columns)
            count = int(round(pattern.sparsity * rows * stop, 6)) - chosen
            chosen += count
            lowest = scores[:, j:stop].T.flatten().argsort(stable=True)[:count]
            kept[:, j:stop] &= torch.ones(rows * (stop - j)).scatter(0, lowest, 0).view(-1, rows).T.bool()
        if isinstance(pattern, SemiStructured) and j % pattern.m == 0:
            group = scores[:, j : j + pattern.m]
            order = group.argsort(dim=1, stable=True)[:, : max(0, group.shape[1] - pattern.n)]
            kept[:, j : j + pattern.m] &= torch.ones_like(group).scatter(1, order, 0).bool()
        E = W[:, j] * ~kept[:, j] / U[j, j]
        W[:, j:] -= E[:, None] * U[j, j:]
    return W * kept, kept


PATTERNS = [
    Unstructured(0.5),
    Unstructured(0.73),
    *(SemiStructured(n, m) for n, m in ((2, 4), (1, 3), (5, 8), (9, 20))),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(24, 96, 128), (24, 96, 32), (7, 83, 20), (50, 70, 64), (2, 1070, 100)]
)
def test_it_equals_the_equations(pattern, rows, columns, block_size):
    weight, hessian = layer(rows, columns)
    expected, kept = by_equations(weight, hessian, pattern, block_size=block_size)
    updated, mask = sparsegpt(weight.double(), hessian.double(), pattern, block_size=block_size)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(updated, expected)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_is_precise_enough(pattern, dtype):
    weight, hessian = layer(64, 512)
    weight = weight.to(dtype)
    updated, mask = sparsegpt(torch.nn.Parameter(weight), hessian, pattern)
    assert not updated.requires_grad
    expected, kept = by_equations(weight, hessian, pattern)
    assert updated.dtype == torch.float32
    assert (mask != kept).double().mean() < 0.01
    assert error(weight, updated, hessian) == pytest.approx(error(weight, expected, hessian).item(), rel=1e-3)


def test_pruning_one_column_is_a_least_squares_solution():
    X = correlated(16, 4).double()
    weight, mask = torch.randn(3, 4).double(), torch.ones(3, 4).bool()
    mask[:, 0] = False
    updated, _ = sparsegpt(weight, X.T @ X, mask=mask, damping=0)
    # What column 0 gave to the outputs, expressed by the others.
    by_others = torch.linalg.lstsq(X[:, 1:], X[:, :1] @ weight[:, :1].T).solution.T
    torch.testing.assert_close(updated[:, 1:], weight[:, 1:] + by_others)


def test_each_column_is_made_up_for_by_those_on_its_right():
    X = correlated(16, 4).double()
    weight = torch.randn(1, 4).double()
    updated, _ = sparsegpt(weight, X.T @ X, mask=torch.tensor([[True, False, False, True]]), damping=0)
    first = weight[:, 2:] + torch.linalg.lstsq(X[:, 2:], X[:, 1:2] * weight[0, 1]).solution.T
    last = first[:, 1] + torch.linalg.lstsq(X[:, 3:], X[:, 2:3] * first[0, 0]).solution[:, 0]
    torch.testing.assert_close(updated, torch.stack([weight[0, 0], *torch.zeros(2).double(), last[0]])[None])


def test_columns_on_the_left_and_whole_rows_are_left_alone():
    weight, hessian = layer(4, 12)
    mask = torch.ones(4, 12).bool()
    mask[:2, 7] = False
    updated, _ = sparsegpt(weight, hessian, mask=mask)
    assert torch.equal(updated[:, :7], weight[:, :7])
    assert torch.equal(updated[2:], weight[2:])
    assert torch.equal(sparsegpt(weight, hessian, Unstructured(0.0))[0], weight)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.8), SemiStructured(2, 4)], ids=str)
def test_its_mask_and_its_update_both_lower_the_layer_error(pattern):
    weight, hessian = layer(64, 256)
    updated, mask = sparsegpt(weight, hessian, pattern)
    magnitude = select(weight.abs(), pattern, "matrix")
    from_magnitude, same = sparsegpt(weight, hessian, mask=magnitude)
    assert torch.equal(same, magnitude)
    sparsegpt_error, mask_only, magnitude_error, magnitude_only = (
        error(weight, pruned, hessian) for pruned in (updated, weight * mask, from_magnitude, weight * magnitude)
    )
    assert sparsegpt_error < 0.7 * mask_only
    assert magnitude_error < 0.8 * magnitude_only
    assert sparsegpt_error < magnitude_error


@settings(deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    sparsity=st.floats(0, 0.999),
    zeros=st.floats(0, 1),
    dead=st.floats(0, 0.9),
    block_size=st.integers(1, 17),
    seed=st.integers(0, 99),
)
def test_counts_are_exact_and_zeros_stay(rows, columns, sparsity, zeros, dead, block_size, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) > zeros)
    X = torch.randn(2 * columns, columns) * (torch.rand(columns) > dead)
    X[:, seed % columns] = 1
    updated, mask = sparsegpt(weight, X.T @ X, Unstructured(sparsity), block_size=block_size)
    assert (~mask).sum() == max(int(round(sparsity * weight.numel(), 6)), (weight == 0).sum())
    assert not mask[weight == 0].any()
    assert not updated[~mask].any()
    assert updated.is_contiguous()
    assert mask.is_contiguous()


@settings(deadline=None)
@given(
    n=st.integers(1, 20),
    extra=st.integers(0, 19),
    columns=st.integers(1, 50),
    dead=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_n_of_every_m_are_kept_whatever_divides(n, extra, columns, dead, seed):
    torch.manual_seed(seed)
    weight, X = torch.randn(5, columns), torch.randn(2 * columns, columns) * (torch.rand(columns) > dead)
    X[:, seed % columns] = 1
    _, mask = sparsegpt(weight, X.T @ X, SemiStructured(n, n + extra, allow_ragged=True), block_size=16)
    for group in mask.split(n + extra, dim=1):
        assert group.sum(1).unique().tolist() == [min(n, group.shape[1])]


def test_zeros_in_some_columns_are_made_room_for_in_the_others():
    weight, hessian = layer(8, 64)
    weight[:, 48:] = 0
    _, mask = sparsegpt(weight, hessian, Unstructured(0.5), block_size=16)
    assert (~mask).sum() == 256
    assert (~mask).view(8, 4, 16).sum((0, 2)).tolist() == [64, 64, 0, 128]


def test_a_group_with_many_zeros_keeps_fewer():
    weight, hessian = layer(1, 4)
    weight[0, :3] = 0
    assert sparsegpt(weight, hessian, SemiStructured(2, 4))[1].tolist() == [[False, False, False, True]]


def test_zeros_stay_where_the_mask_keeps_them():
    weight, hessian = layer(4, 8)
    weight[:, 5] = 0
    updated, mask = sparsegpt(weight, hessian, mask=torch.arange(8).expand(4, 8) != 0)
    assert not updated[:, [0, 5]].any()
    assert not mask[:, [0, 5]].any()


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (SemiStructured(2, 4), [[0, 0, 1, 1], [0, 0, 1, 1]]),
        (Unstructured(0.375), [[0, 0, 1, 1], [0, 1, 1, 1]]),
    ],
    ids=str,
)
def test_equal_scores_go_by_column_then_by_row(pattern, kept):
    assert sparsegpt(torch.ones(2, 4), torch.eye(4), pattern)[1].int().tolist() == kept


def test_inputs_that_are_never_active_go_first_and_change_nothing_else():
    weight, _ = layer(6, 32)
    X = correlated(128, 32)
    X[:, [3, 17]] = 0
    updated, mask = sparsegpt(weight, X.T @ X, Unstructured(0.25))
    assert not mask[:, [3, 17]].any()
    assert (~mask).sum() == 48
    live = [j for j in range(32) if j not in (3, 17)]
    without, _ = sparsegpt(weight[:, live], X[:, live].T @ X[:, live], mask=mask[:, live])
    torch.testing.assert_close(updated[:, live], without)
    few, few_mask = sparsegpt(weight, X.T @ X, Unstructured(0.05), damping=0)
    assert (~few_mask).sum() == 9
    assert torch.equal(few[:, 17][few_mask[:, 17]], weight[:, 17][few_mask[:, 17]])


def test_the_scale_of_the_hessian_does_not_matter():
    weight, hessian = layer(16, 64)
    updated, mask = sparsegpt(weight, hessian, Unstructured(0.5))
    for scale in (2.0**-20, 2.0**20):
        scaled, same = sparsegpt(weight, hessian * scale, Unstructured(0.5))
        assert torch.equal(mask, same)
        torch.testing.assert_close(scaled, updated)


def test_fewer_tokens_than_inputs_are_enough():
    X = correlated(10, 48)
    weight = torch.randn(8, 48)
    updated, mask = sparsegpt(weight, X.T @ X, Unstructured(0.5))
    assert error(weight, updated, X.T @ X) < 0.1 * error(weight, weight * mask, X.T @ X)


def test_damping_grows_until_the_hessian_is_positive_definite():
    weight, hessian = layer(8, 16)
    values, vectors = torch.linalg.eigh(hessian)
    mean = hessian.diagonal().mean()
    values[0] = -0.05 * mean
    hessian = (vectors * values) @ vectors.T
    updated, mask = sparsegpt(weight, hessian, Unstructured(0.5))
    expected, _ = sparsegpt(weight, hessian, mask=mask, damping=0.1)
    torch.testing.assert_close(updated, expected)


def test_nothing_given_is_changed():
    weight, hessian = layer(8, 160)
    mask = torch.rand(8, 160) > 0.5
    given_before = [x.clone() for x in (weight, hessian, mask)]
    for dtype in (torch.float32, torch.float64):
        w, h = weight.to(dtype).T.contiguous().T, hessian.to(dtype)
        sparsegpt(w, h, Unstructured(0.5))
        sparsegpt(w, h, mask=mask)
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip((w, h, mask), given_before, strict=True))


INDEFINITE = torch.diag(torch.tensor([1.0, -100.0, 1.0, 1.0]))

REFUSALS = [
    (
        lambda: sparsegpt(torch.ones(2, 4), torch.eye(4)),
        "either a `pattern` to select by or a `mask` .* got both or nei",
    ),
    (
        lambda: sparsegpt(torch.ones(2, 4), INDEFINITE, Unstructured(0.5)),
        "positive definite Hessian, .* not one even with damping 10. Pass more calibration tokens, and look for NaN",
    ),
    (
        lambda: sparsegpt(torch.ones(2, 4), torch.zeros(4, 4), Unstructured(0.5)),
        "Expected a positive definite Hessian",
    ),
    (
        lambda: sparsegpt(torch.ones(2, 4), torch.full((4, 4), torch.nan), Unstructured(0.5)),
        "look for NaN or infinity in the inputs of this layer",
    ),
    (
        lambda: sparsegpt(torch.full((2, 4), torch.inf), torch.eye(4), Unstructured(0.5)),
        "Expected finite weights from SparseGPT, got NaN .* raise `damping`",
    ),
]


@pytest.mark.parametrize(("refused", "words"), REFUSALS, ids=[words[:40] for _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, words):
    with pytest.raises(ValueError, match=words):
        refused()
