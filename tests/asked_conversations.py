"""Conversations of a small random model, of many lengths, with and without images."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from random_vlm import SMALL, NoiseImage, open_gates, small_vlm

from vlbench.connector import registry
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.processor import ChatMessage


def build_asked_vlm(connector: str) -> LoadedVLM:
    """Return a small random model with open gates that never says the stop text."""
    vlm = open_gates(small_vlm(registry.load_connector(connector), SMALL.get(connector))).eval()
    template = replace(vlm.processor.template, stop="never said")
    vlm.processor = replace(vlm.processor, template=template)
    return vlm


def ask(text: str, *images: int) -> dict[str, Any]:
    """Return a question about images of noise, by their seeds."""
    shown = [{"type": "image", "image": NoiseImage(seed).open()} for seed in images]
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
