"""Mask refinement against brute force over all swaps, and DSnoT's cycles worked out by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sparse.calibration.statistics import Statistics
from peft_sparse.pruning.criteria import Wanda
from peft_sparse.pruning.dsnot import DSnoT, dsnot
from peft_sparse.pruning.patterns import SemiStructured, Unstructured, select
from peft_sparse.pruning.refinement import REFINEMENTS, find_refinement
from peft_sparse.pruning.rows import row_error
from peft_sparse.pruning.swap import Swap, swap


PATTERNS = [
    Unstructured(0.5),
    Unstructured(0.8),
    *(SemiStructured(n, m, allow_ragged=True) for n, m in ((2, 4), (1, 4), (3, 5))),
]
SEMI_STRUCTURED = PATTERNS[2:]


def problem(rows=6, columns=8, seed=0, pattern=PATTERNS[0], group="row", dtype=torch.float64, zeros=0.1):
    """W with zeros of its own, a Wanda mask, and the statistics of correlated inputs whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1)[:, None] ** -0.5
    X = torch.randn(40, columns, generator=generator) @ mixing + torch.randn(columns, generator=generator)
    W = torch.randn(rows, columns, generator=generator).to(dtype)
    W[torch.rand(rows, columns, generator=generator) < zeros] = 0
    X = X.to(torch.float64 if dtype == torch.float64 else torch.float32)
    statistics = Statistics(
        input_norm=X.norm(dim=0),
        hessian=X.T @ X,
        input_mean=X.mean(0),
        input_variance=X.var(0, correction=0),
        tokens=40,
        sequences=4,
    )
    return W, select(Wanda().score(W, statistics), pattern, group), statistics


def error_by_definition(w, kept, hessian):
    d = (w * ~kept).double()
    return float(d @ hessian.double() @ d)


def best_swap(w, kept, hessian, pattern):
    """The lowest error that one swap reaches, and its mask, by trying all swaps."""
    best = (error_by_definition(w, kept, hessian), kept)
    for p, g in itertools.product(range(len(w)), repeat=2):
        if not kept[p] or kept[g] or w[p] == 0 or w[g] == 0:
            continue
        if isinstance(pattern, SemiStructured) and p // pattern.m != g // pattern.m:
            continue
        swapped = kept.clone()
        swapped[p], swapped[g] = False, True
        best = min(best, (error_by_definition(w, swapped, hessian), swapped), key=lambda entry: entry[0])
    return best


def expected_error(W, mask, statistics):
    sums = statistics.input_mean.double() * statistics.tokens / statistics.sequences
    return (W.double() * ~mask * sums).sum(1)


def counts(mask, pattern):
    """Kept entries per row, and under n:m per group, the last one ragged."""
    parts = mask.split(pattern.m, dim=1) if isinstance(pattern, SemiStructured) else [mask]
    return torch.stack([part.sum(1) for part in parts])


REFINE = {
    **{name: refinement().refine for name, refinement in REFINEMENTS.items()},
    "swap, few candidates": lambda W, mask, s, pattern: swap(W, mask, s.hessian, pattern, candidates=2)[0],
    "dsnot, threshold 0": lambda W, mask, s, pattern: dsnot(W, mask, s, pattern, threshold=0.0),
}


@pytest.mark.parametrize("refine", REFINE.values(), ids=REFINE)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(2, 23),
    seed=st.integers(0, 10**6),
    pattern=st.sampled_from(PATTERNS),
    group=st.sampled_from(["row", "matrix"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_only_the_places_of_kept_entries_change(refine, rows, columns, seed, pattern, group, dtype):
    W, mask, statistics = problem(rows, columns, seed, pattern, group, dtype)
    W_before, mask_before, hessian_before = W.clone(), mask.clone(), statistics.hessian.clone()
    refined = refine(torch.nn.Parameter(W), mask, statistics, pattern)
    assert refined.dtype == torch.bool
    assert torch.equal(counts(refined, pattern), counts(mask, pattern))
    assert torch.equal(refined[W == 0], mask[W == 0])
    assert torch.equal((W * refined == 0).sum(1), (W * mask == 0).sum(1))
    assert torch.equal(W, W_before)
    assert torch.equal(mask, mask_before)
    assert torch.equal(statistics.hessian, hessian_before)


@pytest.mark.parametrize("refine", REFINE.values(), ids=REFINE)
def test_kept_zeros_stay_kept(refine):
    """A mask may keep a weight that is zero: were it exchanged for another, the matrix would have a zero less."""
    W, _, statistics = problem(rows=40, columns=12)
    for pattern in PATTERNS:
        mask = select(torch.rand(W.shape), pattern, "row")
        assert (mask & (W == 0)).any()
        refined = refine(W, mask, statistics, pattern)
        assert not torch.equal(refined, mask)
        assert torch.equal(refined[W == 0], mask[W == 0])
        assert torch.equal(counts(refined, pattern), counts(mask, pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_every_swap_is_the_best_of_all(pattern, seed):
    W, mask, statistics = problem(seed=seed, pattern=pattern)
    mask[::2] = select(torch.rand(W.shape), pattern, "row")[::2]
    H = statistics.hessian
    for _ in range(6):
        refined, swaps = swap(W, mask, H, pattern, max_swaps=1, tolerance=0.0)
        for w, kept, found, count in zip(W, mask, refined, swaps, strict=True):
            lowest, expected = best_swap(w, kept, H, pattern)
            assert torch.equal(found, expected)
            assert count == int(not torch.equal(kept, expected))
            assert error_by_definition(w, found, H) == pytest.approx(lowest, rel=1e-10)
        mask = refined


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("columns", [8, 13])
def test_where_it_ends_no_swap_lowers_the_error(pattern, columns):
    W, _, statistics = problem(rows=12, columns=columns, pattern=pattern)
    H = statistics.hessian
    refined, swaps = swap(W, select(torch.rand(W.shape), pattern, "row"), H, pattern, tolerance=0.0)
    assert swaps.sum() > 0
    for w, kept in zip(W, refined, strict=True):
        assert best_swap(w, kept, H, pattern)[0] == error_by_definition(w, kept, H)


@pytest.mark.parametrize("pattern", SEMI_STRUCTURED, ids=str)
def test_under_n_m_few_candidates_end_at_an_optimum_too(pattern):
    W, _, statistics = problem(rows=8, columns=18, pattern=pattern)
    mask = select(torch.rand(W.shape), pattern, "row")
    refined, swaps = swap(W, mask, statistics.hessian, pattern, tolerance=0.0, candidates=1)
    assert swaps.sum() > 0
    for w, kept in zip(W, refined, strict=True):
        assert best_swap(w, kept, statistics.hessian, pattern)[0] == error_by_definition(w, kept, statistics.hessian)


@settings(deadline=None, max_examples=60)
@given(
    columns=st.integers(2, 40),
    seed=st.integers(0, 10**6),
    pattern=st.sampled_from(PATTERNS),
    candidates=st.integers(1, 12),
)
def test_each_swap_lowers_the_error(columns, seed, pattern, candidates):
    """Runs that may take one swap more each time: a row either is done or has a lower error."""
    W, mask, statistics = problem(columns=columns, seed=seed, pattern=pattern)
    H = statistics.hessian
    before, swaps_before = row_error(W, mask, H), torch.zeros(len(W), dtype=torch.long)
    for max_swaps in range(1, 9):
        refined, swaps = swap(W, mask, H, pattern, max_swaps=max_swaps, candidates=candidates)
        after = row_error(W, refined, H)
        went_on = swaps > swaps_before
        assert torch.equal(swaps, swaps_before + went_on)
        assert (after[went_on] < before[went_on]).all()
        assert torch.equal(after[~went_on], before[~went_on])
        before, swaps_before = after, swaps


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.8), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_precision_lowers_the_error_of_every_row(pattern, dtype):
    W, mask, statistics = problem(rows=30, columns=256, pattern=pattern, dtype=dtype)
    before = row_error(W.double(), mask, statistics.hessian)
    refined, swaps = swap(W, mask, statistics.hessian, pattern)
    after = row_error(W.double(), refined, statistics.hessian)
    assert (after[swaps > 0] < before[swaps > 0]).all()
    assert after.sum() < 0.7 * before.sum()
    exact, _ = swap(W.double(), mask, statistics.hessian, pattern)
    assert after.sum().item() == pytest.approx(row_error(W.double(), exact, statistics.hessian).sum().item(), rel=0.05)


@pytest.mark.parametrize("outlier", [0, 100, 10000])
def test_few_candidates_come_close_to_all(outlier):
    """With one token that dominates all others too, as language models have them."""
    W, _, statistics = problem(rows=8, columns=128)
    token = outlier * torch.randn(128, dtype=torch.float64)
    H = statistics.hessian + token[:, None] * token
    mask = select(W.abs() * H.diagonal().sqrt(), PATTERNS[0], "row")
    before, few, all_of_them = (
        row_error(W, refined, H).sum()
        for refined in (mask, *(swap(W, mask, H, PATTERNS[0], candidates=k)[0] for k in (16, 128)))
    )
    assert few < 1.3 * all_of_them
    assert few < 0.5 * before


def test_rows_do_not_depend_on_their_chunk(monkeypatch):
    W, mask, statistics = problem(rows=23, columns=16)
    for pattern in (PATTERNS[0], SemiStructured(2, 4)):
        mask = select(W.abs(), pattern, "row")
        swapped, swaps = swap(W, mask, statistics.hessian, pattern, candidates=3)
        edited = dsnot(W, mask, statistics, pattern)
        with monkeypatch.context() as patch:
            patch.setattr("peft_sparse.pruning.rows._CHUNK", 160)
            again, swaps_again = swap(W, mask, statistics.hessian, pattern, candidates=3)
            assert torch.equal(again, swapped)
            assert torch.equal(swaps_again, swaps)
            assert torch.equal(dsnot(W, mask, statistics, pattern), edited)


def test_the_scale_of_the_hessian_does_not_matter():
    W, mask, statistics = problem(rows=20, columns=40)
    refined, _ = swap(W, mask, statistics.hessian, PATTERNS[0])
    assert torch.equal(swap(W, mask, statistics.hessian * 2.0**-30, PATTERNS[0])[0], refined)


def test_no_swaps_and_no_cycles_leave_the_mask():
    W, mask, statistics = problem()
    refined, swaps = swap(W, mask, statistics.hessian, PATTERNS[0], max_swaps=0)
    assert torch.equal(refined, mask)
    assert not swaps.any()
    assert torch.equal(dsnot(W, mask, statistics, PATTERNS[0], max_cycles=0), mask)
    assert torch.equal(dsnot(W, mask, statistics, PATTERNS[0], threshold=torch.inf), mask)


@pytest.mark.parametrize("keep", [True, False])
def test_whole_and_empty_rows_are_left_alone(keep):
    W, mask, statistics = problem()
    mask = torch.full_like(mask, keep)
    for pattern in PATTERNS:
        for refine in REFINE.values():
            assert torch.equal(refine(W, mask, statistics, pattern), mask)


def test_the_row_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(50, 7, generator=generator), torch.randn(3, 7, generator=generator)
    mask, other = torch.rand(3, 7, generator=generator) < 0.5, torch.randn(3, 7, generator=generator)
    by_mask, by_weight = row_error(W, mask, X.T @ X), row_error(W, other.bfloat16(), X.T @ X)
    torch.testing.assert_close(by_mask, (X @ (W - W * mask).T).square().sum(0))
    torch.testing.assert_close(by_weight, (X @ (W - other.bfloat16().float()).T).square().sum(0))
    assert by_mask.dtype == torch.float32
    assert row_error(W.half(), mask, X.T @ X).dtype == torch.float32


# DSnoT. One token per sequence and unit variance unless said otherwise, so W_ij S_j = W_ij · mean_j.


def moments(mean, variance=None, norm=None, tokens=1, sequences=1):
    ones = [1.0] * len(mean)
    parts = {"input_mean": mean, "input_variance": variance or ones, "input_norm": norm or ones}
    return Statistics(**{name: torch.tensor(part) for name, part in parts.items()}, tokens=tokens, sequences=sequences)


def edited(weight, kept, statistics, pattern=PATTERNS[0], **options):
    mask = torch.tensor([kept], dtype=torch.bool)
    return dsnot(torch.tensor([weight]), mask, statistics, pattern, **options)[0].int().tolist()


def test_dsnot_by_hand():
    # e = 3 + 2 - 1 = 4. Grown: 3. Pruned: of -1, -0.5 and -2 the smallest, -0.5. Then e = 4 - 3 - 0.5 = 0.5.
    # Then grown 2 and pruned -1 would give e = 0.5 - 2 - 1 = -2.5, which is passed over, and nothing is left to grow.
    weight, kept = [3.0, 2.0, -1.0, -1.0, -0.5, -2.0, 4.0], [0, 0, 0, 1, 1, 1, 1]
    assert edited(weight, kept, moments([1.0] * 7)) == [1, 0, 0, 1, 0, 1, 1]
    # The mirror image.
    assert edited([-w for w in weight], kept, moments([1.0] * 7)) == [1, 0, 0, 1, 0, 1, 1]


def test_dsnot_goes_on_to_the_other_side():
    # e = 3; grown 4, pruned -0.5: e = -1.5. Then grown -1 and pruned 0.25: e = -0.25, and 0.3 is near enough.
    weight, kept = [4.0, -1.0, -0.5, 0.25, 5.0], [0, 0, 1, 1, 1]
    statistics = moments([1.0] * 5)
    assert edited(weight, kept, statistics, threshold=0.3) == [1, 1, 0, 0, 1]
    assert edited(weight, kept, statistics, threshold=0.3, max_cycles=1) == [1, 0, 0, 1, 1]
    assert edited(weight, kept, statistics, threshold=2.0) == [1, 0, 0, 1, 1]
    assert edited(weight, kept, statistics, threshold=3.0) == kept


def test_dsnot_grows_what_varies_least_and_prunes_by_wanda():
    weight, kept = [3.0, 2.0, -1.0, -0.5], [0, 0, 1, 1]

    def first_cycle(**statistics):
        return edited(weight, kept, moments([1.0] * 4, **statistics), max_cycles=1)

    assert first_cycle() == [1, 0, 1, 0]
    assert first_cycle(variance=[2.0, 1.0, 1.0, 1.0]) == [0, 1, 1, 0]
    assert first_cycle(norm=[1.0, 1.0, 1.0, 3.0]) == [1, 0, 0, 1]
    # What never varies comes first.
    assert first_cycle(variance=[1.0, 0.0, 1.0, 1.0]) == [0, 1, 1, 0]


def test_the_error_of_dsnot_is_in_sums_over_a_sequence():
    weight, kept = [3.0, 2.0, -1.0, -0.5], [0, 0, 1, 1]
    # e = 5 · 12 tokens / 3 sequences.
    assert edited(weight, kept, moments([1.0] * 4, tokens=12, sequences=3), threshold=19.9) == [1, 0, 1, 0]
    assert edited(weight, kept, moments([1.0] * 4, tokens=12, sequences=3), threshold=20.0) == kept


def test_under_n_m_dsnot_stays_within_a_group_and_stops_at_a_change_of_sign():
    # e = 3 + 1 + 0.9 = 4.9; grown 3 and pruned, of its group, 0.5 in spite of its sign: e = 2.4.
    # Then grown 1 and pruned -0.8: e = 0.6. Then grown 0.9 and pruned -1 would give -1.3: done.
    weight, kept = [3.0, 0.5, 5.0, 0.0, 1.0, -1.0, 0.9, -0.8], [0, 1, 1, 0, 0, 1, 0, 1]
    assert edited(weight, kept, moments([1.0] * 8), SemiStructured(2, 4)) == [1, 0, 1, 0, 1, 1, 0, 0]


def test_under_n_m_a_change_of_sign_ends_the_row():
    # e = 2.25: grown 2, pruned -1 would give -0.75, nearer to zero, but beyond it. The group of 0.25 is not reached.
    weight, kept = [2.0, -1.0, 0.25, -0.5], [0, 1, 0, 1]
    statistics = moments([1.0] * 4)
    assert edited(weight, kept, statistics, SemiStructured(1, 2)) == kept
    assert edited(weight, kept, statistics) == [1, 1, 0, 0]


@settings(deadline=None, max_examples=60)
@given(columns=st.integers(2, 40), seed=st.integers(0, 10**6), pattern=st.sampled_from(PATTERNS))
def test_no_cycle_of_dsnot_raises_the_expected_error(columns, seed, pattern):
    W, mask, statistics = problem(columns=columns, seed=seed, pattern=pattern)
    before = expected_error(W, mask, statistics)
    first, previous = before.sign(), mask
    for cycles in range(1, 12):
        refined = dsnot(W, mask, statistics, pattern, max_cycles=cycles)
        after = expected_error(W, refined, statistics)
        changed = (refined != previous).any(1)
        assert (after[changed].abs() < before[changed].abs()).all()
        assert torch.equal(after[~changed], before[~changed])
        assert ((refined != previous).sum(1) <= 2).all()
        if isinstance(pattern, SemiStructured):
            assert (after * first >= -1e-12).all()
        before, previous = after, refined


def test_dsnot_brings_most_rows_below_the_threshold():
    W, mask, statistics = problem(rows=50, columns=64)
    before = expected_error(W, mask, statistics).abs()
    after = expected_error(W, dsnot(W, mask, statistics, PATTERNS[0]), statistics).abs()
    assert after.median() < 0.1 * before.median()


def test_refinements_are_found_by_name():
    assert find_refinement("dsnot")[1].needs == ("inputs", "moments")
    assert find_refinement("swap")[1].needs == ("hessian",)
    assert find_refinement(Swap(max_swaps=3)) == ("swap(max_swaps=3)", Swap(max_swaps=3))


def test_the_numbers_of_a_refinement_are_used():
    W, mask, statistics = problem(rows=8, columns=32)
    moved = [(r.refine(W, mask, statistics, PATTERNS[0]) != mask).sum(1).max() for r in (DSnoT(2), Swap(2))]
    assert moved == [4, 4]
    assert torch.equal(DSnoT(threshold=1e9).refine(W, mask, statistics, PATTERNS[0]), mask)
    assert torch.equal(Swap(tolerance=1.0).refine(W, mask, statistics, PATTERNS[0]), mask)
