import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sparse.model.weights import WeightView, as_matrix, as_stored, input_rows


LAYERS = [nn.Linear(6, 4), Conv1D(4, 6), nn.Conv2d(2, 4, (1, 3)), nn.Conv2d(4, 4, 3, groups=2)]


class Experts(nn.Module):
    """Three experts of four outputs and six inputs, in either layout."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn((3, 6, 4) if is_transposed else (3, 4, 6)))


def views():
    layers = [WeightView(layer) for layer in LAYERS]
    return layers + [WeightView(Experts(is_transposed), "up", 1) for is_transposed in (False, True)]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_rows_are_outputs_and_columns_are_inputs(layer):
    matrix = WeightView(layer).matrix()
    assert matrix.shape == (4, layer.weight.numel() // 4)
    assert torch.equal(as_stored(layer, as_matrix(layer, layer.weight)), layer.weight)


@pytest.mark.parametrize("view", views(), ids=lambda view: repr(view.layer))
def test_zeros_are_written_where_the_mask_says(view):
    before = view.matrix().clone()
    mask = torch.rand(before.shape) > 0.5
    view.write_zeros(mask)
    assert torch.equal(view.matrix(), before * mask)


@pytest.mark.parametrize("view", views(), ids=lambda view: repr(view.layer))
def test_a_written_weight_is_read_back(view):
    matrix = torch.randn(view.shape, dtype=torch.float64)
    view.write(matrix)
    assert view.matrix().dtype == torch.float32
    assert torch.equal(view.matrix(), matrix.float())
    assert view.storage.requires_grad


@pytest.mark.parametrize("is_transposed", [False, True])
def test_an_expert_is_one_slice_and_leaves_the_others_alone(is_transposed):
    experts = Experts(is_transposed)
    before = experts.up.detach().clone()
    view = WeightView(experts, "up", 1)
    assert view.shape == (4, 6)
    assert torch.equal(view.matrix(), before[1].T if is_transposed else before[1])
    assert torch.equal(view.matrix_of(before + 1), view.matrix() + 1)
    view.write_zeros(torch.zeros(4, 6, dtype=torch.bool))
    assert not experts.up[1].any()
    assert torch.equal(experts.up[0], before[0])
    assert torch.equal(experts.up[2], before[2])


def test_a_matrix_is_a_view_that_costs_no_memory():
    for view in views():
        assert view.matrix().untyped_storage().data_ptr() == view.storage.untyped_storage().data_ptr()
        assert not view.matrix().requires_grad


def test_zeros_are_written_into_any_memory_format():
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    mask = torch.rand(4, 36) > 0.5
    WeightView(layer).write_zeros(mask)
    assert torch.equal(WeightView(layer).matrix() != 0, mask)
    WeightView(layer).write(mask.float())
    assert torch.equal(WeightView(layer).matrix(), mask.float())
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(6, 4, bias=False), torch.randn(2, 3, 6)),
        (nn.Linear(6, 4, bias=False), torch.randn(5, 6)),
        (Conv1D(4, 6), torch.randn(2, 3, 6)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2, bias=False), torch.randn(2, 3, 9, 9)),
        (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2), bias=False), torch.randn(2, 3, 9, 7)),
        (nn.Conv2d(3, 4, 3, padding="valid", bias=False), torch.randn(2, 3, 9, 7)),
        (nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect", bias=False), torch.randn(2, 3, 9, 7)),
        (nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode="circular", bias=False), torch.randn(2, 3, 9, 7)),
        (nn.Conv2d(3, 4, 3, bias=False), torch.randn(3, 9, 7)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "x".join(map(str, value.shape)),
)
def test_rows_of_inputs_times_the_matrix_are_the_outputs(layer, inputs):
    outputs = layer(inputs)
    rows = input_rows(layer, inputs)
    outputs = outputs.view(-1, *outputs.shape[-3:]).flatten(2).mT if isinstance(layer, nn.Conv2d) else outputs
    torch.testing.assert_close(rows @ WeightView(layer).matrix().T, outputs.reshape(len(rows), 4))


@pytest.mark.parametrize("groups", [2, 6])
def test_each_group_of_a_convolution_has_rows_of_its_own(groups):
    layer, inputs = nn.Conv2d(6, 12, 3, groups=groups, padding="same", bias=False), torch.randn(2, 6, 5, 4)
    rows = input_rows(layer, inputs)
    assert rows.shape == (groups, 2 * 5 * 4, 6 // groups * 9)
    outputs = torch.cat([*(rows @ WeightView(layer).matrix().view(groups, 12 // groups, -1).mT)], dim=1)
    torch.testing.assert_close(outputs, layer(inputs).flatten(2).mT.flatten(0, 1))
