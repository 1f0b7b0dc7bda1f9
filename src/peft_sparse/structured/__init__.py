"""Structured pruning: whole attention heads and MLP neurons.

    metrics     how much an input channel matters
    selection   which units go for a ratio of true parameter counts
    flap        prune_structured: zeros and compensating biases
    compaction  compact: cuts the zeros out
    saving      how the result is saved and loaded again

Importing it registers the configuration of compact models with Transformers.
"""

from .compaction import compact
from .flap import prune_structured
from .report import StructuredReport, UnitsReport


__all__ = ["StructuredReport", "UnitsReport", "compact", "prune_structured"]
