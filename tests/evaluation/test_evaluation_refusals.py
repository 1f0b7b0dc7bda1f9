"""Every refusal of `evaluation/`, with its words."""

import pytest
import torch
from transformers import AutoModel

from peft_sparse import perplexity

from conftest import CONFIGS
from refusing import TOKENS, llama, nan_norm


REFUSALS = [
    (lambda: perplexity(llama(nan_norm), TOKENS), ValueError, "Expected a finite loss, got nan"),
    (
        lambda: perplexity(llama(), TOKENS[:, :1]),
        ValueError,
        "at least one token to predict, got none. Give sequences",
    ),
    (lambda: perplexity(llama(), [{"input_ids": TOKENS, "labels": TOKENS * 0 - 100}]), ValueError, "to predict, got"),
    (
        lambda: perplexity(llama(), [{"inputs_embeds": torch.zeros(1, 4, 16)}]),
        ValueError,
        "Perplexity needs `labels` or `input_ids`, got a batch of 'inputs_embeds'. Add `labels`",
    ),
    (
        lambda: perplexity(AutoModel.from_config(CONFIGS["llama"]), TOKENS),
        ValueError,
        "Perplexity needs logits, and LlamaModel returned none. Give a model with a language-modelling head",
    ),
    (
        lambda: perplexity(llama(), [{"input_ids": TOKENS, "labels": TOKENS[:, 1:]}]),
        ValueError,
        r"logits for each label, got logits \(4, 8, 61\) and labels \(4, 7\) from LlamaForCausalLM. Give a language",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
