"""Sharing: model cards, pushing to the Hub, packed checkpoints, and what a checkpoint holds.

Importing this package lets every way by which a model or an adapter is saved or leaves for the Hub write its card, and
lets Transformers load packed checkpoints.
"""

from .card import write_card
from .hub import enable_cards
from .hub_push import push_folder
from .inspection import inspect_checkpoint
from .packed_quantizer import enable_packed_models
from .packing import pack_checkpoint, unpack_checkpoint


__all__ = [
    "enable_cards",
    "enable_packed_models",
    "inspect_checkpoint",
    "pack_checkpoint",
    "push_folder",
    "unpack_checkpoint",
    "write_card",
]

enable_cards()
enable_packed_models()
