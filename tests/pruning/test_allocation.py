import random
import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse.model.weights import WeightView
from peft_sparse.pruning.allocation import ALLOCATIONS, allocate
from peft_sparse.pruning.budget import Budget, apportion
from peft_sparse.pruning.owl import OWL
from peft_sparse.pruning.patterns import SemiStructured, number_to_prune, select_across


def weight(values):
    """A linear layer of these weights."""
    values = torch.as_tensor(values, dtype=torch.float32)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    layer.weight.data = values
    return WeightView(layer)


def convolution(outputs, inputs, size):
    return WeightView(nn.Conv2d(inputs, outputs, size))


def linear(outputs, inputs):
    return WeightView(nn.Linear(inputs, outputs))


def counts(method, weights, sparsity, blocks=None, norms=None, **options):
    """The zeros of each weight, by default each in a block of its own and with inputs of norm 1."""
    if not isinstance(weights, dict):
        weights = {f"w{i}": weight for i, weight in enumerate(weights)}
    norms = norms or {name: torch.ones(weight.shape[1]) for name, weight in weights.items()}
    return list(allocate(method, weights, sparsity, blocks=blocks or {}, input_norms=norms, **options).values())


@st.composite
def models(draw):
    """Weights of several shapes and kinds, with values that often tie and zeros that are there already."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    share = draw(st.sampled_from([0.0, 0.1, 0.6]))
    distinct = draw(st.sampled_from([2, 1000]))
    weights = {}
    for i in range(draw(st.integers(1, 5))):
        rows, columns, kind = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.sampled_from("lct"))
        layer = {"l": nn.Linear, "t": Conv1D}.get(kind, nn.Linear)(columns, rows) if kind != "c" else None
        layer = layer or nn.Conv2d(columns, rows, 2)
        values = torch.randint(1, distinct + 1, layer.weight.shape, generator=generator).float()
        values[torch.rand(values.shape, generator=generator) < share] = 0
        layer.weight.data = values
        weights[f"w{i}"] = WeightView(layer)
    return weights


def entries_and_zeros(weights):
    matrices = [weight.matrix() for weight in weights.values()]
    return [m.numel() for m in matrices], [int((m == 0).sum()) for m in matrices]


@pytest.mark.parametrize("method", ALLOCATIONS)
@settings(max_examples=60)
@given(weights=models(), sparsity=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_the_total_is_exact_and_no_weight_leaves_its_bounds(method, weights, sparsity, seed):
    sizes, zeros = entries_and_zeros(weights)
    total = number_to_prune(sparsity, sum(sizes))
    most = [max(size - 1, zero) for size, zero in zip(sizes, zeros, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    norms = {name: torch.rand(weight.shape[1], generator=generator) for name, weight in weights.items()}
    blocks = {name: random.Random(seed + i).choice(["a", "b", None]) for i, name in enumerate(weights)}
    before = [weight.matrix().clone() for weight in weights.values()]
    if method == "uniform+":
        views = list(weights.values())
        convolutions = [i for i, view in enumerate(views) if isinstance(view.layer, nn.Conv2d)]
        linears = [i for i in range(len(views)) if i not in convolutions]
        for i in convolutions[:1]:
            most[i] = zeros[i]
        for i in linears[-1:]:
            most[i] = max(zeros[i], min(most[i], number_to_prune(0.8, sizes[i])))
    if not sum(zeros) <= total <= sum(most):
        with pytest.raises(ValueError, match="zeros in total"):
            counts(method, weights, sparsity, blocks, norms)
        return
    found = counts(method, weights, sparsity, blocks, norms)
    assert sum(found) == total
    assert all(low <= count <= high for low, count, high in zip(zeros, found, most, strict=True))
    assert all(torch.equal(a, b.matrix()) for a, b in zip(before, weights.values(), strict=True))


bounded_wishes = st.lists(
    st.tuples(st.floats(-5, 40), st.integers(0, 20), st.integers(0, 20)).map(
        lambda wish: (wish[0], min(wish[1:]), max(wish[1:]))
    ),
    min_size=1,
    max_size=8,
)


@given(bounded_wishes, st.floats(0, 1))
def test_apportionment_meets_every_total_within_the_bounds(wanted, where):
    wishes, least, most = map(list, zip(*wanted, strict=True))
    total = sum(least) + round(where * (sum(most) - sum(least)))
    found = apportion(wishes, total, least, most)
    assert sum(found) == total
    assert all(low <= count <= high for low, count, high in zip(least, found, most, strict=True))


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=8))
def test_whole_wishes_that_add_up_are_granted(wishes):
    assert apportion(wishes, sum(wishes), [0] * len(wishes), wishes) == wishes


@pytest.mark.parametrize(
    ("wishes", "total", "least", "most", "expected"),
    [
        # Largest remainders first, ties by order.
        ([1.2, 1.5, 1.3], 4, [0, 0, 0], [9, 9, 9], [1, 2, 1]),
        ([1.5, 1.5, 1.5, 1.5], 6, [0] * 4, [9] * 4, [2, 2, 1, 1]),
        # 0.1 + 0.2 is not 0.3: equal but for rounding errors.
        ([0.3, 0.1 + 0.2, 0.4], 1, [0] * 3, [1] * 3, [0, 0, 1]),
        ([0.5, 0.3 + 0.2 + 1e-12, 1.0], 2, [0] * 3, [2] * 3, [1, 0, 1]),
        # 6 beyond the first bound go by room, 10 and 20 of 30.
        ([10, 0, 0], 10, [0, 0, 0], [4, 10, 20], [4, 2, 4]),
        # 3 that the first has already come from what is above the others' own zeros, 2 and 4.
        ([1, 3, 5], 9, [4, 1, 1], [9, 9, 9], [4, 2, 3]),
    ],
)
def test_apportionment_by_hand(wishes, total, least, most, expected):
    assert apportion(wishes, total, least, most) == expected


def test_uniform_by_hand():
    # 0.5 of 4, 9 and 12 entries: 2, 4.5 and 6, of 12.
    assert counts("uniform", [linear(2, 2), linear(3, 3), linear(3, 4)], 0.5) == [2, 4, 6]
    assert counts("uniform", [linear(3, 3), linear(3, 3)], 0.5) == [5, 4]


def test_uniform_plus_leaves_the_first_convolution_and_a_fifth_of_the_last_linear_layer():
    layers = [convolution(5, 1, 2), convolution(5, 5, 2), linear(10, 5), linear(5, 10)]
    # 20, 100, 50 and 50 entries, 176 to prune: 40 of the last, and 136 of the 150 between.
    assert counts("uniform+", layers, 0.8) == [0, 91, 45, 40]
    # 110 of the 200 that are not in the first convolution.
    assert counts("uniform+", layers, 0.5) == [0, 55, 28, 27]


def test_uniform_plus_without_convolutions_is_uniform_up_to_four_fifths():
    layers = [linear(5, 10), linear(10, 10)]
    assert counts("uniform+", layers, 0.8) == counts("uniform", layers, 0.8) == [40, 80]
    assert counts("uniform+", layers, 0.84) == [46, 80]


def test_uniform_plus_takes_fused_experts_for_one_layer():
    experts = nn.Module()
    experts.up, experts.down = nn.Parameter(torch.ones(2, 5, 5)), nn.Parameter(torch.ones(2, 5, 5))
    layers = [WeightView(experts, name, i) for name in ("up", "down") for i in range(2)]
    assert counts("uniform+", layers, 0.86) == [23, 23, 20, 20]


def test_global_by_hand():
    layers = [weight([[1, -8], [3, 4]]), weight([[-2, 5, 6, 7]])]
    assert counts("global", layers, 0.25) == [1, 1]
    assert counts("global", layers, 0.5) == [3, 1]
    # 8 is the first layer's last.
    assert counts("global", layers, 0.75) == [3, 3]
    # Every one of the first layer is below the second.
    assert counts("global", [weight([[1, 2]]), weight([[3, 4, 5]])], 0.6) == [1, 2]


@settings(max_examples=40)
@given(models(), st.floats(0.6, 0.9))
def test_global_counts_are_those_of_one_threshold(weights, sparsity):
    sizes, zeros = entries_and_zeros(weights)
    masks = select_across([lambda view=view: view.matrix().abs() for view in weights.values()], sparsity)
    expected = [int((~mask).sum()) for mask in masks]
    assume(sum(zeros) <= sum(expected))
    assume(all(count < size for count, size in zip(expected, sizes, strict=True)))
    assert counts("global", weights, sparsity) == expected


def test_erk_by_hand():
    # Σ dims 8 and 12 of 16 and 32 entries; at 0.5, ε = 24 / 20 keeps 9.6 and 14.4.
    assert counts("erk", [linear(4, 4), linear(4, 8)], 0.5) == [6, 18]
    # A convolution's dims are 2 + 3 + 2 + 2 = 9 and the matrix's 9, of 24 and 20: ε = 22 / 18 keeps 11 of each.
    assert counts("erk", [convolution(2, 3, 2), linear(4, 5)], 0.5) == [13, 9]


def test_erk_makes_dense_what_would_be_more_than_dense_and_scales_the_others_anew():
    # Σ dims 2, 20 and 40 of 1, 100 and 400 entries, 126 to keep. ε = 126 / 62 asks for 4 of 1, which is dense; the
    # others share 125 by 20 : 40, 41.7 and 83.3, where the first ε would have given them 40.6 and 81.3.
    assert counts("erk", [linear(1, 1), linear(10, 10), linear(20, 20)], 0.75) == [0, 58, 317]
    # First 40 of 40 entries are over, then 22 of 22 as well.
    shapes = [linear(1, 40), linear(2, 11), linear(20, 20)]
    assert counts("erk", shapes, 0.5) == [0, 0, 231]


def test_lamp_by_hand():
    # Squares 1, 1, 2 and 4 score 1/8, 1/7, 1/3 and 1; squares 9, 16 and 25 score 9/50, 16/41 and 1.
    layers = [weight([[2.0, -1.0], [1.0, 2**0.5]]), weight([[5.0, -3.0, 4.0]])]
    for pruned, expected in enumerate([[0, 0], [1, 0], [2, 0], [2, 1], [3, 1], [3, 2]]):
        assert counts("lamp", layers, pruned / 7) == expected


def test_lamp_leaves_out_what_is_zero_already():
    layers = [weight([[2.0, 0.0, 1.0], [0.0, 1.0, 2**0.5]]), weight([[5.0, -3.0, 4.0]])]
    for pruned, expected in enumerate([[2, 0], [3, 0], [4, 0], [4, 1], [5, 1], [5, 2]]):
        assert counts("lamp", layers, (pruned + 2) / 9) == expected


@given(models(), st.floats(0.6, 0.9), st.integers(-20, 20))
def test_lamp_does_not_see_the_scale_of_a_weight(weights, sparsity, power):
    sizes, zeros = entries_and_zeros(weights)
    if sum(zeros) <= number_to_prune(sparsity, sum(sizes)) <= sum(sizes) - len(sizes):
        before = counts("lamp", weights, sparsity)
        with torch.no_grad():
            # A power of two, which rounds nothing.
            weights["w0"].storage.mul_(2.0**power)
        assert counts("lamp", weights, sparsity) == before


@pytest.mark.parametrize("method", ["global", "lamp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_keeps_one_entry_whatever_the_scores(method, dtype):
    # The small ones are lost beside the largest in every dtype: their scores round to those of zeros, and its to one.
    rows = [[[1e-4, 1e-4, 1e-4, 1e-4]], [[3e4, 1e-7, 1e-7, 1e-7]], [[3e4, 3e4, 3e4, 3e4]]]
    layers = [weight(row) for row in rows]
    for layer in layers:
        layer.layer.to(dtype)
    assert counts(method, layers, 9 / 12) == [3, 3, 3]


def test_a_weight_of_zeros_alone_changes_nothing_for_the_others():
    layers = [weight([[1, -8], [3, 4]]), weight([[0, 0, 0]]), weight([[-2, 5, 6, 7]])]
    assert counts("global", layers, 7 / 11) == [3, 3, 1]
    for method in ALLOCATIONS:
        assert sum(counts(method, layers, 7 / 11)) == 7
        assert counts(method, layers, 7 / 11)[1] == 3


# Ten entries each, M = 5: mean 1.9 and one outlier of 10; all alike, no outlier; mean 6.8 and one outlier of 50.
ONE_OUTLIER, NO_OUTLIER, LARGE_OUTLIER = [[1.0] * 9 + [10.0]], [[1.0] * 10], [[2.0] * 9 + [50.0]]


def test_owl_by_hand():
    layers = {
        "a.q": weight(ONE_OUTLIER * 10),
        "a.k": weight(ONE_OUTLIER * 10),
        "b.q": weight(NO_OUTLIER * 10),
        "b.k": weight(NO_OUTLIER * 10),
    }
    blocks = {name: name[0] for name in layers}
    # D is 10 and 0 percent, r 0.16 and 0, density 0.5 ± 0.08.
    assert counts("owl", layers, 0.5, blocks) == [42, 42, 58, 58]
    assert counts(OWL(spread=0.2), layers, 0.5, blocks) == [30, 30, 70, 70]
    # Beyond 1.9 · 6 nothing is an outlier.
    assert counts(OWL(outlier_factor=6.0), layers, 0.5, blocks) == [50, 50, 50, 50]
    # Each in its own block outside of all.
    assert counts("owl", layers, 0.5, dict.fromkeys(layers)) == [42, 42, 58, 58]


def test_owl_compares_with_the_mean_of_the_whole_block():
    layers = {"a.q": weight(NO_OUTLIER), "a.k": weight([[100.0] * 2 + [1.0] * 8]), "b.q": weight(ONE_OUTLIER * 2)}
    blocks = {name: name[0] for name in layers}
    # In block a the mean is 218 / 20 and two of 20 are outliers, though none of a.k is beyond five times its own mean
    # of 20.8; in block b two of 20 are. The ratios are equal.
    assert counts("owl", layers, 0.5, blocks) == [5, 5, 10]
    assert counts("owl", layers, 0.5, {"b.q": "b"}) != [5, 5, 10]


def test_owl_scores_by_wanda():
    layers = {"a": weight([[1.0] * 10] * 10), "b": weight([[1.0] * 10] * 10)}
    norms = {"a": torch.ones(10), "b": torch.tensor(ONE_OUTLIER[0])}
    assert counts("owl", layers, 0.5, dict.fromkeys(layers), norms) == [58, 42]


def test_owl_counts_blocks_by_their_entries():
    layers = [weight(ONE_OUTLIER * 10), weight(NO_OUTLIER * 30)]
    # r is 0.16 and 0 with mean 0.04 over entries, densities 0.62 and 0.46.
    assert counts("owl", layers, 0.5) == [38, 162]


def test_owl_stops_at_dense_and_the_others_make_up_for_it():
    layers = [weight(ONE_OUTLIER * 10), weight(NO_OUTLIER * 10)]
    # Densities 1.03 and 0.87.
    assert counts("owl", layers, 0.05) == [0, 10]


def test_the_order_of_the_weights_does_not_matter():
    torch.manual_seed(0)
    layers = {f"w{i}": weight(torch.randn(shape)) for i, shape in enumerate([(8, 16), (16, 24), (5, 7), (3, 40)])}
    for method in ("global", "erk", "lamp", "owl"):
        found = dict(zip(layers, counts(method, layers, 0.7), strict=True))
        turned = dict(reversed(layers.items()))
        assert dict(zip(turned, counts(method, turned, 0.7), strict=True)) == found


def test_the_users_own_sparsities_are_rounded_to_the_total():
    layers = {"a": linear(3, 3), "b": linear(3, 3), "c": linear(9, 2)}
    # 2.25, 6.75 and 9 of 18.
    assert counts({"a": 0.25, "b": 0.75, "c": 0.5}, layers, 0.5) == [2, 7, 9]
    # 4.5, 4.5 and 9: equal remainders go by order, whatever the order of the mapping.
    assert counts({"c": 0.5, "b": 0.5, "a": 0.5}, layers, 0.5) == [5, 4, 9]
    # 20 are two more than 18, within one for each of three.
    assert sum(counts({"a": 5 / 9, "b": 5 / 9, "c": 10 / 18}, layers, 0.5)) == 18


@pytest.mark.parametrize(
    ("method", "sparsity", "words"),
    [
        ({"a": 0.5, "b": 0.5, "c": 0.5}, 0.5, "has one for 'c'"),
        ({"a": 0.5, "b": 1.0}, 0.5, r"`sparsity` must be in \[0, 1\), got 1.0"),
        (
            {"a": 0.5, "b": 0.5},
            0.6,
            "give 21 zeros in total, 0.583333 of the entries, got sparsities that give 18, 0.5",
        ),
        ("uniform", 1.0, r"`sparsity` must be in \[0, 1\), got 1.0"),
        # One entry of each may not go.
        ("global", 35 / 36, "between 0 and 34 zeros in total, .* got one that gives 35"),
        # A last layer that keeps a fifth.
        ("uniform+", 33 / 36, "between 0 and 31 zeros in total, .* got one that gives 33"),
    ],
)
def test_what_cannot_be_met_is_refused(method, sparsity, words):
    with pytest.raises(ValueError, match=words):
        counts(method, {"a": linear(3, 6), "b": linear(3, 6)}, sparsity)


def test_fewer_zeros_than_there_are_are_refused():
    layers = [weight([[0, 0, 0, 1]]), weight([[1, 1, 1, 1]])]
    assert counts("uniform", layers, 3 / 8) == [3, 0]
    with pytest.raises(ValueError, match="between 3 and 6 zeros in total, .* got one that gives 2"):
        counts("uniform", layers, 2 / 8)


def n_of(layers, pattern, blocks, **options):
    norms = {name: torch.ones(layer.shape[1]) for name, layer in layers.items()}
    found = OWL(**options).mixed(Budget(layers, pattern.sparsity, blocks, norms), pattern)
    assert {(p.m, p.allow_ragged) for p in found.values()} == {(pattern.m, pattern.allow_ragged)}
    return [p.n for p in found.values()]


def test_mixed_semi_structured_by_hand():
    # D is 100 / 8, 0 and 0 percent with M = 6: r = 2, 0, 0 and n - 2/3 + r = 16/3, 10/3, 10/3 for n = 4: of
    # equal remainders the first is rounded up.
    outlier, plain = [[1.0] * 7 + [100.0]], [[1.0] * 8]
    layers = {"a.q": weight(outlier), "a.k": weight(outlier), "b.q": weight(plain), "b.k": weight(plain)}
    layers |= {"c.q": weight(plain), "c.k": weight(plain)}
    blocks = {name: name[0] for name in layers}
    assert n_of(layers, SemiStructured(4, 8), blocks) == [6, 6, 3, 3, 3, 3]
    # Ends at dense, and at one of eight.
    assert n_of(layers, SemiStructured(8, 8), blocks) == [8] * 6
    assert n_of(layers, SemiStructured(1, 8), blocks) == [1] * 6
    assert n_of(layers, SemiStructured(4, 8), blocks, spread=6.0) == [8, 8, 2, 2, 2, 2]


@given(
    st.lists(st.tuples(st.sampled_from([(4, 8), (2, 16)]), st.integers(0, 99)), min_size=1, max_size=6),
    st.integers(1, 8),
    st.floats(0, 9),
)
def test_mixed_semi_structured_keeps_as_many_entries_as_one_pattern(blocks, n, spread):
    layers = {}
    for i, (shape, seed) in enumerate(blocks):
        generator = torch.Generator().manual_seed(seed)
        for kind in "qk":
            layers[f"{i}.{kind}"] = weight(torch.randn(shape, generator=generator).exp())
    found = n_of(layers, SemiStructured(n, 8), {name: name[0] for name in layers}, spread=spread, outlier_factor=2.0)
    sizes = [layer.matrix().numel() for layer in layers.values()]
    assert sum(n * size for n, size in zip(found, sizes, strict=True)) == n * sum(sizes)
    assert all(1 <= own <= 8 for own in found)
    assert found[::2] == found[1::2]


def test_scores_of_one_weight_are_read_at_a_time():
    """No method asks for a weight while it holds another's."""
    live, most = [0], [0]

    class Counted(WeightView):
        def matrix(self):
            matrix = super().matrix().clone()
            live[0] += 1
            most[0] = max(most[0], live[0])
            weakref.finalize(matrix, lambda: live.__setitem__(0, live[0] - 1))
            return matrix

    layers = [Counted(linear(4, 6).layer) for _ in range(5)]
    for method in ALLOCATIONS:
        counts(method, layers, 0.5)
    assert most[0] == 1
