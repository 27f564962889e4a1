"""Benchmarks that others defined: their answers, scored as their own code scores them."""
