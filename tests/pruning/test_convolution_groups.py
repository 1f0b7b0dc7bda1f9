"""A convolution with groups is pruned as its groups would be as convolutions of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_sparse import Criterion, Fit, LeastSquares, Swap, prune, reconstruct
from peft_sparse.calibration.statistics import Statistics
from peft_sparse.model.weights import WeightView
from peft_sparse.pruning.criteria import CRITERIA
from peft_sparse.pruning.grouped import solved
from peft_sparse.pruning.patterns import SemiStructured, Unstructured, number_to_prune
from peft_sparse.pruning.sparsegpt import SparseGPT


class Parts(nn.Module):
    """The groups of a convolution as convolutions of their own, each on its slice of the channels."""

    def __init__(self, whole):
        super().__init__()
        self.parts = nn.ModuleList()
        inputs, outputs = whole.in_channels // whole.groups, whole.out_channels // whole.groups
        for group in range(whole.groups):
            part = nn.Conv2d(inputs, outputs, whole.kernel_size, padding=whole.padding)
            part.weight.data = whole.weight.detach()[group * outputs : (group + 1) * outputs].clone()
            part.bias.data = whole.bias.detach()[group * outputs : (group + 1) * outputs].clone()
            self.parts.append(part)

    def forward(self, x):
        return torch.cat([part(own) for part, own in zip(self.parts, x.chunk(len(self.parts), 1), strict=True)], 1)


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(layer) for layer in layers)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def convolutions(groups=4, channels=8, outputs=16, **options):
    """The same two convolutions, once with groups and once in parts."""
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(channels, outputs, 2, padding=1, groups=groups, **options),
        nn.Conv2d(outputs, channels, 2, padding=1, groups=groups, **options),
    ]
    # Parts first: pruning is in place.
    return Model(*map(Parts, layers)), Model(*layers)


def images():
    # Channels of different scales: with the norms of another group, other entries would be pruned.
    scale = torch.tensor([1.0, 9, 3, 0.2, 5, 1, 0.1, 2])[:, None, None]
    return [{"x": torch.randn(3, 8, 5, 4, generator=torch.Generator().manual_seed(i)) * scale} for i in range(2)]


def matrices(model):
    """The matrix of each layer, of the parts or of the whole."""
    parts = [block[0].parts if isinstance(block[0], Parts) else [block[0]] for block in model.blocks]
    return [torch.cat([WeightView(layer).matrix() for layer in layers]) for layers in parts]


HOW = {
    "wanda": {"criterion": "wanda"},
    "wanda 2:4": {"criterion": "wanda", "pattern": "2:4"},
    "ria in rows": {"criterion": "ria", "group": "row"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "sparsegpt 2:4": {"criterion": "sparsegpt", "pattern": "2:4"},
    "sparsegpt in blocks": {"criterion": SparseGPT(block_size=4), "pattern": "2:4"},
    "dsnot": {"criterion": "wanda", "refinement": "dsnot"},
    "swap": {"criterion": "wanda", "refinement": Swap(candidates=8)},
    "update": {"criterion": "wanda", "update": LeastSquares(max_iterations=10)},
    "a function": {"criterion": Criterion(lambda w, s: w.abs() * s.input_mean.abs(), group="row", needs=("moments",))},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("groups", [2, 8])
def test_groups_are_pruned_as_convolutions_of_their_own(how, groups):
    parts, whole = convolutions(groups)
    options = {"pattern": 0.5} | HOW[how]
    prune(parts, calibration=images(), **options)
    report = prune(whole, calibration=images(), **options)
    for expected, found in zip(matrices(parts), matrices(whole), strict=True):
        assert torch.equal(found == 0, expected == 0)
        torch.testing.assert_close(found, expected)
    assert all(0 < weight.error < 1 for weight in report.weights)


def test_reported_errors_are_those_of_the_outputs():
    _, whole = convolutions()
    (batch, *_), layer = images(), whole.blocks[0][0]
    with torch.no_grad():
        before = layer(batch["x"]) - layer.bias[:, None, None]
        report = prune(whole, 0.5, [batch], criterion="wanda")
        after = layer(batch["x"]) - layer.bias[:, None, None]
    assert report.weights[0].error == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_prunes_exactly(criterion):
    if criterion == "gblm":
        pytest.skip("it needs a loss")
    _, whole = convolutions(8)
    prune(whole, 0.35, images(), criterion=criterion)
    for matrix in matrices(whole):
        assert int((matrix == 0).sum()) == number_to_prune(0.35, matrix.numel())


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 0.99), st.integers(2, 4), st.integers(1, 3), st.integers(2, 9), st.integers(0, 20))
def test_the_total_of_sparsegpt_is_exact_whatever_the_groups_hold(sparsity, groups, rows, columns, zeros):
    torch.manual_seed(0)
    weight = torch.randn(groups * rows, columns)
    weight.view(-1)[torch.randperm(weight.numel())[:zeros]] = 0
    inputs = torch.randn(groups, 30, columns)
    inputs[0] = 0  # a group whose inputs were all zero
    statistics = Statistics(input_norm=inputs.norm(dim=1), hessian=inputs.mT @ inputs)
    found, mask = solved(SparseGPT(), weight, statistics, Unstructured(sparsity))
    assert int((~mask).sum()) == max(number_to_prune(sparsity, weight.numel()), int((weight == 0).sum()))
    assert not found[~mask].any()
    assert not mask[weight == 0].any()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4), SemiStructured(3, 18)])
def test_small_groups_that_are_solved_together_are_solved_as_one_by_one(pattern):
    rule, weights, inputs = SparseGPT(), torch.randn(5, 3, 36), torch.randn(5, 60, 36)
    hessians = inputs.mT @ inputs
    together = rule.solve_together(weights, hessians, pattern)
    for group, (found, mask) in enumerate(zip(*together, strict=True)):
        expected, kept = rule.solve(weights[group], Statistics(hessian=hessians[group]), pattern)
        assert torch.equal(mask, kept)
        torch.testing.assert_close(found, expected)


def test_groups_are_compared_across_the_model_and_take_part_in_allocations():
    for options in ({"group": "model"}, {"allocation": "owl"}, {"allocation": "lamp"}):
        parts, whole = convolutions()
        prune(parts, 0.5, images(), criterion="wanda", **options)
        prune(whole, 0.5, images(), criterion="wanda", **options)
        if "group" in options:
            for expected, found in zip(matrices(parts), matrices(whole), strict=True):
                assert torch.equal(found == 0, expected == 0)
        assert sum(int((matrix == 0).sum()) for matrix in matrices(whole)) == 128


@pytest.mark.parametrize("region", ["matrix", "block"])
def test_groups_are_reconstructed(region):
    _, whole = convolutions()
    report = reconstruct(whole, 0.5, images(), criterion="wanda", region=region, fit=Fit(max_steps=2))
    assert all(found.error <= found.error_pruned for found in report.regions)
    assert all(int((matrix == 0).sum()) * 2 == matrix.numel() for matrix in matrices(whole))
