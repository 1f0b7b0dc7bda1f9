"""Every refusal of `reconstruction/`, with its words."""

import tempfile

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from torch import nn

from peft_sparse import MaskLoRAConfig, prune, reconstruct
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.reconstruction import residual_lora
from peft_sparse.reconstruction.progress import Progress
from peft_sparse.reconstruction.turn import _check_zeros

from conftest import tiny
from refusing import TOKENS, Net, adapted, batches, in_order, llama, rebuild


def tied(one, other):
    model = llama()
    model.get_submodule(one).weight = model.get_submodule(other).weight
    return model


def shallow():
    model = llama()
    del model.model.layers[2]
    return model


def half_pruned():
    model = llama()
    prune(model, 0.5)
    return model


def sharing_a_norm():
    model, dense = half_pruned(), llama()
    dense.model.norm.weight = model.model.norm.weight
    rebuild(model, pattern=None, dense=dense)


def filled_by_a_tuner():
    weights = {"q_proj": prunable_weights(llama())["model.layers.0.self_attn.q_proj"]}
    _check_zeros(weights, {"q_proj": weights["q_proj"].matrix() != 0})


def other_state():
    with tempfile.TemporaryDirectory() as folder:
        Progress(folder, {"data": "these"})
        Progress(folder, {"data": "those"})


def other_region():
    with tempfile.TemporaryDirectory() as folder:
        Progress(folder, {}).save(0, {}, {}, as_read="these weights")
        Progress(folder, {}).load(0, as_read="those weights")


def twice(layers, hidden):
    return layers[2](layers[1](layers[0](layers[0](hidden))))


def backwards_if_short(layers, hidden):
    for block in layers if hidden.shape[1] > 8 else reversed(layers):
        hidden = block(hidden)
    return hidden


def two_streams(layers, hidden):
    first = layers[0](hidden)
    return layers[2](layers[1](first), other=first)


def correct(model=None, dense=None, calibration=TOKENS, **options):
    return residual_lora(model or half_pruned(), dense or llama(), calibration, **{"r": 2} | options)


def itself():
    model = half_pruned()
    correct(model, model)


def without_entries():
    dense = llama()
    dense.model.layers[0].mlp.up_proj.weight.data = torch.zeros(0, 16)
    return dense


def wider():
    dense = llama()
    dense.model.layers[0].mlp.up_proj = nn.Linear(16, 32, bias=False)
    return dense


def pruned_head():
    model = llama()
    prune(model, 0.5, target_modules=["lm_head"])
    return model


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, groups=2)

    def forward(self, hidden):
        return self.conv(hidden.mT[..., None])[..., 0].mT


def only_groups():
    model, dense = Net(in_order, Grouped), Net(in_order, Grouped)
    prune(model, 0.5)
    correct(model, dense)


REFUSALS = [
    (
        lambda: reconstruct(Net(twice), 0.5, batches(8)),
        ValueError,
        "'layers.0' runs 2 times in one pass of the model, .* Use `prune`, which measures all its inputs",
    ),
    (
        lambda: reconstruct(Net(backwards_if_short), 0.5, batches(8, 9)),
        ValueError,
        "Batch 1 of the calibration data .* runs the blocks of 'layers' in another way than .* Give batches",
    ),
    (
        lambda: reconstruct(Net(backwards_if_short), 0.5, [batches(8)[0], batches(9)[0] | {"attention_mask": None}]),
        ValueError,
        "Expected the same blocks to run on every batch, got layers.2, layers.1, layers.0 and layers.0, layers.1,",
    ),
    (
        lambda: reconstruct(Net(two_streams), 0.5, batches(8)),
        ValueError,
        "Expected 'layers.2' to take one hidden state, that of 'layers.1', but it takes 2 that depend on layers.0, ",
    ),
    (
        lambda: rebuild(region="layer"),
        ValueError,
        "`region` must be \"matrix\", .* a number of blocks of at least 1, got 'layer'",
    ),
    (lambda: rebuild(mode="DS"), ValueError, "`mode` must be one of 'DD', 'SS', 'SD', got 'DS'"),
    (lambda: rebuild(loss="ce"), ValueError, "`loss` must be one of 'mse', 'relative_mse', 'cosine', got 'ce'"),
    (lambda: rebuild(pattern=None), ValueError, "Expected either `pattern` .*, or `dense`, .*; got neither"),
    (
        lambda: rebuild(region="matrix", mode="SD"),
        ValueError,
        "solves a least-squares problem for each .* Use `region=",
    ),
    (
        lambda: rebuild(tuner="lora"),
        TypeError,
        "`tuner` must be \"full\" or the configuration of a PEFT .* got 'lora'",
    ),
    (
        lambda: rebuild(tuner=MaskLoRAConfig(train_head="full")),
        ValueError,
        "`train_head='full'` trains parameters that belong to no region. Leave it out",
    ),
    (
        lambda: rebuild(tuner=MaskLoRAConfig(target_modules=["lm_head"])),
        ValueError,
        "`target_modules={'lm_head'}` of the tuner matches none of the pruned weights",
    ),
    (
        lambda: rebuild(tuner=LoraConfig(r=2, target_modules=["q_proj"]), learning_rate=1e-2),
        ValueError,
        "Merging LoraConfig fills zeros of the weights, such as 'model.layers.0.self_attn.q_proj', .* MaskLoRAConfig",
    ),
    (
        filled_by_a_tuner,
        ValueError,
        "The tuner filled zeros of 'q_proj' .* such as MaskLoRAConfig",
    ),
    (lambda: rebuild(holdout=1.0), ValueError, r"`holdout` must be in \[0, 1\), got 1.0"),
    (
        lambda: rebuild(group="model"),
        ValueError,
        '`group="model"` compares the weights of all regions with each other',
    ),
    (
        lambda: rebuild(pattern=None, dense=tiny("llama"), update=True),
        ValueError,
        "`allocation`, `refinement` and `update` are part of pruning, .* Remove them, or pass them to `prune`",
    ),
    (
        lambda: rebuild(half_pruned()),
        ValueError,
        "50.0% of them are zero already, where .* is asked: each region would be .* Start from the dense model",
    ),
    (
        lambda: rebuild(half_pruned(), pattern=None, dense=half_pruned()),
        ValueError,
        "got one with the same weights, so that each region .* Load the dense model again, and prune `model` before",
    ),
    (
        sharing_a_norm,
        ValueError,
        "`dense` shares parameters with the model, .* copy.deepcopy",
    ),
    (lambda: rebuild(batch_size=0), ValueError, "`batch_size` must be at least 1, got 0"),
    (lambda: reconstruct(llama(), 0.5), ValueError, "Expected `calibration`, because a region is fitted on its"),
    (
        lambda: rebuild(adapted()),
        ValueError,
        "has adapters, but reconstruction attaches and merges adapters of its own",
    ),
    (lambda: rebuild(pattern=None, dense=shallow()), ValueError, "Expected `dense` .* got one with other blocks"),
    (
        lambda: rebuild(tied("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")),
        ValueError,
        "'model.layers.0.mlp.up_proj.weight' and 'model.layers.1.mlp.up_proj.weight' are one weight, .* Use `prune`",
    ),
    (other_state, ValueError, "holds the state of a run with another data. Resume with the same model, data"),
    (other_region, ValueError, "holds the state of a run with another model. Resume with the same model, data"),
    (lambda: correct(r=0), ValueError, "Each rank of `r` and `rank_pattern` must be an integer of at least 1, got 0"),
    (lambda: correct(r=64), ValueError, r"which is \(16, 16\), has a rank of at most 16, got 64. Lower `r`, or give"),
    (lambda: correct(rank_pattern={"k_proj": 9}), ValueError, "self_attn.k_proj', .* of at most 8, got 9"),
    (
        lambda: correct(rank_pattern={"proj": 2}),
        ValueError,
        "'proj' in `rank_pattern` matches no corrected layer, .* called like 'model.layers.0.self_attn.q_proj'",
    ),
    (lambda: correct(damping=-1.0), ValueError, "`damping` must be at least 0, got -1.0"),
    (lambda: correct(batch_size=0), ValueError, "`batch_size` must be at least 1, got 0"),
    (itself, ValueError, "got the pruned model itself. Load the dense model again, or pass copy.deepcopy"),
    (lambda: correct(adapted()), ValueError, "`model` has adapters, but .* Merge or unload its adapters first"),
    (lambda: correct(dense=adapted()), ValueError, "`dense` has adapters, but .* Merge or unload its adapters first"),
    (lambda: correct(dense=shallow()), ValueError, "before it was pruned, got one with other blocks. Load the dense"),
    (
        lambda: correct(dense=wider()),
        ValueError,
        r"'model.layers.0.mlp.up_proj' is \(24, 16\) in `model` and \(32, 16\) in `dense`. Load the dense model",
    ),
    (
        lambda: correct(dense=without_entries()),
        ValueError,
        r"In `dense`, the weight of 'model.layers.0.mlp.up_proj' has no entries: its shape is \(0, 16\)",
    ),
    (lambda: correct(calibration=None), ValueError, "Expected `calibration`, because the correction is the best one"),
    (
        lambda: correct(pruned_head(), target_modules=["lm_head"]),
        ValueError,
        "'lm_head' lies outside the blocks. Leave it out of `target_modules`",
    ),
    (lambda: correct(cpu_offload(half_pruned(), "cpu")), ValueError, "is offloaded, and an adapter .* Load the model"),
    (
        lambda: correct(half_pruned(), half_pruned()),
        ValueError,
        "can correct, found none: .* is equal to the dense weight .21 layers are left out.. Name other layers",
    ),
    (only_groups, ValueError, "found none: 'layers.0.conv' is a convolution with groups"),
    (
        lambda: correct(llama(), half_pruned()),
        ValueError,
        "0.0% are zero in `model` and 50.0% in `dense`. Prune the model, or exchange the two",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
