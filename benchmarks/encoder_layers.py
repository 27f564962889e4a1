"""What reading three blocks of a vision encoder costs beside reading one, in turns in one process.

    python benchmarks/encoder_layers.py [rounds=15]

A ViT-S-16 with random weights runs forward and backward over eight images. Both sides stop at the
last block but one; one side also returns what two earlier blocks gave, and its loss reads all of
them.
"""

from __future__ import annotations

import statistics
import sys
import time

import open_clip
import torch
from result_table import write_section

from vlbench.connector.levels import as_levels
from vlbench.model.vision_encoder import VisionEncoder

IMAGES, SIDE, LAST = 8, 224, -2
STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SIDES = {"one block": (), "three blocks": (LAST, 3, 7)}  # at a third and two thirds of the depth


def time_step(encoder: VisionEncoder, pixels: torch.Tensor, layers: tuple[int, ...]) -> float:
    """Return the seconds of a forward and backward pass that reads `layers`."""
    encoder.read_blocks(layers, class_token=False)
    encoder.zero_grad()
    begin = time.perf_counter()
    levels = as_levels(encoder(pixels))
    torch.stack([level.square().mean() for level in levels]).sum().backward()
    return time.perf_counter() - begin


def main() -> None:
    """Measure in turns, and print a table."""
    given = dict(word.split("=") for word in sys.argv[1:])
    visual = open_clip.create_model("ViT-S-16-alt").visual
    encoder = VisionEncoder(visual, layer=LAST, norm=False, preprocess=STATISTICS)
    pixels = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(1 + int(given.get("rounds", 15))):
        for name, layers in list(SIDES.items())[:: 1 if turn % 2 else -1]:
            spent = time_step(encoder, pixels, layers)
            if turn:  # the first is not counted
                seconds[name].append(spent)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    lines = [
        "| an encoder that reads | milliseconds, median | spread | times |",
        "|---|---:|---:|---:|",
    ]
    for name, times in seconds.items():
        spread = f"{1e3 * min(times):.0f} to {1e3 * max(times):.0f}"
        ratio = medians[name] / medians["one block"]
        lines.append(f"| {name} | {1e3 * medians[name]:.0f} | {spread} | {ratio:.2f} x |")
    write_section("Encoder: three blocks read, or one", lines)


if __name__ == "__main__":
    main()
