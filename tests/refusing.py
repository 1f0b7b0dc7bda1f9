"""What tests of refusals share: models and calls that are refused."""

import torch
from peft import get_peft_model
from torch import nn

from peft_sparse import MaskLoRAConfig, SparseTrainingArguments, prune, prune_structured

from conftest import tiny
from rebuilding import rebuild as rebuilt


TOKENS = torch.randint(0, 61, (4, 8), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden, other=None):
        return self.fc(hidden) + (0 if other is None else other)


class Net(nn.Module):
    """A model that runs its three blocks as `order` says."""

    def __init__(self, order, block=Block):
        super().__init__()
        self.embed, self.layers, self.order = nn.Embedding(61, 8), nn.ModuleList(block() for _ in range(3)), order

    def forward(self, input_ids, attention_mask=None):
        return self.order(self.layers, self.embed(input_ids))


def in_order(layers, hidden):
    for block in layers:
        hidden = block(hidden)
    return hidden


def batches(*lengths):
    return [{"input_ids": torch.arange(length)[None]} for length in lengths]


def padded(*lengths):
    """Batches of one sequence whose last two tokens are padding."""
    return [{**batch, "attention_mask": (batch["input_ids"] < batch["input_ids"].shape[1] - 2).long()}
            for batch in batches(*lengths)]  # fmt: skip


def llama(edit=None):
    model = tiny("llama")
    if edit is not None:
        with torch.no_grad():
            edit(model)
    return model


def nan_norm(model):
    model.model.layers[1].input_layernorm.weight.fill_(torch.nan)


def merged():
    model = get_peft_model(llama(), MaskLoRAConfig(target_modules="all-linear"))
    model.merge_adapter()
    return model


def wanda(model, pattern=0.5, **options):
    return prune(model, pattern, criterion="wanda", **({"calibration": TOKENS} | options))


def rebuild(model=None, **options):
    return rebuilt(model or llama(), TOKENS, **{"max_steps": 2} | options)


def adapted(model=None, **options):
    return get_peft_model(model or llama(), MaskLoRAConfig(target_modules="all-linear", **options)).eval()


class _State:
    stateful_callbacks: dict = {}
    log_history: tuple = ()
    global_step = 0
    max_steps = 6


def arguments(**kwargs):
    return SparseTrainingArguments("unused", use_cpu=True, report_to="none", **kwargs)


def flap(model=None, ratio=0.3, **options):
    return prune_structured(model or llama(), ratio, **{"calibration": TOKENS} | options)
