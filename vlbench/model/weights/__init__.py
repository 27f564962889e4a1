"""Weights on disk: tensor files, and released layouts (Yi-VL, LLaVA, CLIP) in and out."""
