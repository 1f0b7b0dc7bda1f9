import torch

from peft_sparse.criteria import CRITERIA, magnitude, random, wanda


WEIGHT = torch.tensor([[1.0, -2.0], [3.0, -0.5]])


def test_magnitude_by_hand():
    assert magnitude(WEIGHT).tolist() == [[1.0, 2.0], [3.0, 0.5]]


def test_wanda_by_hand():
    # X = [[3, 0], [4, 2]]: ||X_1|| = 5, ||X_2|| = 2.
    norm = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).norm(dim=0)
    assert wanda(WEIGHT, norm).tolist() == [[5.0, 4.0], [15.0, 1.0]]


def test_random_repeats_with_the_seed():
    torch.manual_seed(3)
    first = random(WEIGHT)
    torch.manual_seed(3)
    assert torch.equal(first, random(WEIGHT))
    assert not torch.equal(first, random(WEIGHT))


def test_defaults_are_those_of_the_papers():
    assert {name: (rule.group, rule.needs_inputs) for name, rule in CRITERIA.items()} == {
        "magnitude": ("matrix", False),
        "random": ("matrix", False),
        "wanda": ("row", True),
    }
