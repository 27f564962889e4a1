"""The engine of `serve`: many conversations at once against one after the other, and its memory.

    python benchmarks/serve.py

A fresh miniature, greedy, in float32; every answer has the same number of tokens. Each side of each
round has images of its own, so that nothing but the system prompt is known from earlier requests.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image
from result_table import write_section

from vlbench.config import recipe as recipes
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.serve.answer_request import AnswerEnd, AnswerRequest
from vlbench.serve.generation_engine import GenerationEngine

IMAGE_SIZE = 112
CONVERSATIONS, TOKENS, ROUNDS = 32, 64, 3
MEMORY_REQUESTS, MEMORY_TOKENS, REQUESTS_PER_READING = 2000, 8, 100
WARM_UP_REQUESTS = 400  # until the kept prefixes and the allocator have their size
WORDS = "how many red blue green round balls boxes are there left right of the big small".split()


def build_endless_vlm() -> LoadedVLM:
    """Return the miniatures with a connector that was not trained, whose answers never end."""
    vlm = build_vlm(recipes.load_recipe(["recipe=yivl_llava"]).model, IMAGE_SIZE).eval()
    template = replace(vlm.processor.template, stop="never said")
    vlm.processor = replace(vlm.processor, template=template)
    weight = vlm.language.lm_head.weight.data
    weight[vlm.tokenizer.eos_token_id] = weight[0]  # of two equal logits the first is chosen
    return vlm


def make_requests(tokens: int) -> Iterator[AnswerRequest]:
    """Yield questions of 5 to 60 words about images of noise; no image comes twice."""
    for number in count():
        rng = np.random.default_rng(number)
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        text = " ".join(rng.choice(WORDS, 5 + number % CONVERSATIONS * 55 // CONVERSATIONS))
        parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        yield AnswerRequest([{"role": "user", "content": parts}], max_new_tokens=tokens)


class Client:
    """Submits requests, and waits until they have ended."""

    def __init__(self, engine: GenerationEngine) -> None:
        """Ask `engine`."""
        self.engine = engine
        self._ends: list[AnswerEnd | Exception] = []
        self._all_ended = threading.Event()

    def ask(self, requests: Sequence[AnswerRequest]) -> list[AnswerEnd]:
        """Ask at once; return how the answers ended."""
        self._ends = []
        self._all_ended.clear()

        def take_end(end: AnswerEnd | Exception) -> None:
            self._ends.append(end)
            if len(self._ends) == len(requests):
                self._all_ended.set()

        for request in requests:
            self.engine.submit(request, lambda text: None, take_end)
        self._all_ended.wait()
        for end in self._ends:
            if isinstance(end, Exception):
                raise end
        return [end for end in self._ends if isinstance(end, AnswerEnd)]

    def ask_one_by_one(self, requests: Sequence[AnswerRequest]) -> list[AnswerEnd]:
        """Ask one after the other; return how the answers ended."""
        return [end for request in requests for end in self.ask([request])]


class Side:
    """One way to answer, and what was measured of it."""

    def __init__(self, answer: Callable[[Sequence[AnswerRequest]], list[AnswerEnd]]) -> None:
        """Take what answers requests."""
        self.answer = answer
        self.seconds: list[float] = []
        self.first_tokens: list[float] = []

    def measure(self, requests: Sequence[AnswerRequest]) -> None:
        """Answer requests."""
        began = time.perf_counter()
        ends = self.answer(requests)
        self.seconds.append(time.perf_counter() - began)
        assert all(end.completion_tokens == TOKENS for end in ends)
        self.first_tokens += [end.seconds_to_first_token or 0.0 for end in ends]

    def rate(self) -> float:
        """Return tokens per second, the median of the rounds."""
        return CONVERSATIONS * TOKENS / statistics.median(self.seconds)


def compare_sides(vlm: LoadedVLM, engine: GenerationEngine) -> list[str]:
    """Return the table of tokens per second and times to the first token, in turns."""
    client, requests = Client(engine), make_requests(TOKENS)

    def chat(asked: Sequence[AnswerRequest]) -> list[AnswerEnd]:
        for request in asked:
            vlm.chat(request.messages, request.max_new_tokens)
        return []

    sides = {
        f"{CONVERSATIONS} at once": Side(client.ask),
        "one after the other": Side(client.ask_one_by_one),
        "`chat`, one after the other": Side(chat),
    }
    for side in sides.values():  # a round that is not counted
        Side(side.answer).measure([next(requests) for _ in range(CONVERSATIONS)])
    for _ in range(ROUNDS):
        for side in sides.values():
            side.measure([next(requests) for _ in range(CONVERSATIONS)])
            print(".", end="", file=sys.stderr, flush=True)
    best = next(iter(sides.values())).rate()
    lines = [
        f"| {TOKENS} tokens each, median of {ROUNDS} | tokens/s | at once is faster by "
        "| p95 of the time to the first token |",
        "|---|---:|---:|---:|",
    ]
    for name, side in sides.items():
        p95 = f"{np.percentile(side.first_tokens, 95):.2f} s" if side.first_tokens else ""
        lines.append(f"| {name} | {side.rate():.0f} | {best / side.rate():.1f} x | {p95} |")
    return lines


def resident_megabytes() -> float:
    """Return the memory of this process that is in RAM, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def measure_memory(engine: GenerationEngine) -> str:
    """Return how memory grows over MEMORY_REQUESTS requests, in words."""
    client, requests = Client(engine), make_requests(MEMORY_TOKENS)
    readings = []
    for done in range(0, WARM_UP_REQUESTS + MEMORY_REQUESTS + 1, REQUESTS_PER_READING):
        if done >= WARM_UP_REQUESTS:
            readings.append(resident_megabytes())
        left = REQUESTS_PER_READING
        while left:
            client.ask([next(requests) for _ in range(min(left, CONVERSATIONS))])
            left -= min(left, CONVERSATIONS)
        print(".", end="", file=sys.stderr, flush=True)
    slope = np.polyfit(np.arange(len(readings)), readings, 1)[0]
    return (
        f"Memory over {MEMORY_REQUESTS:,} requests of {MEMORY_TOKENS} tokens: {readings[0]:.0f} MB "
        f"before, {readings[-1]:.0f} MB behind, {slope:.2f} MB per {REQUESTS_PER_READING} requests."
    )


def main() -> None:
    """Print the table."""
    vlm = build_endless_vlm()
    engine = GenerationEngine(vlm, max_rows=CONVERSATIONS)
    try:
        lines = [*compare_sides(vlm, engine), "", measure_memory(engine)]
    finally:
        engine.close()
    write_section("Serving", lines)


if __name__ == "__main__":
    main()
