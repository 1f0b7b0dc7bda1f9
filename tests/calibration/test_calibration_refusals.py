"""Every refusal of `calibration/`, with its words."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModel, DynamicCache

from peft_sparse import pack_sequences, perplexity, prune, sample_sequences

from conftest import CONFIGS
from refusing import TOKENS, flap, llama, nan_norm, rebuild, wanda


def zero_norm(model):
    model.model.layers[1].input_layernorm.weight.zero_()


def nan_head(model):
    model.lm_head.weight[0, 0] = torch.nan


def headless_gradients():
    prune(AutoModel.from_config(CONFIGS["llama"]), 0.5, criterion="gblm", calibration=TOKENS)


class Unmasked(nn.Module):
    def forward(self, input_ids):
        return input_ids


class TwoTowers(torch.nn.Module):
    """Of which no input comes to the second."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (
            torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4))]) for _ in range(2)
        )  # fmt: skip

    def forward(self, x):
        return self.one[0](x)


class Stairs(torch.nn.Module):
    """Does something between its blocks."""

    def __init__(self, in_place):
        super().__init__()
        self.steps = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
        self.in_place = in_place

    def forward(self, x):
        for step in self.steps:
            x = step(x)
            x = x.add_(1) if self.in_place else x + 1
        return x


def words(text, **options):
    return {"input_ids": text.split()}


def unused_layer(model):
    model.model.layers[0].idle = nn.Linear(4, 4)


def ignored():
    """A model that calls a layer and does nothing with what it returns."""
    model = llama(unused_layer)

    def call_idle(*args):
        model.model.layers[0].idle(torch.ones(1, 4))

    model.model.layers[0].mlp.register_forward_hook(call_idle)
    return model


REFUSALS = [
    (
        lambda: prune(llama(), 0.5, criterion="wanda", calibration=TOKENS.float()),
        ValueError,
        "Expected `calibration` as token ids, .* got torch.float32",
    ),
    (lambda: prune(llama(), 0.5, criterion="wanda", calibration=TOKENS[0]), ValueError, r"of shape \(8,\)"),
    (lambda: prune(llama(), 0.5, criterion="wanda", calibration=[]), ValueError, "`calibration` holds no batch"),
    (lambda: wanda(llama(), calibration=iter([])), ValueError, "holds no batch. .* An iterator gives its data once"),
    (
        lambda: wanda(llama(), calibration=["a text", "another"]),
        ValueError,
        r"Expected `calibration` as token ids or model inputs, got text. .*: `pack_sequences\(texts, tokenizer\)`",
    ),
    (
        lambda: wanda(llama(), calibration=Dataset.from_dict({"text": ["a", "b"], "idx": [0, 1]})),
        ValueError,
        r"got only texts, under 'text'. .*: `pack_sequences\(data\['text'\], tokenizer\)`",
    ),
    (
        lambda: wanda(llama(), calibration={"train": Dataset.from_dict({"input_ids": [[1]]})}),
        ValueError,
        r"as one split of a data set, got a dict of 1 splits. Choose one, such as `data\['train'\]`",
    ),
    (
        lambda: wanda(llama(), calibration=[{}]),
        ValueError,
        "as a dict of inputs of LlamaForCausalLM with at least one tensor, got an empty dict. It takes 'input_ids', ",
    ),
    (
        lambda: wanda(llama(), calibration=[1, 2, 3]),
        ValueError,
        "of token ids or of pairs .*, got int. .* put a single sequence into a list",
    ),
    (
        lambda: wanda(llama(), calibration=3),
        ValueError,
        r"Expected `calibration` as token ids \(sequences, tokens\), a dict of model inputs, .*, got int",
    ),
    (
        lambda: wanda(llama(), calibration=[{"input_ids": TOKENS.float()}]),
        ValueError,
        "Expected `input_ids` of `calibration` as int64 or int32, got torch.float32 of shape",
    ),
    (
        lambda: wanda(llama(), calibration=[(TOKENS, torch.ones_like(TOKENS))]),
        ValueError,
        r"as \(input,\) or \(input, target\), got 2 tensors that may be masks. Give dicts",
    ),
    (
        lambda: wanda(llama(), calibration={"input_ids": [[1, 2], [3]], "attention_mask": [[1]]}),
        ValueError,
        "Expected the same number of sequences under every name of `calibration`, got {'input_ids': 2, 'attention_m",
    ),
    (
        lambda: perplexity(Unmasked(), [{"input_ids": [[1, 2], [3]]}]),
        ValueError,
        "Expected the sequences of a batch of `sequences` to be equally long, .* 'input_ids' holds .* one by one",
    ),
    (
        lambda: wanda(llama(), calibration={"input_ids": TOKENS, "token_mask": TOKENS[:, 1:] > 0}),
        ValueError,
        r"`token_mask` of `calibration` as a tensor .* of the shape \(1, 8\) .* got torch.bool of shape \(1, 7\)",
    ),
    (
        lambda: prune(llama(), 0.5, [{"input_ids": TOKENS, "past_key_values": DynamicCache()}], criterion="gblm"),
        ValueError,
        '"gblm" sums over single sequences, .* tensors of another first dimension: .* Give batches of one sequence',
    ),
    (
        lambda: wanda(llama(), activations="ram"),
        ValueError,
        "`activations` must be one of 'device', 'cpu', 'disk', got",
    ),
    (
        lambda: prune(llama(nan_norm), 0.5, criterion="wanda", calibration=TOKENS),
        ValueError,
        "Expected finite inputs, but those of layer 'model.layers.1.self_attn.q_proj' hold NaN",
    ),
    (
        lambda: wanda(llama(), calibration=[{"inputs_embeds": torch.full((1, 4, 16), torch.nan)}]),
        ValueError,
        "Expected finite inputs, but those of layer 'model.layers.0.self_attn.q_proj' hold NaN",
    ),
    (
        lambda: wanda(llama(zero_norm)),
        ValueError,
        "All inputs of layer 'model.layers.1.self_attn.q_proj' are zero, so they say nothing about its weights. Check",
    ),
    (
        lambda: wanda(llama(unused_layer)),
        ValueError,
        r"No calibration batch multiplies 'model.layers.0.idle' with inputs .* `exclude_modules=\['idle'\]`",
    ),
    (headless_gradients, ValueError, '"gblm" needs a loss, and LlamaModel returned none. Give .* with `labels`'),
    (
        lambda: prune(ignored(), 0.5, criterion="gblm", calibration=TOKENS),
        ValueError,
        r"No gradient reached 'model.layers.0.idle' \(1 such weights\)",
    ),
    (
        lambda: prune(llama(nan_head), 0.5, criterion="gblm", calibration=TOKENS),
        ValueError,
        "The gradient of 'model.layers.2.mlp.down_proj' is not finite. Run the model in float32",
    ),
    (
        lambda: sample_sequences(["a b c", "a b"], words, count=2, length=2),
        ValueError,
        "Expected 2 documents of more than 2 tokens, found 1 among 2. Give more",
    ),
    (
        lambda: pack_sequences(["a b", "c"], words, length=4),
        ValueError,
        "Expected a text of at least one sequence of 4 tokens, got 3 tokens",
    ),
    (
        lambda: pack_sequences(Dataset.from_dict({"text": ["a"]}), words, length=1),
        TypeError,
        r'Expected `documents` as texts, got dict. .* such as `dataset\["text"\]`',
    ),
    (
        lambda: perplexity(llama(), TOKENS.float()),
        ValueError,
        "Expected `sequences` as token ids, .* got torch.float32",
    ),
    (lambda: perplexity(llama(), "text"), ValueError, "Expected `sequences` as token ids .* got text. Make token ids"),
    (lambda: perplexity(llama(), ["text"]), ValueError, "Expected `sequences` as token ids .* got text. Make token"),
    (lambda: perplexity(llama(), []), ValueError, "`sequences` holds no batch. Give at least one sequence"),
    (lambda: flap(activations="ram"), ValueError, "`activations` must be one of 'device', 'cpu', 'disk', got 'ram'"),
    (lambda: rebuild(llama(), activations="gpu"), ValueError, "`activations` must be one of 'device', .* got 'gpu'"),
    (
        lambda: wanda(TwoTowers(), calibration=[{"x": torch.ones(1, 2, 4)}]),
        ValueError,
        "No calibration batch runs the blocks of 'two'. Give batches that do, .* or leave these layers out",
    ),
    (
        lambda: wanda(Stairs(in_place=False), calibration=[{"x": torch.ones(1, 2, 4)}]),
        ValueError,
        "Between 'steps.0' and 'steps.1' the model changes the hidden states, .* Prune by a criterion that needs no",
    ),
    (
        lambda: wanda(Stairs(in_place=True), calibration=[{"x": torch.ones(1, 2, 4)}]),
        ValueError,
        "Between 'steps.0' and 'steps.1' the model changes the hidden states, .* or give batches for which the model",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
