"""Measures perplexity on several kinds of text, and compares it with that of the dense model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calibration.inputs import Calibration
from .perplexity import exponential, mean_loss


@dataclass(frozen=True)
class PerplexityReport:
    """The perplexity of a model on several kinds of text. `str()` is a table.

    Args:
        perplexity: the perplexity on each domain, by the name of the domain.
        tokens: how many tokens were counted in each domain.
        dense: the perplexity of the dense model on each domain. Empty if no report of the dense model was given.
    """

    perplexity: dict[str, float]
    tokens: dict[str, int]
    dense: dict[str, float]

    @property
    def ratio(self) -> dict[str, float]:
        """The perplexity on each domain, divided by that of the dense model. Empty without a dense model."""
        return {name: self.perplexity[name] / dense for name, dense in self.dense.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {"perplexity": self.perplexity, "tokens": self.tokens, "dense": self.dense, "ratio": self.ratio}

    def __str__(self) -> str:
        head = ["domain", "tokens", "perplexity", *(["dense", "ratio"] if self.dense else [])]
        rows = [head]
        for name, value in self.perplexity.items():
            compared = [f"{self.dense[name]:.2f}", f"{self.ratio[name]:.2f}"] if self.dense else []
            rows.append([name, f"{self.tokens[name]:,}", f"{value:.2f}", *compared])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )


def perplexity_by_domain(
    model: nn.Module,
    domains: Mapping[str, Calibration],
    batch_size: int = 1,
    *,
    dense: PerplexityReport | None = None,
) -> PerplexityReport:
    """Return the perplexity of a language model on each of several kinds of text, as `perplexity` measures it.

    A pruned model is best on text like that of its calibration. One number on one text does not show what was lost on
    others.

    Args:
        model: a causal language model or an encoder-decoder with logits.
        domains: the sequences of each domain by its name, such as `{"wikipedia": sequences, "code": others}`. Each
            value is one that `perplexity` takes.
        batch_size: how many sequences run together, where they do not come in batches.
        dense: the report of the dense model on the same domains, to compare with.

    Raises:
        ValueError: there is no domain; `dense` lacks a domain or was measured on other text; what is not a language
            model, is not finite or holds no token, see `perplexity`.
    """
    if not isinstance(domains, Mapping) or not domains or "input_ids" in domains:
        found = ", ".join(map(repr, domains)) or "none" if isinstance(domains, Mapping) else type(domains).__name__
        raise ValueError(
            f"Expected `domains` as a dict of sequences by the name of a domain, got {found}. Write "
            '`{"name": sequences}`.'
        )
    losses: dict[str, tuple[float, int]] = {}
    if dense is not None and (missing := [name for name in domains if name not in dense.perplexity]):
        raise ValueError(
            f"Expected the domains of `domains` in `dense`, and it lacks {', '.join(map(repr, missing))}. Measure the "
            "dense model on the same `domains`."
        )
    for name, sequences in domains.items():
        losses[name] = mean_loss(model, sequences, batch_size, f"domains[{name!r}]")
        if dense is not None and dense.tokens[name] != losses[name][1]:
            raise ValueError(
                f"Expected the text of domain {name!r} on which the dense model was measured ({dense.tokens[name]} "
                f"tokens), got {losses[name][1]} tokens. Measure both models on the same `domains`."
            )
    return PerplexityReport(
        {name: exponential(loss) for name, (loss, _) in losses.items()},
        {name: count for name, (_, count) in losses.items()},
        {name: dense.perplexity[name] for name in domains} if dense is not None else {},
    )
