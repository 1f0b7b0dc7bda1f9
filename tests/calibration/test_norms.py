"""New statistics of normalisation layers: exact for all data, and everything else stays as it is."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification

from peft_sparse import MaskLoRAConfig, prune
from peft_sparse.calibration.norms import recalibrate_norms

from trainers import in_two_processes


class Net(nn.Module):
    """Norms one after the other, beside each other, of every kind, with dropout between them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)
        self.shortcut, self.bn3 = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)
        self.instance = nn.InstanceNorm2d(6, track_running_stats=True)
        self.without = nn.BatchNorm2d(6, track_running_stats=False)
        self.drop, self.fc, self.bn4 = nn.Dropout(0.5), nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)) + self.bn3(input=self.shortcut(x))
        x = self.instance(x).relu()
        return self.bn4(self.fc(self.drop(x.mean((2, 3)))))


NORMS = ["bn1", "bn2", "bn3", "instance", "bn4"]


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def images():
    return 3 * torch.randn(11, 3, 8, 8) + 1


def inputs_of(model, images, names=NORMS):
    """What each norm is given in evaluation mode."""
    found, model = {}, copy.deepcopy(model).eval()
    for name in names:
        hook = lambda norm, args, kwargs, name=name: found.update({name: [*args, *kwargs.values()][0]})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(images)
    return found


def assert_exact(model, images):
    for name, x in inputs_of(model, images).items():
        norm, x = model.get_submodule(name), x.double().reshape(*x.shape[:2], -1)
        if name == "instance":
            mean, var = x.mean(2).mean(0), x.var(2).mean(0)
        else:
            mean, var = x.transpose(0, 1).flatten(1).mean(1), x.transpose(0, 1).flatten(1).var(1)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-5, msg=name)


def test_every_norm_has_the_mean_and_variance_of_its_inputs_on_all_images(net, images):
    report = recalibrate_norms(net, [{"x": images[:7]}, {"x": images[7:8]}, {"x": images[8:]}])
    assert report.norms == tuple(NORMS)
    assert (report.samples, int(net.bn1.num_batches_tracked)) == (11, 3)
    assert str(report).startswith("New statistics of 5 normalisation layers from 11 samples, in ")
    assert_exact(net, images)


def test_the_division_into_batches_and_the_order_do_not_matter(net, images):
    first, other = copy.deepcopy(net), copy.deepcopy(net)
    recalibrate_norms(first, images)
    recalibrate_norms(other, images.flip(0), batch_size=1)
    for (name, ours), theirs in zip(first.named_buffers(), other.buffers(), strict=True):
        if "num_batches" not in name:
            torch.testing.assert_close(ours, theirs, msg=name)


def test_everything_else_stays_as_it_is(net, images):
    net.train()
    net.bn2.eval()
    net(images).sum().backward()
    kept = {name: p.clone() for name, p in net.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    modes, momenta = [m.training for m in net.modules()], [getattr(m, "momentum", None) for m in net.modules()]
    state = torch.get_rng_state()
    recalibrate_norms(net, DataLoader(TensorDataset(images, torch.zeros(11)), batch_size=4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert [getattr(m, "momentum", None) for m in net.modules()] == momenta
    assert all(torch.equal(p, kept[name]) for name, p in net.named_parameters())
    assert all(torch.equal(net.get_parameter(name).grad, gradient) for name, gradient in gradients.items())
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert_exact(net, images)


def test_a_hook_that_waits_for_its_module_is_called_to_its_end(net, images):
    before, after = [], []
    net.register_forward_pre_hook(lambda *_: before.append(1))
    net.register_forward_hook(lambda *_: after.append(1))
    recalibrate_norms(net, images)
    assert len(before) == len(after) > 0
    assert_exact(net, images)


def test_a_norm_that_runs_twice_is_measured_in_both_calls(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x) + self.bn(2 * x)

    model = Twice()
    recalibrate_norms(model, images, batch_size=4)
    seen = torch.cat([images, 2 * images]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.bn.running_mean, seen.mean(1))
    torch.testing.assert_close(model.bn.running_var, seen.var(1))


def test_a_norm_that_only_training_uses_can_keep_its_statistics(net, images):
    net.auxiliary = nn.BatchNorm2d(3)
    report = recalibrate_norms(net, images, keep_unreached=True)
    assert report.norms == tuple(NORMS)
    assert torch.equal(net.auxiliary.running_mean, torch.zeros(3))
    assert_exact(net, images)


def test_after_an_error_the_statistics_are_as_before(net, images):
    before = {name: b.clone() for name, b in net.named_buffers()}
    net.fc.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'bn4' are not finite"):
        recalibrate_norms(net, images)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())


def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("train_norms", [True, False])
def test_with_adapters_the_active_copies_get_them_and_merging_keeps_them(images, train_norms):
    plain = resnet()
    prune(plain, 0.5)
    model = get_peft_model(plain, MaskLoRAConfig(r=2, target_modules=r".*convolution", train_norms=train_norms))
    for name, parameter in model.named_parameters():
        if "mask_lora_B" in name:
            nn.init.normal_(parameter)
    former = {name: b.clone() for name, b in model.named_buffers() if ".original_module." in name}
    report = recalibrate_norms(model, images)
    assert all(torch.equal(b, former[name]) for name, b in model.named_buffers() if name in former)
    assert bool(former) is train_norms
    merged = model.merge_and_unload()
    norms = [name for name, module in merged.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert sorted(report.norms) == sorted(norms)
    for name, x in inputs_of(merged, images, norms).items():
        norm = merged.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.running_var, x.transpose(0, 1).flatten(1).var(1), rtol=1e-3, atol=1e-4)


def batches():
    images = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return [{"x": images[:5]}, {"x": images[5:6]}, {"x": images[6:]}]


def seeded():
    torch.manual_seed(0)
    return Net()


def measured_by_one_process(folder):
    rank, net = PartialState(cpu=True).process_index, seeded()
    recalibrate_norms(net, batches())
    # Where there are fewer batches than processes, one of them runs nothing.
    single = seeded()
    recalibrate_norms(single, batches()[:1])
    torch.save((net.state_dict(), single.state_dict()), Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_processes_share_the_batches_and_get_the_statistics_of_all(tmp_path):
    in_two_processes(tmp_path, __file__, f"measured_by_one_process({str(tmp_path)!r})")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for ours, theirs, given in zip(first, second, (batches(), batches()[:1]), strict=True):
        alone = seeded()
        recalibrate_norms(alone, given)
        for name, value in alone.state_dict().items():
            assert torch.equal(ours[name], theirs[name]), name
            torch.testing.assert_close(ours[name], value, msg=name)
