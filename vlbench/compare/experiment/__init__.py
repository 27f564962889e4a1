"""Experiments: a grid of runs with matched budgets, trained one after the other or as jobs."""
