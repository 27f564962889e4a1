"""Recipes: the schema of every key; files and overrides merged and checked."""
