"""The language model: Yi, or any folder of the same (Llama) architecture, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from vlbench.mistakes import Mistake, nearest
from vlbench.model.attention import PACKED

TINY = Path(__file__).parent / "tiny" / "language"

# Yi-6B-Chat and Yi-34B-Chat, from their config.json (Yi report, arXiv:2403.04652, table 1).
YI: dict[str, dict[str, Any]] = {
    "yi-6b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 11008,
    },
    "yi-34b": {
        "hidden_size": 7168,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "intermediate_size": 20480,
    },
}
SHARED: dict[str, Any] = {
    "vocab_size": 64000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config_of(name: str) -> LlamaConfig:
    """Return the architecture `name`: "tiny", "yi-6b", "yi-34b" or a folder with `config.json`."""
    if name in YI:
        return LlamaConfig(**YI[name], **SHARED)
    folder = TINY if name == "tiny" else Path(name)
    if not (folder / "config.json").is_file():
        raise Mistake(
            f"language.name is '{name}'; allowed are tiny, {', '.join(YI)} or a folder with "
            f"config.json.{nearest(name, ['tiny', *YI])}"
        )
    return LlamaConfig.from_pretrained(folder)


def build_language(name: str, weights: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Build the language model `name` and load `weights`.

    `weights` is "embedded", "random", or a folder or hub id in the Hugging Face layout. The model
    attends over packed rows (model/attention.py).
    """
    logging.disable_progress_bar()  # of reading weights; it would stand above the training's own
    if weights == "random":
        model = AutoModelForCausalLM.from_config(
            config_of(name), dtype=dtype, attn_implementation=PACKED
        )
    else:
        folder = weights_folder(name, weights)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=PACKED)
    model.generation_config.eos_token_id = model.config.eos_token_id
    return model.train()  # there is no dropout; in eval mode checkpointing would silently be off


def weights_folder(name: str, weights: str) -> str:
    """Return where the weights and the tokenizer are read: a folder, or a hub id as it is."""
    if weights == "embedded":
        return str(TINY)
    if weights == "random" and name == "tiny":
        return str(TINY)
    if Path(weights).exists() and not (Path(weights) / "config.json").is_file():
        raise Mistake(f"language.weights is '{weights}', a folder without config.json")
    return weights
