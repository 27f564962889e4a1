"""The small random model of `vlbench.contract_checks`, with the golden tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlbench.connector.base import Connector
from vlbench.contract_checks.small_model import (
    SMALL_OPTIONS,
    NoiseImage,
    build_small_vlm,
    make_batch,
    make_question,
    make_sample,
    open_gates,
)
from vlbench.data.packing import PackedBatch
from vlbench.data.view_layout import ViewSettings
from vlbench.model.generation.kv_cache import PrefixCache
from vlbench.model.loaded_vlm import LoadedVLM

__all__ = [
    "SMALL",
    "NoiseImage",
    "assert_later_images_are_cached",
    "assert_plain_logits",
    "make_batch",
    "make_sample",
    "open_gates",
    "small_vlm",
]

CHECKPOINT = Path(__file__).parent / "goldens" / "yi_vl" / "checkpoint"
SMALL = SMALL_OPTIONS


def small_vlm(
    connector: type[Connector],
    options: dict[str, Any] | None = None,
    view_settings: ViewSettings | None = None,
) -> LoadedVLM:
    """Build the model with `connector`, always the same."""
    return build_small_vlm(connector, options, CHECKPOINT, view_settings=view_settings)


def assert_plain_logits(vlm: LoadedVLM, batch: PackedBatch) -> None:
    """Assert that the logits are those of the language model without what is injected."""
    batch.labels = None
    with torch.no_grad():
        ours = vlm(batch).logits
        embeds = vlm.model.merge_embeddings(batch, vlm.visual(batch))
        for hook in vlm.model._inject_hooks:
            hook.remove()
        plain = vlm.language.model(
            inputs_embeds=embeds, position_ids=batch.position_ids, lengths=batch.sample_lengths
        )
        assert torch.equal(ours, vlm.language.lm_head(plain.last_hidden_state))


def assert_later_images_are_cached(vlm: LoadedVLM) -> None:
    """Assert that a conversation of 0, 1 and 2 new images is answered as without its cache."""
    vlm.model.eval()
    past, messages = PrefixCache(), []
    for turn, images in enumerate((0, 1, 2)):
        question = make_question(turn, images=images)
        content = [{"type": "image", "image": image.open()} for image in question.images]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": "what?"}]})
        batch = vlm.prepare(messages)
        cached = vlm.generate(batch, max_new_tokens=5, past=past)
        assert cached == vlm.generate(batch, max_new_tokens=5)
        messages.append({"role": "assistant", "content": "it is"})
