"""Sharing: packed checkpoints.

Importing this package lets Transformers load packed checkpoints.
"""

from .packed_quantizer import enable_packed_models


__all__ = ["enable_packed_models"]

enable_packed_models()
