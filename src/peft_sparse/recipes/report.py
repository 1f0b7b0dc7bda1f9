"""The report of a compression: what the model was after each stage, and what the stage cost."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..model.environment import environment


@dataclass(frozen=True)
class Stage:
    """A model after one stage.

    Args:
        name: "dense", "pruned", "reconstructed", "retrained" or "saved".
        perplexity: the perplexity on each text, by the name of the text.
        sparsity: the fraction of zeros in the prunable weights.
        seconds: how long the stage took, without these measurements.
        cpu_seconds: the time of all cores of this process for it.
        tokens: how many tokens the stage read, counted again in every pass.
    """

    name: str
    perplexity: dict[str, float]
    sparsity: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0


@dataclass
class CompressionReport:
    """What `compress` did, and what came of it.

    Args:
        recipe: the name of the recipe.
        arguments: the arguments of the recipe that differ from their defaults.
        stages: the model after each stage.
        peak_memory_bytes: the largest memory of the process.
        pruning, reconstruction: the reports of the two stages as plain values. None for a stage that was left out.
        texts: the number of sequences, their length and a digest of each text, by its name.
        resumed: whether an earlier process did a part of the work. `seconds` do not contain that part.
        environment: versions and hardware.
    """

    recipe: str
    arguments: dict[str, Any]
    stages: list[Stage]
    peak_memory_bytes: int
    pruning: dict[str, Any] | None = None
    reconstruction: dict[str, Any] | None = None
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    resumed: bool = False
    environment: dict[str, Any] = field(default_factory=environment)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        texts = list(self.stages[0].perplexity)
        names = ["perplexity"] if len(texts) == 1 else [f"perplexity, {text}" for text in texts]
        head = ["stage", *names, "sparsity", "tokens", "minutes"]
        rows = [
            [
                stage.name,
                *(f"{stage.perplexity[text]:.2f}" for text in texts),
                f"{stage.sparsity:.4f}",
                f"{stage.tokens:,}" if stage.tokens else "",
                f"{stage.seconds / 60:.1f}" if stage.seconds else "",
            ]
            for stage in self.stages
        ]
        rule = ["---", *("---:" for _ in head[1:])]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
