import math

import pytest

from peft_sparse import perplexity, prune
from peft_sparse.evaluation.domains import PerplexityReport, perplexity_by_domain

from conftest import tiny


def test_each_domain_has_the_perplexity_that_it_alone_has(llama, tokens):
    domains = {"short": tokens[:2, :5], "masked": {"input_ids": tokens, "token_mask": tokens % 2}}
    dense = perplexity_by_domain(llama, domains, batch_size=2)
    assert dense.perplexity == {name: perplexity(llama, data, batch_size=2) for name, data in domains.items()}
    assert dense.tokens == {"short": 8, "masked": int((tokens[:, 1:] % 2).sum())}
    assert dense.dense == dense.ratio == {}

    prune(llama, 0.5)
    pruned = perplexity_by_domain(llama, domains, dense=dense)
    assert pruned.dense == dense.perplexity
    for name in domains:
        assert pruned.ratio[name] == pytest.approx(perplexity(llama, domains[name]) / dense.perplexity[name], rel=1e-5)
    assert pruned.to_dict()["ratio"] == pruned.ratio


def test_a_domain_may_be_missing_of_those_the_dense_model_was_measured_on(tokens):
    model = tiny("llama")
    dense = perplexity_by_domain(model, {"one": tokens, "two": tokens[:2]})
    assert list(perplexity_by_domain(model, {"two": tokens[:2]}, dense=dense).ratio) == ["two"]


def test_the_report_is_a_table():
    report = PerplexityReport({"wikitext": 149.123, "c4": math.inf}, {"wikitext": 4092, "c4": 12}, {})
    assert str(report) == "\n".join(
        ["domain    tokens  perplexity", "wikitext   4,092      149.12", "c4            12         inf"]
    )
    compared = PerplexityReport({"wikitext": 149.123}, {"wikitext": 4092}, {"wikitext": 23.2})
    assert str(compared).splitlines()[1] == "wikitext   4,092      149.12  23.20   6.43"
