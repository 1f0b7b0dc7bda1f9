"""Weights that are computed, packed, sharded, offloaded or empty: refused by name, and counted as they are used."""

import accelerate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from peft_sparse import prune, sparsity
from peft_sparse.model.blocks import prunable_weights

from conftest import tiny


NAME = "model.layers.1.mlp.down_proj"


def pruned_by_torch(model, layer):
    torch_prune.l1_unstructured(layer, "weight", 0.3)
    return lambda: torch_prune.remove(layer, "weight")


def pruned_twice_by_torch(model, layer):
    torch_prune.l1_unstructured(layer, "weight", 0.3)
    torch_prune.random_structured(layer, "weight", 0.2, dim=0)
    return lambda: torch_prune.remove(layer, "weight")


def normed(model, layer):
    parametrizations.weight_norm(layer)
    return lambda: parametrize.remove_parametrizations(layer, "weight")


class Halved(nn.Module):
    def forward(self, weight):
        return weight * (torch.arange(weight.shape[1]) % 2)


def parametrized(model, layer):
    parametrize.register_parametrization(layer, "weight", Halved())
    return lambda: parametrize.remove_parametrizations(layer, "weight")


def normed_as_of_old(model, layer):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    return lambda: nn.utils.remove_weight_norm(layer)


def spectral(model, layer):
    nn.utils.spectral_norm(layer)
    return lambda: nn.utils.remove_spectral_norm(layer)


def sparsified(model, layer):
    sparsifier = torch.ao.pruning.WeightNormSparsifier(0.3, (1, 1), 1)
    sparsifier.prepare(model, [{"tensor_fqn": f"{NAME}.weight"}])
    sparsifier.step()
    return sparsifier.squash_mask


COMPUTED = {
    pruned_by_torch: r"torch.nn.utils.prune.remove\(layer, \"weight\"\)",
    pruned_twice_by_torch: r"torch.nn.utils.prune.remove\(layer, \"weight\"\)",
    normed: r"torch.nn.utils.parametrize.remove_parametrizations\(layer, \"weight\"\)",
    parametrized: r"torch.nn.utils.parametrize.remove_parametrizations\(layer, \"weight\"\)",
    normed_as_of_old: r"torch.nn.utils.remove_weight_norm\(layer\)",
    spectral: r"torch.nn.utils.remove_spectral_norm\(layer\)",
    sparsified: r"the sparsifier's `squash_mask\(\)`",
}


@pytest.mark.parametrize("compute", COMPUTED, ids=lambda compute: compute.__name__)
def test_a_computed_weight_is_refused_with_the_call_that_makes_it_a_parameter(compute, tokens):
    model = tiny("llama")
    helps = compute(model, model.get_submodule(NAME))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"The weight of '{NAME}' is computed .*{COMPUTED[compute]}"):
        prune(model, 0.5, tokens, criterion="wanda")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    # Left out, it disturbs nothing, and where the call was made it is pruned.
    assert len(prune(model, 0.5, tokens, criterion="wanda", exclude_modules=[NAME]).weights) == 20
    helps()
    report = prune(model, 0.8, tokens, criterion="wanda")
    model(tokens)
    assert report.sparsity == sparsity(model) == pytest.approx(0.8, abs=0.02)


@given(st.lists(st.sampled_from(list(COMPUTED)), min_size=3, max_size=3), st.floats(0, 0.9))
def test_zeros_are_counted_as_the_next_forward_pass_uses_them(kinds, share):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)) for _ in kinds])})
    for kind, block in zip(kinds, model.layers, strict=True):
        if kind is not sparsified:
            with torch.no_grad():
                block[0].weight.masked_fill_(torch.rand(5, 6) < share, 0)
            kind(model, block[0])
        # What was written last is not what will be used.
        if kind in (pruned_by_torch, normed_as_of_old):
            block[0].weight = torch.zeros(5, 6)
    counted = sparsity(model.eval())
    for block in model.layers:
        block(torch.randn(2, 6))
    weights = [layer.weight for block in model.layers for layer in block]
    assert counted == sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class Packed(nn.Module):
    """A quantised layer of a library that nobody knows."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", torch.zeros(layer.in_features // 8, layer.out_features, dtype=torch.int32))

    def forward(self, inputs):
        return inputs.new_zeros(*inputs.shape[:-1], self.out_features)


def pack(model, every):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and (every or name == NAME):
            model.set_submodule(name, Packed(layer))
    return model


@pytest.mark.parametrize("every", [False, True])
def test_a_packed_layer_is_refused_and_never_passed_over(every):
    model = pack(tiny("llama"), every)
    first = "model.layers.0.self_attn.q_proj" if every else NAME
    for call in (sparsity, lambda model: prune(model, 0.5)):
        with pytest.raises(ValueError, match=f"The weight of '{first}' is packed by a quantiser"):
            call(model)


def test_a_packed_layer_that_is_left_out_disturbs_nothing(tokens):
    model = pack(tiny("llama"), every=False)
    report = prune(model, 0.5, tokens, criterion="wanda", exclude_modules=["down_proj"])
    assert sparsity(model, exclude_modules=["down_proj"]) == report.sparsity == 0.5
    assert report.left_out[NAME] == "packed by a quantiser"


def test_float8_and_integers_are_refused():
    for dtype in (torch.float8_e4m3fn, torch.int8):
        model = tiny("llama")
        layer = model.get_submodule(NAME)
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=f"'{NAME}' is {dtype}, .* Load or cast the weights to bfloat16"):
            prune(model, 0.5)
    assert len(prune(model, 0.5, exclude_modules=["down_proj"]).weights) == 18


def test_the_zeros_of_float8_are_counted():
    model = tiny("llama")
    prune(model, 0.5)
    layer = model.get_submodule(NAME)
    layer.weight = nn.Parameter(layer.weight.detach().sign().to(torch.float8_e4m3fn), requires_grad=False)
    assert sparsity(model) == 0.5


def test_layers_quantised_by_torchao_and_bitsandbytes_are_counted_and_refused():
    bnb = pytest.importorskip("bitsandbytes")
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            # Few values, which every quantiser keeps apart from zero.
            parameter.copy_(torch.where(parameter < 0, -1.0, 1.0))
    prune(model, 0.5)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name.endswith("q_proj"))
    for name, kind in (("up_proj", bnb.nn.Linear4bit), ("gate_proj", bnb.nn.Linear8bitLt)):
        for block in model.model.layers:
            dense = getattr(block.mlp, name)
            options = {} if kind is bnb.nn.Linear4bit else {"has_fp16_weights": False}
            layer = kind(dense.in_features, dense.out_features, bias=False, **options)
            layer.load_state_dict({"weight": dense.weight})
            setattr(block.mlp, name, layer.to("cpu"))
            if kind is bnb.nn.Linear8bitLt:
                layer.weight.data = dense.weight.data
                layer.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False, has_fp16_weights=False).to(
                    "cpu"
                )
    assert sparsity(model) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="q_proj' is quantised .* Prune the model before it is quantised"):
        prune(model, 0.5)
    left_out = prune(model, 0.5, exclude_modules=["q_proj", "up_proj", "gate_proj"]).left_out
    assert len(left_out) == 9


def test_weights_that_accelerate_offloads_are_counted():
    model = tiny("llama")
    prune(model, 0.5)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_submodule(NAME).weight.is_meta
    assert sparsity(model) == 0.5
    assert model.get_submodule(NAME).weight.is_meta


def test_a_layer_without_entries_is_refused_and_may_be_left_out():
    model = tiny("llama")
    with pytest.warns(UserWarning, match="zero-element"):
        model.model.layers[0].extra = nn.Linear(16, 0, bias=False)
    with pytest.raises(ValueError, match=r"layers.0.extra' has no entries: its shape is \(0, 16\)"):
        prune(model, 0.5)
    assert sparsity(model) < 0.01
    assert prune(model, 0.5, exclude_modules=["extra"]).sparsity == 0.5


def test_a_weight_with_two_names_is_one_weight():
    model = tiny("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    model.model.layers[2].self_attn = model.model.layers[1].self_attn
    weights = prunable_weights(model)
    assert len(weights) == 21 - 1 - 4
    report = prune(model, 0.5)
    assert [weight.name for weight in report.weights] == list(weights)
    assert report.left_out == {}
    assert sparsity(model) == 0.5
    # By its second name alone it can be chosen, and excluded by one name it is not pruned by the other.
    assert list(prunable_weights(model, r".*layers\.1\.mlp\.up_proj")) == ["model.layers.1.mlp.up_proj"]
    left = prunable_weights(model, None, r".*layers\.1\.mlp\.up_proj")
    assert not [name for name in left if name.endswith(("0.mlp.up_proj", "1.mlp.up_proj"))]
