"""Layer-wise reconstruction: prunes a model region by region, and fits each region to what it computed when dense.

Only one region is trained at a time: its weights, gradients and optimiser state, and the activations of one batch, are
all the memory that training takes. Zimmer et al. 2023, arXiv:2312.15230; "A Free Lunch in LLM Compression", 2025,
arXiv:2510.14444.
"""

from .reconstruct import reconstruct, reconstruct_checkpoint


__all__ = ["reconstruct", "reconstruct_checkpoint"]
