"""The model: vision encoder, connector, language model, and the VLM that composes them."""
