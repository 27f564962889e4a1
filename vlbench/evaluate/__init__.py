"""Evaluation: held-out questions, benchmarks, scoring, and the results of a run."""
