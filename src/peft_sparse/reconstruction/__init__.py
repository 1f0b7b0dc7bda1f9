"""Layer-wise reconstruction: prunes a model region by region, and fits each region to its dense outputs.

Only one region at a time has gradients and an optimiser state, and its backward pass keeps the activations of one
batch. The hidden states of all calibration batches wait between the regions. Zimmer et al. 2023, arXiv:2312.15230
(PERP); "A Free Lunch in LLM Compression", 2025, arXiv:2510.14444.
"""

from .checkpoint import reconstruct_checkpoint
from .fit import Fit
from .observer import ReconstructionObserver, Step
from .reconstruct import reconstruct
from .report import ReconstructionReport, RegionReport
from .residual_lora import residual_lora
from .residual_report import ResidualReport, ResidualWeightReport


__all__ = [
    "Fit",
    "ReconstructionObserver",
    "ReconstructionReport",
    "RegionReport",
    "ResidualReport",
    "ResidualWeightReport",
    "Step",
    "reconstruct",
    "reconstruct_checkpoint",
    "residual_lora",
]
