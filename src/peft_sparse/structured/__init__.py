"""Structured pruning of whole attention heads, MLP neurons, experts and filters.

    units           finds the heads and neurons of a model
    cutting         cuts them out, and puts them back
    metrics         weights and statistics -> one number per channel
    selection       scores -> the units to remove
    flap            prune_structured: writes zeros and compensating biases
    report          what prune_structured returns
    compaction      compact: cuts the zeros out
    experts         finds the experts of a model, and cuts them out
    routing         observes where a router sends tokens, and proves that experts can be removed
    novices         constants in the place of experts
    reap            prune_structured for experts
    channels        which channels of the result of an operation are which of its inputs
    channel_trace   runs a model, and notes which channels its layers make and read
    filters         finds the filters that can be removed, with all that belongs to them
    filter_metrics  weights and statistics -> one number per filter
    filter_pruning  prune_structured for filters
    filter_inputs   images on which convolutional networks are traced and compared
    filter_cutting  cuts filters out
    filter_saving   widths of layers, for the configuration
    saving          makes save_pretrained and from_pretrained work for the result

Importing this package registers the configuration of compact models with Transformers.
"""

from .compaction import compact
from .flap import prune_structured
from .report import StructuredReport, UnitsReport


__all__ = ["StructuredReport", "UnitsReport", "compact", "prune_structured"]
