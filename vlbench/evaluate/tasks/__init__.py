"""Benchmarks with questions and scorers of their own: MMMU and CMMMU."""
