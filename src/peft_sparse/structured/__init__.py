"""Structured pruning of whole attention heads, MLP neurons and experts.

    units       finds the heads and neurons of a model
    cutting     cuts them out, and puts them back
    metrics     weights and statistics -> one number per channel
    selection   scores -> the units to remove
    flap        prune_structured: writes zeros and compensating biases
    report      what prune_structured returns
    compaction  compact: cuts the zeros out
    experts     finds the experts of a model, and cuts them out
    routing     observes where a router sends tokens, and proves that experts can be removed
    novices     constants in the place of experts
    reap        prune_structured for experts
    saving      makes save_pretrained and from_pretrained work for the result

Importing this package registers the configuration of compact models with Transformers.
"""

from .compaction import compact
from .flap import prune_structured
from .report import StructuredReport, UnitsReport


__all__ = ["StructuredReport", "UnitsReport", "compact", "prune_structured"]
