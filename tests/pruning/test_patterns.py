import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.pruning.patterns import (
    SemiStructured,
    Unstructured,
    count_across,
    number_to_prune,
    parse_pattern,
    select,
    select_across,
)


SCORES = [[3.0, 1.0, 2.0, 4.0], [8.0, 7.0, 6.0, 5.0]]
TIES = [[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("scores", "pattern", "group", "kept"),
    [
        (SCORES, 0.5, "row", [[1, 0, 0, 1], [1, 1, 0, 0]]),
        (SCORES, 0.5, "matrix", [[0, 0, 0, 0], [1, 1, 1, 1]]),
        (SCORES, 0.0, "matrix", [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (SCORES, Unstructured(0.3, exact=False), "row", [[1, 0, 1, 1], [1, 1, 1, 0]]),
        (SCORES, "1:2", "row", [[1, 0, 0, 1], [1, 0, 1, 0]]),
        (SCORES, "1:4", "row", [[0, 0, 0, 1], [1, 0, 0, 0]]),
        (SCORES, "4:4", "row", [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (TIES, 0.5, "row", [[0, 0, 1, 1], [0, 1, 1, 0]]),
        (TIES, 0.5, "matrix", [[0, 0, 1, 1], [0, 1, 1, 0]]),
        (TIES, "2:4", "row", [[0, 0, 1, 1], [0, 1, 1, 0]]),
        (SCORES, SemiStructured(1, 3, allow_ragged=True), "row", [[1, 0, 0, 1], [1, 0, 0, 1]]),
        (SCORES, SemiStructured(2, 3, allow_ragged=True), "row", [[1, 0, 1, 1], [1, 1, 0, 1]]),
    ],
)
def test_selection_keeps_the_highest_and_breaks_ties_by_position(scores, pattern, group, kept):
    assert select(torch.tensor(scores), parse_pattern(pattern), group).int().tolist() == kept


SPREAD = [[3.0, 1.0, 2.0], [6.0, 5.0, 4.0], [0.0, 9.0, 8.0]]


@pytest.mark.parametrize(
    ("scores", "pruned", "kept"),
    [
        # One extra: of the lowest of each row, 1, 4 and 0, the last row's.
        (SPREAD, 1, [[1, 1, 1], [1, 1, 1], [0, 1, 1]]),
        (SPREAD, 2, [[1, 0, 1], [1, 1, 1], [0, 1, 1]]),
        (SPREAD, 3, [[1, 0, 1], [1, 1, 0], [0, 1, 1]]),
        # The next lowest are 2, 5 and 8.
        (SPREAD, 4, [[1, 0, 0], [1, 1, 0], [0, 1, 1]]),
        (SPREAD, 5, [[1, 0, 0], [1, 0, 0], [0, 1, 1]]),
        (SPREAD, 6, [[1, 0, 0], [1, 0, 0], [0, 1, 0]]),
        (SPREAD, 8, [[0, 0, 0], [0, 0, 0], [0, 1, 0]]),
        # Ties: of rows the first, of entries the first that is left.
        ([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], 1, [[0, 1], [1, 1], [1, 1]]),
        ([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], 5, [[0, 0], [0, 0], [0, 1]]),
        ([[2.0, 2.0, 1.0], [2.0, 1.0, 2.0]], 3, [[0, 1, 0], [1, 0, 1]]),
        # What is zero already goes first, wherever it is.
        ([[1.0, 2.0], [3.0, float("-inf")]], 1, [[1, 1], [1, 0]]),
        ([[1.0, 2.0], [float("-inf"), float("-inf")]], 3, [[0, 1], [0, 0]]),
    ],
)
def test_exact_rows_add_up_and_the_extra_ones_go_where_the_next_score_is_lowest(scores, pruned, kept):
    scores = torch.tensor(scores)
    pattern = Unstructured(pruned / scores.numel())
    assert select(scores, pattern, "row").int().tolist() == kept
    rounded_down = Unstructured(pattern.sparsity, exact=False)
    assert torch.equal(select(scores, pattern, "matrix"), select(scores, rounded_down, "matrix"))


# Few distinct values: a threshold alone would miscount nearly every time.
tied_scores = st.integers(1, 9).flatmap(
    lambda columns: st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, float("-inf")]), min_size=columns, max_size=columns),
        min_size=1,
        max_size=6,
    )
)


@given(tied_scores, st.floats(0, 0.999), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_counts_are_exact_under_ties(scores, sparsity, dtype):
    scores = torch.tensor(scores, dtype=dtype)
    by_row = select(scores, Unstructured(sparsity, exact=False), "row")
    by_matrix = select(scores, Unstructured(sparsity), "matrix")
    (across,) = select_across([lambda: scores], sparsity)
    assert (~by_row).sum(1).unique().tolist() == [int(round(sparsity * scores.shape[1], 6))]
    assert (~by_matrix).sum() == int(round(sparsity * scores.numel(), 6))
    assert torch.equal(across, by_matrix)
    if by_matrix.any() and (~by_matrix).any():
        assert scores[~by_matrix].max() <= scores[by_matrix].min()


@given(tied_scores, st.floats(0, 0.999))
def test_exact_rows_differ_by_one_at_most(scores, sparsity):
    scores = torch.tensor(scores)
    pruned = ~select(scores, Unstructured(sparsity), "row")
    by_row = pruned.sum(1)
    assert by_row.sum() == number_to_prune(sparsity, scores.numel())
    assert by_row.max() - by_row.min() <= 1
    for row, count, chosen in zip(scores, by_row.tolist(), pruned, strict=True):
        (one_row,) = select(row[None], Unstructured(count / len(row)), "row") if count < len(row) else (~chosen,)
        assert torch.equal(~chosen, one_row)


@given(st.integers(1, 2**30).flatmap(lambda size: st.tuples(st.integers(0, size - 1), st.just(size))))
def test_a_count_survives_as_a_fraction(count_and_size):
    zeros, size = count_and_size
    assert number_to_prune(zeros / size, size) == zeros


@given(tied_scores, st.integers(1, 5), st.floats(0, 0.999))
def test_counting_across_matrices_is_selecting_across_them(scores, cut, sparsity):
    parts = list(torch.tensor(scores).split(cut))
    parts[0] = parts[0].flatten()
    functions = [lambda part=part: part for part in parts]
    count = number_to_prune(sparsity, sum(part.numel() for part in parts))
    assert count_across(functions, count) == [int((~mask).sum()) for mask in select_across(functions, sparsity)]


@given(tied_scores, st.integers(1, 4), st.integers(1, 4))
def test_semi_structured_keeps_n_of_every_m(scores, n, extra):
    scores, pattern = torch.tensor(scores), SemiStructured(n, n + extra, allow_ragged=True)
    mask = select(scores, pattern, "row")
    for group in mask.split(pattern.m, dim=1):
        assert group.sum(1).unique().tolist() == [min(n, group.shape[1])]


def kept_by_definition(scores, pattern, group):
    """The mask that sorting entries by (score, index) says, one group after the other."""
    mask = torch.ones(scores.shape, dtype=torch.bool)
    index = torch.arange(scores.numel()).view(scores.shape)
    if isinstance(pattern, SemiStructured):
        groups = [part for row in index for part in row.split(pattern.m)]
        pruned = [max(0, len(part) - pattern.n) for part in groups]
    else:
        groups = list(index) if group == "row" else [index.flatten()]
        pruned = [int(round(pattern.sparsity * len(part), 6)) for part in groups]
    for part, count in zip(groups, pruned, strict=True):
        order = sorted(part.tolist(), key=lambda i: (scores.flatten()[i].item(), i))
        mask.view(-1)[order[:count]] = False
    return mask


patterns = st.one_of(
    st.builds(Unstructured, st.floats(0, 0.999), exact=st.just(False)),
    st.builds(
        lambda n, extra: SemiStructured(n, n + extra, allow_ragged=True), st.integers(1, 20), st.integers(0, 12)
    ),
)


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    patterns,
    st.sampled_from(["row", "matrix"]),
    st.sampled_from([1, 3, 1000]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 99),
)
def test_selection_is_by_score_then_by_index(rows, columns, pattern, group, distinct, dtype, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-distinct, distinct + 1, (rows, columns), generator=generator).to(dtype) / 2
    scores[scores == scores.min()] = -torch.inf
    if transposed:
        scores = scores.T.contiguous().T
    assert torch.equal(select(scores, pattern, group), kept_by_definition(scores, pattern, group))


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=40),
    st.floats(0, 0.99),
    st.integers(1, 39),
)
def test_selection_across_matrices_equals_selection_in_one(values, sparsity, cut):
    values = torch.tensor(values)
    parts = [part.view(1, -1) for part in (values[:cut], values[cut:]) if part.numel()]
    masks = select_across([lambda part=part: part for part in parts], sparsity)
    expected = select(values.view(1, -1), Unstructured(sparsity), "matrix")
    assert torch.equal(torch.cat(masks, dim=1), expected)


@pytest.mark.parametrize(("sparsity", "size", "pruned"), [(0.29, 100, 29), (0.7, 10, 7), (0.999, 100, 99), (0, 5, 0)])
def test_counts_do_not_suffer_from_binary_fractions(sparsity, size, pruned):
    assert (~select(torch.randn(1, size), Unstructured(sparsity), "row")).sum() == pruned


def test_patterns_are_parsed_and_printed():
    assert parse_pattern("2:4") == SemiStructured(2, 4)
    assert parse_pattern("0.5") == parse_pattern(0.5) == Unstructured(0.5)
    assert parse_pattern(SemiStructured(1, 2)).sparsity == 0.5
    assert [str(parse_pattern(text)) for text in ("2:4", 0.5)] == ["2:4", "0.5"]
    assert str(Unstructured(0.5, exact=False)) == "0.5"
