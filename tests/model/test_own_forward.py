"""Layers whose class changes its inputs or its weight: measured by what is multiplied, or refused by name."""

import pytest
import torch
from peft import HRAConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F
from transformers import BitConfig, BitModel

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, prune
from peft_sparse.model.own_forward import multiplies_inputs, use_of_weight

from checks import assert_same_weights
from conftest import tiny


class Normed(nn.Linear):
    def forward(self, x):
        return F.linear(F.layer_norm(x, x.shape[-1:]) * 3, self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class Standardised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class ByHand(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Grouped(nn.Linear):
    """Of which each half of the outputs has inputs of its own."""

    def forward(self, x):
        one, other = torch.bmm(torch.stack([x, x.flip(-1)]), self.weight.view(2, -1, x.shape[-1]).mT)
        return torch.cat([one, other], -1)


class Padding(nn.Conv2d):
    """Pads its inputs on one side, as causal convolutions and those of TensorFlow do."""

    def forward(self, x):
        return self._conv_forward(F.pad(x, (2, 0, 2, 0)), self.weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "use"),
    [
        (nn.Linear(6, 4), "plain"),
        (ByHand(6, 4), "plain"),
        (Scaled(6, 4), "plain"),
        (Normed(6, 4), "other"),
        (Grouped(6, 4), "other"),
        (Padding(4, 4, 3, groups=2), "other"),
        (Standardised(6, 4), "lost"),
    ],
)
def test_what_becomes_of_weight_and_inputs_is_found_out(layer, use):
    state, before = torch.get_rng_state(), layer.weight.clone()
    assert use_of_weight(layer) == use
    assert torch.equal(layer.weight, before)
    assert torch.equal(torch.get_rng_state(), state)


class Block(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.first, self.second = make(), make()

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(make) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class WithNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8))


class WithPad(nn.Sequential):
    def __init__(self):
        super().__init__(nn.ZeroPad2d((2, 0, 2, 0)), nn.Conv2d(4, 4, 3, groups=2))


class Unscaled(nn.Linear):
    def forward(self, x):
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.weight, self.bias)


@pytest.mark.parametrize(
    ("whole", "parts", "shape"),
    [
        (lambda: Unscaled(8, 8), WithNorm, (3, 5, 8)),
        (lambda: Padding(4, 4, 3, groups=2), WithPad, (3, 4, 6, 6)),
    ],
)
def test_a_layer_that_changes_its_inputs_is_pruned_as_two_modules_are(whole, parts, shape):
    one, two = Net(whole).eval(), Net(parts).eval()
    two.load_state_dict(
        {f"{name.rpartition('.')[0]}.1.{name.rpartition('.')[2]}": value for name, value in one.state_dict().items()}
    )
    data = [{"x": torch.randn(shape)} for _ in range(2)]
    torch.testing.assert_close(one(data[0]["x"]), two(data[0]["x"]))
    for net in (one, two):
        prune(net, 0.5, data, criterion="sparsegpt")
    for found, expected in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_product_that_cannot_be_seen_is_refused_with_calibration():
    net = Net(lambda: Grouped(8, 8)).eval()
    before = Net(lambda: Grouped(8, 8))
    with pytest.raises(ValueError, match=r"multiplies 'layers.0.first' and 3 more with inputs that can be observed"):
        prune(net, 0.5, [{"x": torch.randn(3, 8)}], criterion="wanda")
    assert_same_weights(net, before)


def test_weights_whose_zeros_would_be_lost_are_refused():
    config = BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4)
    with pytest.raises(
        ValueError, match="changed by the forward of its layer, a WeightStandardizedConv2d, and its zer"
    ):
        prune(BitModel(config), 0.5)


@pytest.mark.parametrize(
    ("config", "family", "known"),
    [
        (MaskLoRAConfig, "llama", True),
        (ScaledLoRAConfig, "llama", True),
        (MaskLoRAConfig, "gpt2", True),
        (HRAConfig, "llama", False),
    ],
)
def test_an_adapter_multiplies_the_weight_with_its_inputs_or_with_others(config, family, known):
    names = {"llama": ["q_proj"], "gpt2": ["c_fc"]}[family]
    model = get_peft_model(tiny(family), config(r=2, target_modules=names)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    module = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    layer = module.get_base_layer()
    stored, before = layer.weight, layer.weight.clone()
    assert multiplies_inputs(module, layer) == known
    assert layer.weight is stored
    assert torch.equal(stored, before)
