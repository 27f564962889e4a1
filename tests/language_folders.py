"""Folders of small random language models, one of each family that works here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from golden_release import CHECKPOINT
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

WIDTH, VOCABULARY = 32, 1600
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
    "logits_scaling": 6.0,
}
FAMILY_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3, scaled positions": ("llama", {"rope_parameters": LLAMA_3_ROPE, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral, window of all": ("mistral", {"sliding_window": 512}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "sliding_window": 64}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", GRANITE),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "attention_bias": True}),
}
"""Name -> model_type and what is special in its configuration."""


def write_language_folder(name: str, folder: Path, **more: Any) -> Path:
    """Write the family `name` of FAMILY_OPTIONS with the golden tokenizer; norms are not ones."""
    kind, options = FAMILY_OPTIONS[name]
    config = CONFIG_MAPPING[kind](**SMALL | options | more)
    torch.manual_seed(3)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in CHECKPOINT.glob("*token*"):
        shutil.copy(file, folder)
    return folder
