"""Conversations of a small random model, of many lengths, with and without images."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from random_vlm import SMALL, NoiseImage, open_gates, small_vlm

from vlbench.connector import registry
from vlbench.contract_checks.small_model import extend_prompt
from vlbench.data.image_tiling import ImageTiling
from vlbench.data.packing import PackedBatch
from vlbench.data.view_layout import ViewSettings
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.processor import ChatMessage

TILED = {
    "llava_mlp": ViewSettings(ImageTiling(4), "newline"),
    "deepstack": ViewSettings(ImageTiling(6, "internvl"), "numbered"),
    "flamingo": ViewSettings(ImageTiling(4, "internvl"), "none"),
    "cross_attention": ViewSettings(ImageTiling(4), "newline"),
    "instruct_qformer": ViewSettings(ImageTiling(3), "numbered"),
    "mixed": ViewSettings(ImageTiling(6, "internvl"), "newline"),
}
"""How images become views with `tiled` before a connector's name."""
IMAGE_SIZES = ((28, 28), (70, 30), (56, 60), (20, 90))
"""Width and height of an image in pixels, by its seed: other grids with every rule."""


def build_asked_vlm(name: str) -> LoadedVLM:
    """Return a small random model with open gates that never says the stop text.

    `name` is a connector's, or `tiled` and a connector's, of a model with views.
    """
    connector = name.removeprefix("tiled ")
    settings = None if connector == name else TILED[connector]
    vlm = small_vlm(registry.load_connector(connector), SMALL.get(connector), settings)
    vlm = open_gates(vlm).eval()
    template = replace(vlm.processor.template, stop="never said")
    vlm.processor = replace(vlm.processor, template=template)
    return vlm


def noise(seed: int) -> NoiseImage:
    """Return an image of noise whose size goes with its seed."""
    return NoiseImage(seed, IMAGE_SIZES[seed % len(IMAGE_SIZES)])


def ask(text: str, *images: int) -> dict[str, Any]:
    """Return a question about images of noise, by their seeds."""
    shown = [{"type": "image", "image": noise(seed).open()} for seed in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def answered(text: str) -> dict[str, Any]:
    """Return an answer."""
    return {"role": "assistant", "content": text}


def make_conversations(count: int, seed: int = 0) -> list[list[ChatMessage]]:
    """Return conversations of one to three turns with none to three images each."""
    rng = random.Random(seed)
    conversations: list[list[ChatMessage]] = []
    for number in range(count):
        messages: list[ChatMessage] = []
        for turn in range(rng.choice((1, 1, 2, 3))):
            messages += [answered("it is " + "so " * rng.randrange(5))] if turn else []
            images = [rng.randrange(9) for _ in range(rng.choice((0, 0, 1, 2, 3)))]
            messages.append(ask(f"{number}? " + "word " * rng.randrange(20), *images))
        conversations.append(messages)
    return conversations


def recomputed(vlm: LoadedVLM, prompt: PackedBatch, tokens: int) -> list[int]:
    """Answer a prompt of one row, all of it computed again for every token."""
    new_ids = []
    with torch.no_grad():
        for _ in range(tokens):
            logits = vlm(prompt).logits
            new_ids.append(int(logits[0, -1, : vlm.tokenizer.embedding_rows].argmax()))
            prompt = extend_prompt(prompt, new_ids[-1])
    return new_ids
