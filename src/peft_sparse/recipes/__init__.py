"""Recipes: which stages a model goes through and with what numbers, and `compress`, which runs one."""

from .compression import compress
from .recipe import RECIPES, AdapterArguments, Recipe, TextArguments, load_recipe
from .report import CompressionReport, Stage


__all__ = [
    "RECIPES",
    "AdapterArguments",
    "CompressionReport",
    "Recipe",
    "Stage",
    "TextArguments",
    "compress",
    "load_recipe",
]
