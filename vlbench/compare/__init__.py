"""Comparison: a grid of runs, what they cost, and what their differences mean."""
