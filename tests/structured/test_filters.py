"""Filters of convolutional networks: what belongs together, zeros first, then cut out with the same outputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, compact, prune_structured, reconstruct
from peft_sparse.calibration.statistics import Statistics
from peft_sparse.reconstruction import Fit
from peft_sparse.structured import channels
from peft_sparse.structured.filter_metrics import FILTER_METRICS, scores_of_units

from checks import assert_same_weights
from conftest import tiny
from trainers import in_two_processes


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
CALIBRATION = [{"pixel_values": IMAGES[:2]}, {"pixel_values": IMAGES[2:]}]


def conv(inputs, outputs, kernel=3, **options):
    layers = [nn.Conv2d(inputs, outputs, kernel, padding="same" if "stride" not in options else kernel // 2,
                        bias=options.pop("bias", False), **options), nn.BatchNorm2d(outputs)]  # fmt: skip
    return nn.Sequential(*layers)


class Net(nn.Module):
    """Two convolutions with a body between them, and a head on the mean of all pixels."""

    def __init__(self, **layers):
        super().__init__()
        self.stem, self.after, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 5)
        self.layers = nn.ModuleDict(layers)

    def body(self, x):
        for layer in self.layers.values():
            x = F.relu(layer(x))
        return x

    def forward(self, pixel_values):
        x = F.relu(self.after(self.body(F.relu(self.stem(pixel_values)))))
        return self.head(x.mean((2, 3)))


class Residual(Net):
    def body(self, x):
        y = F.relu(self.layers["down"](x)) + self.layers["shortcut"](x)
        y = F.relu(y)
        return F.relu(self.layers["b"](F.relu(self.layers["a"](y))) + y)


class InvertedResidual(Net):
    """Depthwise, squeeze and excitation, an activation with f(0) ≠ 0, as in MobileNetV3 and EfficientNet."""

    def body(self, x):
        own = self.layers
        y = F.silu(own["deep"](F.hardswish(own["wide"](x))))
        gate = own["excite"](F.relu(own["squeeze"](F.adaptive_avg_pool2d(y, 1))))
        return x + own["narrow"](torch.sigmoid(y * F.hardsigmoid(gate)))


class Dense(Net):
    def body(self, x):
        x = torch.cat([x, F.relu(self.layers["a"](x))], 1)
        return torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(self.layers["b"](x), 2)], dim=1)


class Flattened(Net):
    def forward(self, pixel_values):
        x = self.layers["last"](F.relu(self.stem(pixel_values)))
        return self.layers["second"](F.relu(self.layers["first"](F.max_pool2d(x, 4).flatten(1))))


class Shared(Net):
    """One convolution that runs twice, and channels that come last for a linear layer."""

    def body(self, x):
        x = x + self.layers["twice"](x)
        x = x + self.layers["twice"](x)
        return self.layers["linear"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NETS = {
    "residual": lambda: Residual(
        down=conv(8, 8, stride=2), shortcut=conv(8, 8, 1, stride=2), a=conv(8, 12), b=conv(12, 8)
    ),
    "grouped": lambda: Net(a=conv(8, 16, groups=4), b=conv(16, 8, groups=2, bias=True)),
    "depthwise": lambda: Net(a=conv(8, 16, groups=8), b=conv(16, 16, groups=16), c=conv(16, 8, 1)),
    "strided": lambda: Net(a=conv(8, 10, 5, stride=2), b=conv(10, 8, 1, stride=2)),
    "dilated": lambda: Net(a=conv(8, 10, dilation=2), b=conv(10, 8, dilation=3, padding_mode="circular")),
    "inverted residual": lambda: InvertedResidual(
        wide=conv(8, 16, 1), deep=conv(16, 16, groups=16), squeeze=nn.Conv2d(16, 4, 1), excite=nn.Conv2d(4, 16, 1),
        narrow=conv(16, 8, 1),
    ),
    "dense": lambda: _wider(Dense(a=conv(8, 4), b=conv(12, 4)), 16),
    "flattened": lambda: Flattened(last=conv(8, 6), first=nn.Linear(96, 20), second=nn.Linear(20, 5)),
    "shared": lambda: Shared(twice=conv(8, 8), linear=nn.Linear(8, 8)),
    "instance norm": lambda: Net(a=nn.Conv2d(8, 8, 3), b=nn.InstanceNorm2d(8, affine=True)),
}  # fmt: skip


def _wider(net, width):
    net.after = conv(width, 6)
    return net


def settled(net):
    """`net` with statistics and scales of normalisations as training leaves them."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor, 0.3)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def resnet(**options):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "num_labels": 5}
    return settled(ResNetForImageClassification(ResNetConfig(**sizes | options)))


@torch.no_grad()
def outputs(model):
    model.eval()
    made = model(pixel_values=IMAGES)
    return made if isinstance(made, torch.Tensor) else made.logits


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("structure", ["ul-um", "al-am"])
@pytest.mark.parametrize("name", NETS)
def test_a_compact_network_computes_what_the_masked_one_does(name, structure):
    net = settled(NETS[name]())
    dense, before = outputs(net), size(net)
    report = prune_structured(net, 0.4, metric="l1", structure=structure, calibration=IMAGES[:2])
    masked = outputs(net)
    assert not torch.allclose(masked, dense)
    assert compact(net, IMAGES[:2]) is net
    torch.testing.assert_close(outputs(net), masked, rtol=1e-4, atol=1e-5)
    gone = sum(layer.units - layer.kept for layer in report.layers)
    assert gone > 0
    assert size(net) < before
    # What was cut out is gone: nothing is left to cut.
    smaller = size(net)
    assert size(compact(net, IMAGES[:2])) == smaller


@pytest.mark.parametrize("name", NETS)
def test_the_removed_channels_are_those_that_nobody_would_miss(name):
    """Whatever the layers before make of the removed channels, the outputs of the masked network are the same."""
    net = settled(NETS[name]())
    report = prune_structured(net, 0.4, metric="l2", calibration=IMAGES[:2])
    masked = outputs(net)
    modules, disturbed = dict(net.named_modules()), 0
    for layer in report.layers:
        made = modules[layer.name]
        with torch.no_grad():
            zero = (made.weight == 0).flatten(1).all(1)
            made.weight[zero] = torch.randn_like(made.weight[zero])
            disturbed += int(zero.sum())
        if layer.heads_per_unit == 1:
            assert torch.equal(zero.nonzero().flatten(), torch.tensor(layer.removed_units))
    assert disturbed
    # The channels behind them are zero in scale and bias, or are read by nobody.
    torch.testing.assert_close(outputs(net), masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", FILTER_METRICS)
def test_every_metric_prunes_and_every_layer_loses_its_share(metric):
    model = resnet()
    report = prune_structured(model, 0.25, CALIBRATION, metric=metric)
    assert [(layer.units, layer.kept) for layer in report.layers] == [(8, 6), (8, 6), (16, 12), (16, 12), (16, 12)]
    assert {layer.kind for layer in report.layers} == {"filters"}
    # The stem, and the last convolution of its stage, are added.
    assert [layer.heads_per_unit for layer in report.layers] == [2, 1, 1, 3, 1]
    assert report.left_out == {}
    assert "removed 26 of 104 filters, 0.2500 of them" in str(report)
    assert model.resnet.embedder.embedder.convolution.weight.flatten(1).any(1).sum() == 6
    assert model.classifier[1].weight.any(0).sum() == 12


def test_the_least_important_filters_of_the_model_are_removed_if_all_layers_are_compared():
    net = settled(Net(a=conv(8, 8)))
    with torch.no_grad():
        for module, scale in ((net.stem, 1.0), (net.layers["a"], 1.0), (net.after, 1.0)):
            module[0].weight.mul_(scale / module[0].weight.flatten(1).norm(dim=1)[:, None, None, None])
        net.layers["a"][0].weight[2:7].mul_(0.01)
    report = prune_structured(net, 5 / 22, metric="l2", structure="al-am")
    assert [layer.removed_units for layer in report.layers] == [(), (2, 3, 4, 5, 6), ()]


def test_what_was_removed_before_counts():
    model = resnet()
    first = prune_structured(model, 0.25, metric="l1")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
    second = prune_structured(model, 0.5, metric="fpgm")
    for one, other in zip(first.layers, second.layers, strict=True):
        assert set(one.removed_units) <= set(other.removed_units)
        assert other.kept == one.units // 2


def test_metrics_are_these():
    weight = torch.tensor([[3.0, 4.0], [0.0, 1.0], [3.0, 0.0]])
    statistics = Statistics(input_norm=torch.tensor([1.0, 10.0]))
    found = {name: rule.score(weight, statistics).tolist() for name, rule in FILTER_METRICS.items()}
    assert found["l1"] == [7, 1, 3]
    assert found["l2"] == [5, 1, 3]
    assert found["wanda"] == [43, 10, 3]
    assert found["fpgm"] == pytest.approx([18**0.5 + 4, 18**0.5 + 10**0.5, 4 + 10**0.5])
    assert FILTER_METRICS["bn_scale"].score(torch.tensor([[-2.0], [0.5]]), statistics).tolist() == [2, 0.5]


def test_scores_of_coupled_filters_are_means_over_their_layers():
    layers = [(torch.tensor([1.0, 3.0, 2.0, 9.0]), [0, 1, 1, -1]), (torch.tensor([30.0, 10.0]), [0, 1])]
    # The first layer has 1 and 3 + 2, of mean 3; the second 30 and 10, of mean 20.
    assert scores_of_units(layers, 2, normalised=True).tolist() == pytest.approx(
        [(1 / 3 + 1.5) / 2, (5 / 3 + 0.5) / 2]
    )
    assert scores_of_units(layers, 2, normalised=False).tolist() == [15.5, 7.5]


def test_wanda_weighs_the_inputs_of_each_group():
    net = settled(Net(a=conv(8, 8, groups=2), b=nn.Identity()))
    with torch.no_grad():
        net.layers["a"][0].weight.fill_(1.0)
        # The first group of four channels reads nothing, except what its second filter reads.
        net.stem[1].weight[:4], net.stem[1].bias[:4] = 0, 0
        net.layers["a"][0].weight[5].fill_(0.1)
    report = prune_structured(net, 0.25, CALIBRATION, metric="wanda", target_modules=["layers.a.0"])
    # Place 1 of both groups: the filters of the first group count nothing, that of the second little.
    assert report.layers[0].removed_units == (1,)
    assert net.layers["a"][0].weight.flatten(1).any(1).tolist() == [True, False, True, True] * 2


class Operation(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


MIXING = {
    "roll": (lambda x: x.roll(1, 1), "`roll`"),
    "flip": (lambda x: x.flip(1), "`flip`"),
    "cumsum": (lambda x: x.cumsum(1), "`cumsum`"),
    "softmax": (lambda x: x.softmax(1), "`_softmax`"),
    "channel norm": (lambda x: F.layer_norm(x.mT, x.shape[2:3]), "`native_layer_norm`"),
    "groups": (lambda x: F.group_norm(x, 2), "`native_group_norm`"),
    "shuffle": (lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), "`view`"),
    "chunks": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "`split`"),
    "some": (lambda x: F.pad(x[:, 2:], (0, 0, 0, 0, 1, 1)), "`slice`"),
    "more": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:-1], "padded with further channels"),
    "sum": (lambda x: x * x.sum(1, keepdim=True), "`sum`"),
    "constant": (lambda x: x + torch.ones(8, 1, 1), "they meet a tensor whose width is fixed"),
    "matrix": (lambda x: torch.einsum("bchw,cd->bdhw", x, torch.ones(8, 8)), "which may mix them"),
    "part of a tensor": (lambda x: torch.zeros_like(x).index_add_(1, torch.arange(8), x), "which may mix them"),
    "conv": (lambda x: F.conv2d(x, torch.ones(8, 8, 1, 1)), "`convolution`"),
    "python": (lambda x: x * float(x[0, 0, 0, 0] > -100), "`select`"),
}


@pytest.mark.parametrize("name", MIXING)
def test_filters_whose_channels_are_mixed_stay(name):
    operation, words = MIXING[name]
    net = settled(Net(a=conv(8, 8), b=Operation(operation)))
    report = prune_structured(net, 0.4, metric="l1")
    assert words in report.left_out["layers.a.0"]
    assert [layer.name for layer in report.layers] == ["stem.0", "after.0"]
    masked = outputs(net)
    torch.testing.assert_close(outputs(compact(net)), masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operation", ["roll", "flip", "cumsum"])
def test_a_wrong_rule_is_noticed_before_anything_is_changed(operation, monkeypatch):
    monkeypatch.setitem(channels._RULES, operation, channels._pointwise)
    net = settled(Net(a=conv(8, 8), b=Operation(MIXING[operation][0])))
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match="computes something else after zeros were written"):
        prune_structured(net, 0.4, metric="l1")
    assert_same_weights(net, before)


def test_a_shortcut_of_type_a_keeps_the_width_of_its_stages():
    class TypeA(Net):
        def body(self, x):
            y = self.layers["b"](F.relu(self.layers["a"](x)))
            return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))

    net = settled(_wider(TypeA(a=conv(8, 12, stride=2), b=conv(12, 12)), 12))
    report = prune_structured(net, 0.5, metric="l1")
    assert [layer.name for layer in report.layers] == ["layers.a.0", "after.0"]
    assert report.left_out == {
        "stem.0": "they are padded with further channels, as in a shortcut of type A",
        "layers.b.0": "they meet a tensor whose width is fixed",
    }


def test_targets_and_exclusions_choose_convolutions_with_all_that_belongs_to_them():
    net = settled(NETS["residual"]())
    report = prune_structured(net, 0.5, metric="l1", target_modules=r"layers\..*", exclude_modules=["layers.a.0"])
    assert [layer.name for layer in report.layers] == ["layers.down.0"]
    assert report.left_out == {
        "stem.0": "not in `target_modules`",
        "after.0": "not in `target_modules`",
        "layers.a.0": "excluded",
    }
    report = prune_structured(settled(NETS["residual"]()), 0.5, metric="l1", exclude_modules=["layers.b.0"])
    assert "with those of 'layers.b.0', which is not chosen" in report.left_out["layers.down.0"]


def test_backbones_keep_the_channels_that_they_return():
    model = resnet().resnet
    report = prune_structured(model, 0.25, metric="l1")
    last = "encoder.stages.1.layers.1.layer.1.convolution"
    assert report.left_out[last] == "the model returns them"
    assert all("stages.1.layers.1.layer.1" not in layer.name for layer in report.layers)


@pytest.mark.parametrize("config", [MaskLoRAConfig, ScaledLoRAConfig])
def test_adapters_on_kept_filters_merge_exactly(config):
    model = resnet()
    prune_structured(model, 0.25, metric="l1")
    zeros = {name: value == 0 for name, value in model.named_parameters()}
    tuned = get_peft_model(model, config(r=2, target_modules=r".*convolution", train_norms=True, bias="all"))
    _train(tuned)
    trained = outputs(tuned)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(outputs(merged), trained, rtol=1e-4, atol=1e-5)
    for name, parameter in merged.named_parameters():
        assert not parameter[zeros[name]].any(), name
    torch.testing.assert_close(outputs(compact(merged)), trained, rtol=1e-4, atol=1e-5)
    assert merged.config.hidden_sizes == [6, 12]


def test_retraining_all_weights_keeps_the_zeros():
    """Nothing reads a removed channel and nothing makes it, so both sides have no gradient."""
    model = resnet()
    prune_structured(model, 0.25, metric="l1")
    zeros = {name: value == 0 for name, value in model.named_parameters()}
    _train(model)
    for name, parameter in model.named_parameters():
        assert not parameter[zeros[name]].any(), name
    trained = outputs(model)
    torch.testing.assert_close(outputs(compact(model)), trained, rtol=1e-4, atol=1e-5)


def _train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(pixel_values=IMAGES, labels=torch.arange(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_layers_of_equal_share_load_with_transformers_alone(tmp_path, layer_type):
    model = resnet(layer_type=layer_type, hidden_sizes=[16, 32])
    prune_structured(model, 0.25, metric="l1")
    compact(model).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is ResNetForImageClassification
    assert (loaded.config.embedding_size, loaded.config.hidden_sizes) == (6, [12, 24])
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("structure", ["ul-um", "al-am"])
def test_other_widths_are_stored_in_the_configuration(tmp_path, structure):
    model = resnet()
    prune_structured(model, 0.3, metric="l1", structure=structure, exclude_modules=r".*stages\.0.*layer\.0.*")
    compact(model).save_pretrained(tmp_path)
    assert model.config.model_type == "peft_sparse_compact"
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    prune_structured(loaded, 0.6, metric="l1")
    masked = outputs(loaded)
    compact(loaded).save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(outputs(again), masked, rtol=1e-4, atol=1e-5)


def test_other_models_are_saved_whole(tmp_path):
    net = settled(NETS["residual"]())
    prune_structured(net, 0.4, metric="l1")
    torch.save(compact(net), tmp_path / "net.pt")
    assert torch.equal(outputs(torch.load(tmp_path / "net.pt", weights_only=False)), outputs(net))


def test_the_image_is_made_for_the_network():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Flattened(last=conv(8, 6), first=nn.Linear(6 * 7 * 7, 20), second=nn.Linear(20, 5))

        def forward(self, x):
            return self.net(x)

    report = prune_structured(Named(), 0.5, metric="l1")
    assert [layer.name for layer in report.layers] == ["net.stem.0", "net.layers.last.0"]


def test_filters_that_cannot_be_followed_do_not_keep_neurons_from_being_cut_out():
    model = tiny("vit")
    with torch.no_grad():
        model.vit.embeddings.patch_embeddings.projection.weight[3] = 0
        model.vit.layers[0].mlp.fc2.weight[:, 5:] = 0
    compact(model)
    assert model.vit.layers[0].mlp.fc1.out_features == 5
    assert model.vit.embeddings.patch_embeddings.projection.out_channels == 16


def test_half_precision_and_training_mode_stay():
    model = resnet().bfloat16().train()
    prune_structured(model, 0.25, metric="l1")
    compact(model)
    assert model.training
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_a_masked_network_can_be_reconstructed_to_the_dense_one():
    model = resnet()
    dense = copy.deepcopy(model)
    prune_structured(model, 0.25, metric="l1")
    zeros = {name: value == 0 for name, value in model.named_parameters()}
    reconstruct(model, calibration=CALIBRATION, dense=dense, region="block", fit=Fit(max_steps=2))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            assert not parameter[zeros[name]].any(), name


def run(folder):
    """Prune in one of several processes, and write down what was removed."""
    torch.manual_seed(0)
    report = prune_structured(resnet().double(), 0.5, [{"pixel_values": x[None].double()} for x in IMAGES[:3]],
                              metric="wanda")  # fmt: skip
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
    torch.save([layer.removed_units for layer in report.layers], f"{folder}/{rank}.pt")


def begin_and_run(folder):
    torch.distributed.init_process_group("gloo")
    run(folder)


@pytest.mark.slow
def test_processes_share_the_images(tmp_path):
    in_two_processes(tmp_path, __file__, f"begin_and_run({str(tmp_path)!r})")
    run(tmp_path)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == torch.load(tmp_path / "alone.pt")
