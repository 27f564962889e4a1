"""Does Flamingo's step grow with the number of images? It should grow with the text alone.

    python benchmarks/flamingo_images.py

Times one training step of the miniatures with Flamingo over the same text with 8 images and with
2, side by side in one run; the encoder and the resampler, which must look at every image, are left
out of the second figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from vlbench.config import recipe as recipes
from vlbench.data.packing import PackedBatch, collate
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.scene_world import make_scene
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM

TURNS = 8
WORDS = 200  # in an answer
ROUNDS = 15


def make_conversation(vlm: LoadedVLM, images: int) -> PackedBatch:
    """Return a conversation of TURNS exchanges, of which `images` show an image each."""
    turns = []
    for number in range(TURNS):
        shown = number % (TURNS // images) == 0
        turns.append(ChatTurn("human", f"{IMAGE_PLACEHOLDER}\nwhat?" if shown else "what?"))
        turns.append(ChatTurn("assistant", "one " * WORDS))
    pictures = tuple(make_scene("bench", 0, number) for number in range(images))
    encoder = replace(vlm.processor.sample_encoder(), max_length=1 << 20)
    encoded = encoder.encode(Sample("bench", tuple(turns), pictures))
    return collate([[encoded]], vlm.processor.transform.load_pixels)


def injection_pass(vlm: LoadedVLM, batch: PackedBatch) -> Callable[[], torch.Tensor]:
    """Return the gated layers alone, over the same hidden states."""
    visual, where = vlm.visual(batch).detach(), vlm.model.image_places(batch)
    hidden = torch.randn(*batch.input_ids.shape, vlm.model.shapes.lm_width, requires_grad=True)

    def run_injection() -> torch.Tensor:
        out = hidden
        for layer in vlm.connector.inject_layers:
            out = vlm.connector.inject(layer, out, visual, where)
        return out.sum()

    return run_injection


def median_seconds(*works: Callable[[], torch.Tensor]) -> list[float]:
    """Return the median time of forward and backward of each, taken in turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, taken in zip(works, times, strict=True):
            began = time.perf_counter()
            work().backward()
            taken.append(time.perf_counter() - began)
    return [sorted(taken)[ROUNDS // 2] for taken in times]


def main() -> None:
    """Print the two ratios."""
    vlm = build_vlm(recipes.load_recipe(["recipe=yivl_flamingo"]).model, 112)
    few, many = make_conversation(vlm, 2), make_conversation(vlm, 8)
    print(f"positions: {few.input_ids.shape[1]} with 2 images, {many.input_ids.shape[1]} with 8")
    for name, works in (
        ("whole step", [lambda b=b: vlm(b).loss_sum for b in (few, many)]),
        ("gated layers", [injection_pass(vlm, b) for b in (few, many)]),
    ):
        two, eight = median_seconds(*works)
        ratio = eight / two
        print(f"{name}: {1e3 * two:.1f} ms with 2, {1e3 * eight:.1f} ms with 8, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
