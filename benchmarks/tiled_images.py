"""How fast one core makes the views of tiled images: 1,000 JPEGs of mixed sizes, and a photograph.

    python benchmarks/tiled_images.py

Steps are planned from the headers of images, as the planning process of a training does, and their
rows are loaded, as its workers do. Seconds are those of a processor core, so that what else runs on
the machine counts little. A step of size=tiny is timed on the same rows.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from result_table import write_section

from vlbench.config.recipe import load_recipe
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.data_sources import open_stage_mixture
from vlbench.data.image_processing import ImageFile
from vlbench.data.image_size import read_image_size
from vlbench.data.image_tiling import TiledImage
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM

FILES, ROW_TOKENS, STEP_SAMPLES, TIMED_ROWS = 1000, 4096, 100, 4
LOADED_STEPS = 2  # of those that are planned
SIDES = (200, 2000)  # pixels, of the mixed images
PHOTOGRAPH = (4000, 3000)
NONE = "one square"
SETTINGS = {
    f"{NONE}, 448": (448, ()),
    "llava_next, 4 tiles of 336": (336, ("vision.tiling.tiles=4",)),
    "internvl, 6 tiles of 448": (
        448,
        (
            "vision.tiling.tiles=6",
            "vision.tiling.grid=internvl",
            "vision.tiling.tags=none",
            "connector.name=pixel_shuffle",
        ),
    ),
    "llava_next, 4 tiles of 112": (112, ("vision.tiling.tiles=4",)),
}


def write_images(folder: Path) -> None:
    """Write the images, blurred noise at quality 90, and their captions."""
    rng, chosen = np.random.default_rng(0), random.Random(0)
    noise = Image.fromarray(rng.integers(0, 256, (SIDES[1], SIDES[1], 3), dtype=np.uint8))
    noise = noise.filter(ImageFilter.GaussianBlur(1.5))
    records = []
    for number in range(FILES):
        size = chosen.randint(*SIDES), chosen.randint(*SIDES)
        noise.crop((0, 0, *size)).save(folder / f"{number}.jpg", quality=90)
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"It is noise number {number}.")]
        told = [{"from": who, "value": value} for who, value in turns]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": told})
    (folder / "data.json").write_text(json.dumps(records))
    noise.resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(folder / "large.jpg", quality=90)


def build(folder: Path, side: int, words: tuple[str, ...]) -> tuple[LoadedVLM, StepDataset]:
    """Return the model of size=tiny and the steps over the folder."""
    recipe = load_recipe(
        ["recipe=yivl_llava", f"data.train={folder / 'data.json'}", "only=chat", *words,
         f"stages.chat.image_size={side}", "language.max_length=4096"]
    )  # fmt: skip
    vlm = build_vlm(recipe.model, side)
    steps = StepDataset(
        mixture=open_stage_mixture(recipe.stage_data("chat"), {}),
        encoder=vlm.processor.sample_encoder(),
        image_transform=vlm.processor.transform,
        global_batch_size=STEP_SAMPLES,
        max_tokens_per_row=ROW_TOKENS,
        total_steps=FILES // STEP_SAMPLES,
    )
    return vlm.train(), steps


def photograph_seconds(vlm: LoadedVLM, path: Path) -> float:
    """Return the least seconds that a large photograph takes, its header included."""
    image, layout, transform = ImageFile(path), vlm.processor.view_layout, vlm.processor.transform
    found = []
    for _ in range(5):
        began = time.process_time()
        size = read_image_size(image)
        given: ImageFile | TiledImage = image
        if layout is not None:
            tiling = layout.settings.tiling
            grid = tiling.choose_grid(*size, layout.side)
            given = TiledImage(image, size, grid, tiling.list_views(grid))
        transform.load_levels(given)
        found.append(time.process_time() - began)
    return min(found)


def measure(folder: Path, side: int, words: tuple[str, ...]) -> list[str]:
    """Return the cells of a row of the table."""
    vlm, steps = build(folder, side, words)
    began = time.process_time()
    plans = [steps.plan_step(number) for number in range(len(steps))]
    planned = time.process_time() - began
    assert not any(plan.bad_samples for plan in plans)
    views = sum(row.image_count for plan in plans for row in plan.rows)
    rows = [row for plan in plans[:LOADED_STEPS] for row in plan.rows]
    loaded_views = sum(row.image_count for row in rows)
    began = time.process_time()
    loaded = [steps.load_row(row).batch for row in rows[:TIMED_ROWS]]
    for row in rows[TIMED_ROWS:]:
        steps.load_row(row)
    seconds = time.process_time() - began
    step = ""
    if side == 112:
        began = time.process_time()
        for batch in loaded:
            vlm(batch.to("cpu", torch.float32)).loss_sum.backward()
        step_views = sum(len(batch.pixels) for batch in loaded)
        step = f"{step_views / (time.process_time() - began):.0f}"
    return [
        f"{views / FILES:.1f}",
        f"{FILES / planned:.0f}",
        f"{LOADED_STEPS * STEP_SAMPLES / seconds:.0f}",
        f"{loaded_views / seconds:.0f}",
        step,
        f"{photograph_seconds(vlm, folder / 'large.jpg'):.3f}",
    ]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    lines = [
        f"{FILES:,} JPEGs of {SIDES[0]} to {SIDES[1]} pixels a side; of one core a second.",
        "Planning reads texts and headers, loading decodes and cuts. Last: seconds of a core for a",
        f"photograph of {PHOTOGRAPH[0]} x {PHOTOGRAPH[1]}.",
        "",
        "| views | views an image | images planned | images loaded | views loaded | views trained, "
        "size=tiny | photograph |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        for label, (side, words) in SETTINGS.items():
            lines.append(f"| {label} | {' | '.join(measure(folder, side, words))} |")
            print(".", end="", file=sys.stderr, flush=True)
    write_section("Tiled images", lines)


if __name__ == "__main__":
    main()
