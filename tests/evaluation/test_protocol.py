import hashlib

import evaluate
import pytest
import torch

from peft_sparse import pack_sequences, perplexity
from peft_sparse.evaluation import load_model, metric_path, text_perplexity

from conftest import tiny
from evaluated import TEXT, save_adapter, save_dense
from texts import character_tokenizer


@pytest.fixture
def metric(tmp_path, monkeypatch):
    """The metric, loaded without network into folders of the test."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    return evaluate.load(metric_path("perplexity"), cache_dir=str(tmp_path / "cache"))


def test_a_text_has_the_perplexity_of_its_packed_sequences(llama):
    tokenizer = character_tokenizer()
    windows = pack_sequences(TEXT, tokenizer, 16)
    found = text_perplexity(llama, tokenizer, TEXT, window=16, batch_size=3)
    assert found.perplexity == perplexity(llama, windows, batch_size=3)
    assert (found.windows, found.tokens) == (len(windows), len(windows) * 15)
    assert text_perplexity(llama, tokenizer, TEXT, window=16, max_windows=2).perplexity == perplexity(
        llama, windows[:2]
    )


def test_the_result_says_what_it_depends_on(llama):
    tokenizer = character_tokenizer()
    found = text_perplexity(llama, tokenizer, TEXT, window=16).to_dict()
    assert found["text_digest"] == hashlib.sha256("\n\n".join(TEXT).encode()).hexdigest()[:16]
    assert "windows of 16 tokens, stride 16" in found["protocol"]
    other = text_perplexity(llama, tokenizer, TEXT, window=8).to_dict()
    assert other["text_digest"] == found["text_digest"]
    assert other["token_digest"] != found["token_digest"]


def test_the_metric_of_evaluate_is_the_same_number(metric, llama):
    tokenizer = character_tokenizer()
    found = metric.compute(predictions=TEXT, model=llama, tokenizer=tokenizer, window=16)
    assert found == text_perplexity(llama, tokenizer, TEXT, window=16).to_dict()
    assert found["perplexity"] == perplexity(llama, pack_sequences(TEXT, tokenizer, 16))


def test_the_metric_loads_a_model_or_an_adapter_by_its_path(metric, tmp_path):
    base = save_dense(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    windows = pack_sequences(TEXT, character_tokenizer(), 16)
    dense, adapted = (metric.compute(predictions=TEXT, model=path, window=16) for path in (base, adapter))
    assert dense["perplexity"] == perplexity(tiny("llama"), windows)
    assert adapted["perplexity"] == perplexity(load_model(adapter, device="cpu").model, windows)
    assert adapted["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-3)


def test_the_metric_asks_for_the_tokenizer_of_a_model_in_memory(metric, llama):
    with pytest.raises(ValueError, match="A model in memory needs its tokenizer"):
        metric.compute(predictions=TEXT, model=llama)


def test_a_text_in_several_batches_of_documents_is_one_text(metric, llama):
    tokenizer = character_tokenizer()
    for document in TEXT:
        metric.add_batch(predictions=[document])
    assert (
        metric.compute(model=llama, tokenizer=tokenizer, window=16)
        == text_perplexity(llama, tokenizer, TEXT, window=16).to_dict()
    )
    assert torch.is_grad_enabled()
