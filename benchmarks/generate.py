"""Answers of 64 tokens: vlbench in batches against Hugging Face `generate`, in one run.

    python benchmarks/generate.py

The same model weight for weight, the same conversations with an image each, greedy, in float32.
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

import benchmark_model
import numpy as np
import torch
from PIL import Image
from result_table import write_section

from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.export_hf_llava import write_hf_llava

Messages = list[dict[str, Any]]
AnswerCall = Callable[[], list[list[int]]]

CONVERSATIONS, TOKENS, ROUNDS = 32, 64, 3
WORDS = "how many red blue green round balls boxes are there left right of the big small".split()


def make_conversations() -> list[Messages]:
    """Return questions of 5 to 60 words about images of noise."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(CONVERSATIONS):
        side = benchmark_model.IMAGE_SIZE
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        text = " ".join(rng.choice(WORDS, rng.integers(5, 60)))
        parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        found.append([{"role": "user", "content": parts}])
    return found


class TransformersPeer:
    """The same model weight for weight, as transformers has it."""

    def __init__(self, vlm: LoadedVLM) -> None:
        """Export `vlm`, and load it as its users do."""
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        with tempfile.TemporaryDirectory() as folder:
            write_hf_llava(vlm, Path(folder), None)
            self.model = LlavaForConditionalGeneration.from_pretrained(
                folder, attn_implementation="sdpa"
            )
            self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        self.processor.tokenizer.padding_side = "left"

    def generate_answers(self, messages: list[Messages]) -> list[list[int]]:
        """Return the new ids of every conversation, answered at once."""
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        with torch.inference_mode():
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()


def time_answer_calls(
    sides: dict[str, AnswerCall],
) -> tuple[dict[str, float], dict[str, list[list[int]]]]:
    """Run every side in turns; return the median seconds and the last answers of each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    new: dict[str, list[list[int]]] = {name: work() for name, work in sides.items()}
    for _ in range(ROUNDS):
        for name, work in sides.items():
            began = time.perf_counter()
            new[name] = work()
            times[name].append(time.perf_counter() - began)
            print(".", end="", file=sys.stderr, flush=True)
    return {name: statistics.median(taken) for name, taken in times.items()}, new


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    vlm = benchmark_model.build_small_vlm().eval()
    peer, asked = TransformersPeer(vlm), make_conversations()
    sides: dict[str, AnswerCall] = {
        f"vlbench, batches of {CONVERSATIONS}": lambda: vlm.generate(
            vlm.prepare(asked), max_new_tokens=TOKENS
        ),
        "vlbench, one at a time": lambda: [
            vlm.generate(vlm.prepare(one), max_new_tokens=TOKENS)[0] for one in asked
        ],
        "Hugging Face, one at a time": lambda: [peer.generate_answers([one])[0] for one in asked],
        f"Hugging Face, batches of {CONVERSATIONS}": lambda: peer.generate_answers(asked),
    }
    seconds, new = time_answer_calls(sides)
    rates = {name: sum(map(len, new[name])) / seconds[name] for name in sides}
    texts = {
        name: [vlm.tokenizer.decode([token for token in one if token]) for one in new[name]]
        for name in sides
    }
    first = next(iter(sides))
    lines = ["| | tokens/s | vlbench is faster by | same text |", "|---|---:|---:|---:|"]
    for name in sides:
        same = sum(a == b for a, b in zip(texts[first], texts[name], strict=True))
        lines.append(
            f"| {name} | {rates[name]:.0f} | {rates[first] / rates[name]:.2f} x "
            f"| {same} of {CONVERSATIONS} |"
        )
    write_section("Answers", lines)


if __name__ == "__main__":
    main()
