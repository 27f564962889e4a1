"""Benchmarks: their data, what a model is asked, and the scores of what it answered."""
