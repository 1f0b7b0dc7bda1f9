"""Every refusal of `planning/`, with its words."""

import pytest
import torch
from torch import nn
from transformers import AutoModel

from peft_sparse import MaskLoRAConfig, plan_pruning, plan_training

from conftest import CONFIGS
from refusing import adapted, llama


def integer_parameters():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    return model


REFUSALS = [
    (
        lambda: plan_pruning(llama(), 0.5, flops_per_second=0),
        ValueError,
        "`flops_per_second` must be above 0, got 0. Leave it out to measure it",
    ),
    (
        lambda: plan_training(llama(), strategy="tp"),
        ValueError,
        "`strategy` must be one of 'ddp', 'fsdp', 'zero2', 'zero3', got 'tp'",
    ),
    (
        lambda: plan_pruning(llama(), 0.5, sequences=0),
        ValueError,
        "`sequences` must be a whole number of at least 1, got 0",
    ),
    (lambda: plan_training(llama(), devices=0), ValueError, "`devices` must be at least 1, got 0"),
    (
        lambda: plan_training(adapted(), MaskLoRAConfig()),
        ValueError,
        "has adapters already. Leave `peft_config` out, or pass a model without",
    ),
    (
        lambda: plan_training(AutoModel.from_config(CONFIGS["llama"])),
        ValueError,
        "LlamaModel cannot be run on tensors without values .* Pass a language model with its head",
    ),
    (
        lambda: plan_training(integer_parameters()),
        ValueError,
        "got torch.int8 for 'weight': quantised layers .* Plan the model in half precision",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
