"""Cuts: nothing is held twice, and whoever else holds a parameter keeps its values."""

import gc

import pytest
import torch
from torch import nn

from peft_sparse.structured.cutting import Cuts


KEPT = torch.tensor([True, False, True, True, False])


def held_numbers():
    """How many float64 numbers all living tensors hold."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.dtype == torch.float64]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 8 for t in tensors}.values())


def layer():
    return nn.Linear(5, 5, dtype=torch.float64)


@pytest.mark.parametrize("dim", [0, 1])
def test_no_number_is_held_twice(dim):
    cut = layer()
    size = held_numbers()
    with Cuts() as cuts:
        cuts.cut(cut, dim, KEPT)
        assert held_numbers() == size
    assert (cut.out_features, cut.in_features) == tuple(cut.weight.shape) == ((3, 5), (5, 3))[dim]
    assert held_numbers() == size - (12 if dim == 0 else 10)


@pytest.mark.parametrize("stride", [(5, 1), (1, 5)])
@pytest.mark.parametrize("inference", [False, True])
def test_after_an_interrupt_every_parameter_is_what_it_was(stride, inference):
    with torch.inference_mode(inference):
        cut = layer()
        cut.weight = nn.Parameter(cut.weight.detach().as_strided((5, 5), stride))
    cut.weight.mark = "of the user"
    objects, values = [cut.weight, cut.bias], [cut.weight.detach().clone(), cut.bias.detach().clone()]

    def interrupted():
        with Cuts() as cuts:
            cuts.cut(cut, 0, KEPT)
            cuts.cut(cut, 1, KEPT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert cut.weight is objects[0]
    assert cut.bias is objects[1]
    assert all(torch.equal(one, other) for one, other in zip(objects, values, strict=True))
    assert (cut.weight.stride(), cut.weight.mark) == (stride, "of the user")
    assert (cut.out_features, cut.in_features) == (5, 5)


def test_a_parameter_that_something_else_holds_keeps_its_values():
    cut, other, inputs = layer(), layer(), torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    other.weight = cut.weight
    values, loss = cut.weight.detach().clone(), cut(inputs).square().sum()
    with Cuts() as cuts:
        cuts.cut(cut, 0, KEPT)
    assert torch.equal(cut.weight, values[KEPT])
    assert torch.equal(other.weight, values)
    loss.backward()
    assert other.weight.grad.shape == (5, 5)
