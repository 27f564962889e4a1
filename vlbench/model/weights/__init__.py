"""Weights on disk: files of tensors, and the layouts of others (Yi-VL's, Hugging Face's LLaVA)."""
