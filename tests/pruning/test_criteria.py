import math

import pytest
import torch

from peft_sparse import GBLM, RIA, Criterion, Magnitude, Random, SparseGPT, Statistics, Wanda
from peft_sparse.pruning.criteria import CRITERIA, find_criterion


WEIGHT = torch.tensor([[1.0, -2.0], [3.0, -0.5]])
# X = [[3, 0], [4, 4]]: ||X_1|| = 5, ||X_2|| = 4.
INPUTS = torch.tensor([[3.0, 0.0], [4.0, 4.0]])
NORMS = Statistics(input_norm=INPUTS.norm(dim=0))


def test_magnitude_by_hand():
    assert Magnitude().score(WEIGHT, Statistics()).tolist() == [[1.0, 2.0], [3.0, 0.5]]


def test_wanda_by_hand():
    assert Wanda().score(WEIGHT, NORMS).tolist() == [[5.0, 8.0], [15.0, 2.0]]


def test_ria_by_hand():
    # Columns sum to 4 and 2.5, rows to 3 and 3.5; √5 and √4 weigh the columns.
    expected = [
        [(1 / 4 + 1 / 3) * math.sqrt(5), (2 / 2.5 + 2 / 3) * 2],
        [(3 / 4 + 3 / 3.5) * math.sqrt(5), (0.5 / 2.5 + 0.5 / 3.5) * 2],
    ]
    torch.testing.assert_close(RIA().score(WEIGHT, NORMS), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ria_of_zero_rows_and_columns_by_hand(dtype):
    weight = torch.tensor([[2.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, -6.0]], dtype=dtype)
    norm = torch.tensor([1.0, 9.0, 0.0])
    # Rows sum to 4, 0 and 8; columns to 4, 0 and 8; the third input was never active.
    expected = torch.tensor([[2 / 4 + 2 / 4, 0, 0], [0, 0, 0], [2 / 4 + 2 / 8, 0, 0]])
    assert torch.equal(RIA().score(weight, Statistics(input_norm=norm)), expected)


def test_gblm_by_hand():
    # Over 4 sequences the norms are 5 / 2 and 4 / 2; the gradients count a hundredfold.
    gradient = torch.tensor([[0.01, 0.0], [0.02, 0.1]])
    statistics = Statistics(input_norm=NORMS.input_norm, gradient=gradient, sequences=4)
    expected = [[1 * (2.5 + 1), 2 * (2 + 0)], [3 * (2.5 + 2), 0.5 * (2 + 10)]]
    torch.testing.assert_close(GBLM().score(WEIGHT, statistics), torch.tensor(expected))


def test_gblm_of_zero_rows_and_columns_by_hand():
    weight = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    statistics = Statistics(input_norm=torch.zeros(2), gradient=torch.full((2, 2), 0.02), sequences=1)
    torch.testing.assert_close(GBLM().score(weight, statistics), torch.tensor([[0.0, 2.0], [0.0, 0.0]]))


def test_random_repeats_with_the_seed():
    torch.manual_seed(3)
    first = Random().score(WEIGHT, Statistics())
    torch.manual_seed(3)
    assert torch.equal(first, Random().score(WEIGHT, Statistics()))
    assert not torch.equal(first, Random().score(WEIGHT, Statistics()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wanda", "ria", "gblm"])
def test_half_precision_weights_are_scored_in_float32(name, dtype):
    weight, norm = torch.randn(5, 4), torch.rand(4) * 1e5
    statistics = Statistics(input_norm=norm, gradient=torch.rand(5, 4), sequences=3)
    score = CRITERIA[name]().score
    found, expected = score(weight.to(dtype), statistics), score(weight.to(dtype).float(), statistics)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_scoring_changes_neither_the_weight_nor_the_statistics():
    statistics = Statistics(input_norm=torch.rand(2), gradient=torch.rand(2, 2), sequences=2)
    before = WEIGHT.clone(), statistics.input_norm.clone(), statistics.gradient.clone()
    for criterion in (Magnitude(), Random(), Wanda(), RIA(), GBLM()):
        criterion.score(WEIGHT, statistics).mul_(2).add_(1)
    assert torch.equal(WEIGHT, before[0])
    assert torch.equal(statistics.input_norm, before[1])
    assert torch.equal(statistics.gradient, before[2])


def test_defaults_are_those_of_the_papers():
    assert {name: (getattr(rule, "group", None), rule.needs) for name, rule in CRITERIA.items()} == {
        "magnitude": ("matrix", ()),
        "random": ("matrix", ()),
        "wanda": ("row", ("inputs",)),
        "ria": ("matrix", ("inputs",)),
        "sparsegpt": (None, ("hessian",)),
        "gblm": ("row", ("inputs", "gradients")),
    }
    assert (RIA(), GBLM(), SparseGPT()) == (RIA(0.5), GBLM(100.0), SparseGPT(0.01, 128))


def test_the_numbers_of_a_criterion_enter_its_scores():
    torch.testing.assert_close(
        RIA(exponent=1).score(WEIGHT, NORMS), RIA().score(WEIGHT, NORMS) * NORMS.input_norm.sqrt()
    )
    statistics = Statistics(input_norm=NORMS.input_norm, gradient=torch.rand(2, 2), sequences=1)
    torch.testing.assert_close(GBLM(gradient_scale=0).score(WEIGHT, statistics), Wanda().score(WEIGHT, NORMS))


def test_a_criterion_is_found_by_name_by_function_and_as_it_is():
    class Scorer:
        def __call__(self, weight, statistics):
            return weight.abs()

    def squared(weight, statistics):
        return weight.square()

    own = Criterion(squared, group="model", needs=("inputs",))
    assert find_criterion("ria") == ("ria", RIA())
    assert find_criterion(RIA(exponent=1)) == ("ria(exponent=1)", RIA(exponent=1))
    assert find_criterion(squared) == ("squared", Criterion(squared, group="matrix"))
    assert find_criterion(own) == ("squared", own)
    assert find_criterion(Scorer())[0] == "Scorer"
