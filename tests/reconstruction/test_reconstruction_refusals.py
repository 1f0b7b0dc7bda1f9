"""Every refusal of `reconstruction/`, with its words."""

import tempfile

import pytest
from peft import LoraConfig

from peft_sparse import MaskLoRAConfig, prune, reconstruct
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.reconstruction.progress import Progress
from peft_sparse.reconstruction.work import _check_zeros

from conftest import tiny
from refusing import Net, adapted, batches, llama, rebuild


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
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
