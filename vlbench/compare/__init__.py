"""Comparison of connectors: a grid of runs with matched budgets, and its statistics."""
