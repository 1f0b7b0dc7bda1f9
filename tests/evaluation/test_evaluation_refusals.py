"""Every refusal of `evaluation/`, with its words."""

import pytest
import torch
from transformers import AutoModel

from peft_sparse import perplexity
from peft_sparse.evaluation.domains import PerplexityReport, perplexity_by_domain

from conftest import CONFIGS
from refusing import TOKENS, llama, nan_norm


DENSE = PerplexityReport({"c4": 9.0}, {"c4": 28}, {})

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
    (
        lambda: perplexity_by_domain(llama(), {"input_ids": TOKENS}),
        ValueError,
        "Expected `domains` as a dict of sequences by the name of a domain, got 'input_ids'. Write",
    ),
    (
        lambda: perplexity_by_domain(llama(), {"c4": TOKENS, "code": TOKENS}, dense=DENSE),
        ValueError,
        "Expected the domains of `domains` in `dense`, and it lacks 'code'. Measure the dense model on the same",
    ),
    (
        lambda: perplexity_by_domain(llama(), {"c4": TOKENS[:1]}, dense=DENSE),
        ValueError,
        r"text of domain 'c4' on which the dense model was measured \(28 tokens\), got 7 tokens. Measure both",
    ),
    (
        lambda: perplexity_by_domain(llama(), {"c4": TOKENS, "code": []}),
        ValueError,
        r"`domains\['code'\]` holds no batch. Give at least one sequence",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()
