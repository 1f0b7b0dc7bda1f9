"""Prune, retrain without filling a zero, merge, share: sparse models in transformers and PEFT."""

from .masks import SemiStructured, Unstructured
from .prune import prune, sparsity
from .tuners import MaskLoRAConfig


__all__ = ["MaskLoRAConfig", "SemiStructured", "Unstructured", "prune", "sparsity"]

__version__ = "0.1.0.dev0"
