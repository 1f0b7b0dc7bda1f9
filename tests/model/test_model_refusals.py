"""Every refusal of `model/`, with its words."""

import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_sparse import plan_pruning, plan_training, prune, sparsity
from peft_sparse.model import processes
from peft_sparse.model.offload import execution_device
from peft_sparse.model.weights import as_matrix
from peft_sparse.training.zero_guard import ZeroGuardCallback

from refusing import _State, arguments, flap, llama, wanda


def nan_weight(model):
    model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan


def no_norms():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])})
    plan_pruning(model, 0.5, criterion="wanda", flops_per_second=1)


def beside(other, failure=None):
    """Prune as process 0 of two, of which the other says `other` where all tell what they do, or that it failed."""
    with (
        mock.patch.object(processes, "place", return_value=(0, 2)),
        mock.patch.object(processes, "_gathered", side_effect=lambda own: [own, (other, failure)]),
    ):
        wanda(llama())


def packed():
    """A layer of integers that says its sizes, as those of GPTQ do."""
    layer = nn.Module()
    layer.in_features = layer.out_features = 8
    layer.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), "down": layer})])})


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        block = torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4))
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


def of_integers():
    model = llama()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return model


def flattened():
    model = llama()
    model.model.layers[0] = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(model.model.layers[0])
    ZeroGuardCallback().on_train_begin(arguments(), _State(), None, model=model)


def made_in_inference_mode():
    with torch.inference_mode():
        model = llama()
    prune(model, 0.5)


REFUSALS = [
    (made_in_inference_mode, ValueError, "was made within `torch.inference_mode`, .* Load the model outside of it"),
    (lambda: as_matrix(nn.Embedding(3, 3), torch.zeros(3, 3)), TypeError, "one of `Linear`.* got Embedding"),
    (
        lambda: beside("magnitude"),
        ValueError,
        "Expected the same call in all 2 processes, got 'wanda, row, .* to 0.5 .* Give",
    ),
    (
        lambda: beside("", "OSError: full"),
        RuntimeError,
        "process 1 stopped with OSError: full. Correct the error",
    ),
    (lambda: prune(llama(), 0.5, target_modules=["q_prj"]), ValueError, "'q_prj' in `target_modules` matches no"),
    (lambda: prune(llama(), 0.5, exclude_modules=["x"]), ValueError, "'x' in `exclude_modules` .* end in q_proj, k_"),
    (lambda: prune(llama(), 0.5, target_modules="nothing.*"), ValueError, "`target_modules='nothing.*'` .* leaves no"),
    (
        lambda: prune(llama(), 0.5, exclude_modules="q_proj"),
        ValueError,
        r"`exclude_modules='q_proj'` matches no .* a regular expression for whole names. .* such as \['q_proj'\]",
    ),
    (lambda: prune(llama(), 0.5, target_modules="["), ValueError, r"`target_modules='\['` is no regular expression"),
    (lambda: sparsity(llama(), exclude_modules=5), TypeError, "Expected `exclude_modules` as a list .* got 5"),
    (lambda: prune("folder", 0.5), TypeError, "Expected a model, .* got a value of type str. Load it by `from_pretr"),
    (lambda: prune(nn.Sequential(nn.Linear(2, 2)), 0.5), ValueError, "Expected a model with blocks"),
    (
        lambda: prune(llama(nan_weight), 0.5),
        ValueError,
        "layers.1.mlp.up_proj' holds NaN or infinity. Correct",
    ),
    (
        lambda: execution_device(nn.Linear(2, 2, device="meta")),
        ValueError,
        "Expected a model with weights in memory or offloaded by accelerate, got one on the meta device",
    ),
    (
        lambda: prune(packed(), 0.5),
        ValueError,
        "'layers.0.down' is packed by a quantiser, .* Or add them to `exclude_m",
    ),
    (
        lambda: prune(llama(), 0.5, device="meta"),
        ValueError,
        "Expected `device` to be a device of this machine, .* got 'meta': it holds no values",
    ),
    (lambda: plan_pruning(5, 0.5), TypeError, "Expected a model, its configuration, its folder or .* got int"),
    (
        lambda: plan_pruning(".", 0.5),
        FileNotFoundError,
        "Expected the folder of a saved model, and there is no config.json in '.'. Give a folder",
    ),
    (
        lambda: plan_training("/nowhere"),
        FileNotFoundError,
        "There is no folder '/nowhere', and no model of this name could be loaded from the Hub. Give the folder",
    ),
    (
        lambda: prune(scripted(), 0.5),
        ValueError,
        "'layers.0' was compiled by `torch.jit`, .* Prune the model first, and compile it afterwards",
    ),
    (lambda: sparsity(of_integers()), ValueError, "up_proj' is packed as torch.int8, which cannot be read, .* Count"),
    (lambda: sparsity(llama().to("meta")), ValueError, "q_proj' is on the meta device, .* Load the model first"),
    (no_norms, ValueError, "Expected blocks with a normalisation layer, which tells the hidden size"),
    (
        lambda: flap(target_modules=["heads"]),
        ValueError,
        "'heads' in `target_modules` matches no prunable layer. Prunable layers here end in self_attn, mlp, q_proj",
    ),
    (lambda: flap(llama(nan_weight)), ValueError, "layers.1.mlp.up_proj' holds NaN or infinity. Correct"),
    (flattened, ValueError, "FSDP1 flattens weights, .* Set `fsdp_version: 2` in the configuration of accelerate"),
]


@pytest.mark.parametrize("device", ["meta", "cuda:99", "gpu", 5.5])
def test_a_device_that_is_not_there_changes_nothing(device):
    model, expected = llama(), llama()
    with pytest.raises(ValueError, match=f"Expected `device` to be a device of this machine, .* got {device!r}: "):
        prune(model, 0.5, device=device)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
