"""Recipes: their schema, how they are loaded and written, and the ones that ship."""
