"""Recipes: the schema of every key, files and overrides merged, checked before anything is loaded."""
