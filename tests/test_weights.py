import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse.weights import as_matrix, as_stored, weight_matrix, write_zeros


LAYERS = [nn.Linear(6, 4), Conv1D(4, 6), nn.Conv2d(2, 4, (1, 3)), nn.Conv2d(4, 4, 3, groups=2)]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_rows_are_outputs_and_columns_are_inputs(layer):
    matrix = weight_matrix(layer)
    assert matrix.shape == (4, layer.weight.numel() // 4)
    assert torch.equal(as_stored(layer, as_matrix(layer, layer.weight)), layer.weight)


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_zeros_are_written_where_the_mask_says(layer):
    before = weight_matrix(layer).clone()
    mask = torch.rand(before.shape) > 0.5
    write_zeros(layer, mask)
    assert torch.equal(weight_matrix(layer), before * mask)


def test_zeros_are_written_into_any_memory_format():
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    mask = torch.rand(4, 36) > 0.5
    write_zeros(layer, mask)
    assert torch.equal(weight_matrix(layer) != 0, mask)
