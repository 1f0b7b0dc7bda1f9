"""Perplexities of a run as the table of a card, and as results that the Hub shows beside a model."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult


PROTOCOL = (
    "Perplexity is exp of the mean cross entropy over all predicted tokens, which are all tokens of a sequence but "
    "the first. Lower is better. It can be compared only on the same text, in sequences of the same length, with the "
    "same tokenizer."
)
# The texts of a compression that its stages were measured on.
_EVALUATION = "evaluation, "


def perplexity_section(done: Mapping[str, Any]) -> str:
    """Return the table of perplexities by stage, with the protocol. Empty if nothing was measured."""
    stages = list(done.get("stages") or ())
    texts = [text for stage in stages for text in stage["perplexity"]]
    texts = list(dict.fromkeys(texts))
    if not texts:
        return ""
    head = ["model", *(f"perplexity, {text}" for text in texts), "sparsity"]
    rows = [
        [
            stage["name"],
            *(_number(stage["perplexity"].get(text)) for text in texts),
            "" if stage.get("sparsity") is None else f"{stage['sparsity']:.4f}",
        ]
        for stage in stages
    ]
    measured = [_measured(text, done.get("texts") or {}) for text in texts]
    told = "".join(f"\n- {line}" for line in measured if line)
    return f"## Perplexity\n\n{table(head, rows)}\n\n{PROTOCOL}\n{told}".rstrip()


def results(done: Mapping[str, Any]) -> list[EvalResult]:
    """Return the perplexities of the last stage, for the `model-index` of a card."""
    stages = [stage for stage in done.get("stages") or () if stage["perplexity"]]
    texts = done.get("texts") or {}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "text",
            dataset_name=text,
            dataset_args=_args(texts.get(_EVALUATION + text)),
            metric_type="perplexity",
            metric_name="perplexity",
            metric_value=round(value, 4),
        )
        for text, value in (stages[-1]["perplexity"] if stages else {}).items()
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, with its numbers at the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _measured(text: str, texts: Mapping[str, Any]) -> str:
    found = texts.get(_EVALUATION + text)
    if not found:
        return ""
    digest = f", digest of the tokens `{found['digest']}`" if found.get("digest") else ""
    if "length" in found:
        return f"{text}: {found['sequences']:,} sequences of {found['length']:,} tokens{digest}."
    return f"{text}: {found['tokens']:,} predicted tokens{digest}."


def _args(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return (
        {name: found[name] for name in ("sequences", "length", "tokens", "digest") if name in found} if found else None
    )
