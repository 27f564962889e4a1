"""Recipes: the schema of every key, and files and overrides merged into a checked recipe."""
