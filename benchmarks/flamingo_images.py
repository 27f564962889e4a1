"""Does Flamingo's step grow with the number of pictures? It should grow with the text alone.

    python benchmarks/flamingo_images.py

Times one training step of the miniatures with Flamingo over the same text with 8 pictures and with
2, side by side in one run; the tower and the resampler, which must look at every picture, are left
out of the second figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from vlbench import recipe as recipes
from vlbench.data.batch import Batch, collate
from vlbench.data.sample import PLACEHOLDER, Sample, Turn, encode
from vlbench.data.scene_world import scene
from vlbench.model.compose import compose
from vlbench.model.vlm import VLM

TURNS = 8
WORDS = 200  # in an answer
ROUNDS = 15


def conversation(vlm: VLM, images: int) -> Batch:
    """Return a conversation of TURNS exchanges, of which `images` show a picture each."""
    turns = []
    for number in range(TURNS):
        shown = number % (TURNS // images) == 0
        turns.append(Turn("human", f"{PLACEHOLDER}\nwhat?" if shown else "what?"))
        turns.append(Turn("assistant", "one " * WORDS))
    pictures = tuple(scene("bench", 0, number) for number in range(images))
    per_image = vlm.connector.tokens_per_image
    one = encode(
        Sample("bench", tuple(turns), pictures), vlm.template, vlm.tokenizer, per_image, 1 << 20
    )
    return collate([[one]], lambda picture: vlm.transform(picture.open()))


def injected(vlm: VLM, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return the gated layers alone, over the same hidden states."""
    visual = vlm.visual(batch).detach()
    hidden = torch.randn(*batch.ids.shape, vlm.shapes.lm_width, requires_grad=True)

    def run() -> torch.Tensor:
        out = hidden
        for layer in vlm.connector.inject_at:
            out = vlm.connector.inject(layer, out, visual, batch.image_index)
        return out.sum()

    return run


def seconds(*works: Callable[[], torch.Tensor]) -> list[float]:
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
    vlm = compose(recipes.load(["recipe=yivl_flamingo"]), 112)
    few, many = conversation(vlm, 2), conversation(vlm, 8)
    print(f"positions: {few.ids.shape[1]} with 2 pictures, {many.ids.shape[1]} with 8")
    for name, works in (
        ("whole step", [lambda b=b: vlm(b).loss_sum for b in (few, many)]),
        ("gated layers", [injected(vlm, b) for b in (few, many)]),
    ):
        two, eight = seconds(*works)
        ratio = eight / two
        print(f"{name}: {1e3 * two:.1f} ms with 2, {1e3 * eight:.1f} ms with 8, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
