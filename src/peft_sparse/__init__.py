"""Prune, retrain without filling a zero, merge, share: sparse models in transformers and PEFT."""

__version__ = "0.1.0.dev0"
