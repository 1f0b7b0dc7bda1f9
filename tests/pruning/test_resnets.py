"""Convolutions throughout: what is measured, pruned, trained, merged and reconstructed in a ResNet."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, SparseTrainer, prune, reconstruct, sparsity
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.pruning.criteria import CRITERIA
from peft_sparse.reconstruction import Fit

from checks import assert_same_zeros, zeros_of
from trainers import arguments


@pytest.fixture
def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config)
    model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.fixture
def images():
    return [{"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(0, 3, (4,))} for _ in range(3)]


def test_layers_that_see_other_patches_of_one_input_are_measured_apart(resnet, images):
    """The first convolution of a stage and its shortcut are given the same tensor."""
    expected = {}

    def patches(name):
        def hook(layer, args):
            rows = nn.functional.unfold(args[0], layer.kernel_size, padding=layer.padding, stride=layer.stride)
            expected[name] = expected.get(name, 0) + rows.square().sum((0, 2))

        return hook

    found = {}

    def keep(weight, statistics):
        found[tuple(weight.shape), weight.sum().item()] = statistics.input_norm
        return weight.abs()

    weights = prunable_weights(resnet)
    assert len(weights) == 9
    keys = {name: (w.shape, w.matrix().sum().item()) for name, w in weights.items()}
    hooks = [w.layer.register_forward_pre_hook(patches(name)) for name, w in weights.items()]
    with torch.no_grad():
        for batch in images:
            resnet(**batch)
    for hook in hooks:
        hook.remove()
    prune(resnet, 0.0, criterion=keep, calibration=images)
    assert len(found) == 9
    for name, key in keys.items():
        torch.testing.assert_close(found[key], expected[name].sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_prunes_it_exactly(resnet, images, criterion):
    report = prune(resnet, 0.5, criterion=criterion, calibration=images)
    assert sparsity(resnet) == report.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(0 < weight.error < 1 for weight in report.weights)


class Plain(nn.Module):
    """A model of nobody's class, whose loss comes in a dict."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(2))

    def forward(self, pixel_values, labels=None):
        for block in self.blocks:
            pixel_values = block(pixel_values)
        return {"loss": nn.functional.cross_entropy(pixel_values.mean((2, 3)), labels)}


def test_a_loss_in_a_dict_is_found(images):
    model = Plain()
    prune(model, 0.5, criterion="gblm", calibration=images)
    assert sparsity(model) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("region", ["submodule", "block", "matrix"])
def test_it_is_reconstructed(resnet, images, region):
    report = reconstruct(resnet, 0.5, images, criterion="wanda", region=region, fit=Fit(learning_rate=1e-3, holdout=0))
    assert sum(r.error for r in report.regions) < sum(r.error_pruned for r in report.regions)
    assert sparsity(resnet) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig, None])
def test_it_is_retrained_and_merged_with_its_zeros(resnet, images, tmp_path, config):
    prune(resnet, 0.5)
    zeros, model = zeros_of(resnet), resnet
    if config is not None:
        model = get_peft_model(resnet, config(r=2, target_modules=r".*convolution", train_norms=True))
    samples = [{name: value[i] for name, value in batch.items()} for batch in images for i in range(4)]
    trainer = SparseTrainer(model, arguments(tmp_path, max_steps=20), train_dataset=samples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_same_zeros(resnet if config is None else model.merge_and_unload(), zeros)
