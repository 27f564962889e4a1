"""Does the cost of a step grow as its operations do? Against images, length and batch.

    python benchmarks/scaling.py

Times forward and backward of the model of `benchmark_model.py`, and divides by what
`model/train_flops.py` counts.
The plot is `scaling.png` in this folder.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings

import benchmark_model
from benchmark_model import PackedSteps, random_pixels
from matplotlib.figure import Figure
from result_table import HERE, write_section

from vlbench.config import recipe as recipes
from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import EncodedSample
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.train_flops import count_step_flops
from vlbench.train.trainable_parts import freeze_untrained_parts

ROUNDS = 5
ROW = 4096
CASES: dict[str, list[tuple[int, int, int]]] = {  # (conversations, tokens of text, images)
    "images": [(4, 128, images) for images in (0, 1, 2, 4, 8)],
    "length": [(4, length, 1) for length in (64, 128, 256, 512, 1024)],
    "batch": [(batch, 128, 1) for batch in (1, 2, 4, 8, 16)],
}


def make_conversation(number: int, length: int, images: int) -> EncodedSample:
    """Return a conversation of which the second half is supervised."""
    per_image = (benchmark_model.IMAGE_SIZE // benchmark_model.PATCH) ** 2
    text = [3 + (7 * place + number) % (benchmark_model.VOCABULARY - 3) for place in range(length)]
    image_numbers = [(number + n) % benchmark_model.IMAGE_COUNT for n in range(images)]
    return benchmark_model.encode_conversation(
        str(number), text, length // 2, image_numbers, per_image
    )


def median_seconds(vlm: LoadedVLM, batches: list[PackedBatch]) -> float:
    """Return the median time of forward and backward over all micro-batches."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        for batch in batches:
            vlm(batch).loss_sum.backward()
        times.append(time.perf_counter() - began)
        vlm.model.zero_grad(set_to_none=True)
    return statistics.median(times[1:])


def main() -> None:
    """Print the table and draw the plot."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    vlm = benchmark_model.build_small_vlm()
    recipe = recipes.load_recipe(["recipe=yivl_llava"])
    freeze_untrained_parts(vlm.model, recipe.stages["chat"])
    flops, shown = count_step_flops(vlm.model), random_pixels()
    lines = [
        "| grows | conversations | text | images | operations | seconds | per operation |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (name, cases) in zip(figure.subplots(1, 3), CASES.items(), strict=True):
        found = []
        for count, length, images in cases:
            samples = [make_conversation(number, length, images) for number in range(count)]
            batches = PackedSteps(samples, count, ROW, shown)[0].micro_batches
            found.append((flops.count_flops(batches), median_seconds(vlm, batches)))
            print(".", end="", file=sys.stderr, flush=True)
        middle = found[len(found) // 2][1] / found[len(found) // 2][0]
        for (count, length, images), (needed, taken) in zip(cases, found, strict=True):
            lines.append(
                f"| {name} | {count} | {length} | {images} | {needed / 1e9:.2f} G "
                f"| {taken:.3f} | {taken / needed / middle:.2f} |"
            )
        key = {"batch": 0, "length": 1, "images": 2}[name]
        axes.plot([case[key] for case in cases], [taken for _, taken in found], "o-", label="time")
        expected = [needed * middle for needed, _ in found]
        axes.plot([case[key] for case in cases], expected, "--", label="operations")
        axes.set(xlabel=name, ylabel="seconds a step", ylim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(HERE / "scaling.png", dpi=120)
    write_section(
        "Scaling",
        [
            "Time per operation, the middle row of each block being 1; plot in `scaling.png`.",
            "",
            *lines,
        ],
    )


if __name__ == "__main__":
    main()
