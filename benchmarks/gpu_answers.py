"""Answers on a GPU: a cache that grows against the compiled step, one and many at once."""

from __future__ import annotations

import statistics
import time

import torch
from gpu_rows import ON_GPU, RunLog
from gpu_training import LLAVA, build_stage
from PIL import Image

NEW_TOKENS = 128 if ON_GPU else 8
ROUNDS = 3
COMPILE_SECONDS = 40  # of the first call, at size=6b


def measure_answers(log: RunLog, size: str) -> None:
    """Answer questions about an image in both ways; say the first call apart from the next ones."""
    vlm = build_stage(LLAVA, size).vlm.eval()
    if ON_GPU:
        vlm = vlm.to(torch.bfloat16)
    side = vlm.vision.image_size
    shown = {"type": "image", "image": Image.effect_noise((side, side), 64).convert("RGB")}
    for count in (1, 16):
        texts = ["What is there? " * (1 + number) for number in range(count)]
        asked = [[{"role": "user", "content": [shown, {"type": "text", "text": t}]}] for t in texts]
        batch = vlm.prepare(asked)
        rates = {}
        for name, compiled in (("growing cache", False), ("compiled step", True)):
            if compiled and log.seconds_left < COMPILE_SECONDS:
                continue
            seconds = []
            for _ in range(1 + ROUNDS):
                began = time.perf_counter()
                new = vlm.generate(batch, max_new_tokens=NEW_TOKENS, compiled=compiled)
                seconds.append(time.perf_counter() - began)
            rates[name] = sum(map(len, new)) / statistics.median(seconds[1:])
            log.write_row(
                f"answers, {size}, {name}, {count} at once",
                first_call_seconds=round(seconds[0], 2),
                tokens_per_second=round(rates[name], 1),
                times_the_growing_cache=round(rates[name] / rates["growing cache"], 2),
            )
