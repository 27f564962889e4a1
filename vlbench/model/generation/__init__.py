"""Decoding: KV caches, sampling, compiled steps, and chat messages made into prompts."""
