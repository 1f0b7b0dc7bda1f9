"""Recipes: which stages a model goes through and with what numbers, and `compress`, which runs one."""

from .compression import compress
from .recipe import RECIPES, AdapterArguments, Recipe, TextArguments, load_recipe


__all__ = [
    "RECIPES",
    "AdapterArguments",
    "Recipe",
    "TextArguments",
    "compress",
    "load_recipe",
]
