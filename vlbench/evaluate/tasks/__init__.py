"""Tasks of `eval` and `score`: data, prompts and scores of benchmarks and of conversations."""
