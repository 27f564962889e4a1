"""Train the miniature language model: Yi's architecture, on text of the rendered world alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlbench.data.sample_encoding import CachedTokenizer
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.attention_init import initialize_attention
from vlbench.miniatures.language_curriculum import (
    CURRICULUM,
    SkillScores,
    build_optimizers,
    teach_lesson,
)
from vlbench.miniatures.make_tokenizer import VOCAB_SIZE
from vlbench.miniatures.measure_language_model import measure_perplexity, measure_text_answers


def language_model_config() -> LlamaConfig:
    """Return Yi's architecture, narrow and shallow."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def create_language_model(
    folder: Path, tokenizer: Tokenizer, log: Callable[[str], None] = print
) -> dict[str, object]:
    """Train the language model, write it to `folder`, and return its quality."""
    torch.manual_seed(12)
    model = LlamaForCausalLM(language_model_config())
    model.set_attn_implementation("eager")  # on CPUs the fused kernel's backward is slower
    initialize_attention(model)
    start, scores, memo = time.monotonic(), SkillScores(), CachedTokenizer(tokenizer)
    optimizers = build_optimizers(model)
    for number, lesson in enumerate(CURRICULUM):
        teach_lesson(model, optimizers, memo, lesson, number, scores, log)
    seconds = time.monotonic() - start
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    model.float().eval()
    answers = measure_text_answers(model, tokenizer)
    figures = {"perplexity": measure_perplexity(model, tokenizer), **answers, "seconds": seconds}
    log(f"language {figures}")
    return figures
