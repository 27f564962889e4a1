"""Answers of 64 tokens: vlbench in batches against Hugging Face `generate`, in one run.

    python benchmarks/generate.py

The same model weight for weight, the same conversations with a picture each, greedy, in float32.
The peer is called with one conversation at a time, as its users do, and with the whole batch too.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import small
import torch
from PIL import Image
from table import keep

from vlbench.model.weights.to_hf_llava import write_hf_llava

CONVERSATIONS, TOKENS, ROUNDS = 32, 64, 3
WORDS = "how many red blue green round balls boxes are there left right of the big small".split()


def conversations() -> list[list[dict[str, Any]]]:
    """Return questions of 5 to 60 words about pictures of noise."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(CONVERSATIONS):
        side = small.IMAGE_SIZE
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        text = " ".join(rng.choice(WORDS, rng.integers(5, 60)))
        parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        found.append([{"role": "user", "content": parts}])
    return found


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    vlm = small.model().eval()
    with tempfile.TemporaryDirectory() as folder:
        write_hf_llava(vlm, Path(folder), None)
        peer = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
        processor = AutoProcessor.from_pretrained(folder)
    asked = conversations()

    def told(some: list[list[dict[str, Any]]]) -> Any:
        processor.tokenizer.padding_side = "left"
        return processor.apply_chat_template(
            some,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def answers(some: list[list[dict[str, Any]]]) -> list[list[int]]:
        inputs = told(some)
        with torch.inference_mode():
            ids = peer.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    sides: dict[str, Callable[[], list[list[int]]]] = {
        f"vlbench, batches of {CONVERSATIONS}": lambda: vlm.generate(
            vlm.prepare(asked), max_new_tokens=TOKENS
        ),
        "vlbench, one at a time": lambda: [
            vlm.generate(vlm.prepare(one), max_new_tokens=TOKENS)[0] for one in asked
        ],
        "Hugging Face, one at a time": lambda: [answers([one])[0] for one in asked],
        f"Hugging Face, batches of {CONVERSATIONS}": lambda: answers(asked),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    texts: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for work in sides.values():
        work()  # once before it counts
    for _ in range(ROUNDS):
        for name, work in sides.items():
            began = time.perf_counter()
            new = work()
            times[name].append(time.perf_counter() - began)
            texts[name] = [vlm.tokenizer.decode([i for i in one if i]) for one in new]
            counts[name] = sum(map(len, new))
            print(".", end="", file=sys.stderr, flush=True)
    first = next(iter(sides))
    rates = {name: counts[name] / statistics.median(times[name]) for name in sides}
    lines = ["| | tokens/s | vlbench is faster by | same text |", "|---|---:|---:|---:|"]
    for name in sides:
        same = sum(a == b for a, b in zip(texts[first], texts[name], strict=True))
        lines.append(
            f"| {name} | {rates[name]:.0f} | {rates[first] / rates[name]:.2f} x "
            f"| {same} of {CONVERSATIONS} |"
        )
    keep("Answers", lines)


if __name__ == "__main__":
    main()
