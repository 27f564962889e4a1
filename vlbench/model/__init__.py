"""The model: vision tower, connector and language model, and the place where they meet."""
