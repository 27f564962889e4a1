"""How many images a second become pixels, next to bare decoding, in one run on two processes.

    python benchmarks/image_preprocessing.py

JPEGs of photograph-like noise are made first. The pixels are those of transformers' LLaVA processor
(tests/test_image_processing.py); here both are timed.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from result_table import write_section

SIZES = {"448 x 448": (448, 448), "640 x 480": (640, 480), "1600 x 1200": (1600, 1200)}
FILES, SIDE, WORKERS = 240, 448, 2


def write_jpegs(folder: Path, size: tuple[int, int]) -> list[Path]:
    """Write JPEGs of a size: blurred noise, at quality 90, about the bytes of a photograph."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(16):
        noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        path = folder / f"{size[0]}_{number}.jpg"
        noise.filter(ImageFilter.GaussianBlur(1.5)).save(path, quality=90)
        paths.append(path)
    return paths


def decode_image(path: Path) -> int:
    """Decode an image and do nothing else."""
    with Image.open(path) as image:
        return len(np.asarray(image.convert("RGB")))


def vlbench_pixels(path: Path, side: int) -> int:
    """Make the pixels that training reads."""
    from vlbench.data.image_processing import ImageFile, ImageTransform

    transform = ImageTransform(side, side, (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
    return len(transform(ImageFile(path).open()))


def transformers_pixels(path: Path, side: int) -> int:
    """Make the pixels of transformers' processor that resizes with PIL, as the reference does."""
    image = _llava_processor(side)(Image.open(path).convert("RGB"), return_tensors="np")
    return len(image["pixel_values"])


def _llava_processor(side: int):  # type: ignore[no-untyped-def]
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    if side not in PROCESSOR_CACHE:
        PROCESSOR_CACHE[side] = LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    return PROCESSOR_CACHE[side]


PROCESSOR_CACHE: dict[int, object] = {}


def measure_rate(image_task, paths: list[Path]) -> float:  # type: ignore[no-untyped-def]
    """Return images per second on WORKERS processes that are warm."""
    many = (paths * (FILES // len(paths) + 1))[:FILES]
    with multiprocessing.get_context("spawn").Pool(WORKERS, initializer=_use_one_thread) as pool:
        pool.map(image_task, paths * 2)
        began = time.perf_counter()
        pool.map(image_task, many, chunksize=8)
        return FILES / (time.perf_counter() - began)


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def main() -> None:
    """Print the table."""
    lines = [
        f"Images per second on {WORKERS} processes, to {SIDE} pixels.",
        "",
        "| JPEG | decoding alone | vlbench | transformers' processor | KB a file |",
        "|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            paths = write_jpegs(Path(folder), size)
            kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
            works = (
                decode_image,
                partial(vlbench_pixels, side=SIDE),
                partial(transformers_pixels, side=SIDE),
            )
            rates = [measure_rate(work, paths) for work in works]
            cells = " | ".join(f"{one:.0f}" for one in rates)
            lines.append(f"| {name} | {cells} | {kilobytes:.0f} |")
            print(".", end="", file=sys.stderr, flush=True)
    write_section("Images", lines)


if __name__ == "__main__":
    main()
