"""The images of several samples as tensors of one batch: pixels, views, questions, positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlbench.data.image_tiling import TiledImage, count_views
from vlbench.data.native_aspect import NativeImage
from vlbench.data.sample import LazyImage
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX, Questions


def assign_image_index(
    input_ids: Tensor, image_lengths: int | Sequence[int], first_image: int
) -> Tensor:
    """Return the image of each position of a sample `[length]`, counted from `first_image`.

    `image_lengths` are the image positions of each image, or of every one.
    """
    # image positions up to and with this one
    count = (input_ids == IMAGE_TOKEN_INDEX).long().cumsum(0)
    if isinstance(image_lengths, int):
        image = (count + image_lengths - 1) // image_lengths - 1
    else:
        ends = torch.tensor(image_lengths, dtype=torch.long).cumsum(0)
        image = torch.searchsorted(ends, count).masked_fill(count == 0, -1)
    return torch.where(image < 0, image, image + first_image)


def name_views(sample_name: str, images: Sequence[LazyImage]) -> list[str]:
    """Return a name of each view of a sample, unique where `sample_name` is."""
    names = []
    for number, image in enumerate(images):
        name, views = f"{sample_name} {number}", count_views(image)
        tiled = isinstance(image, TiledImage)
        names += [f"{name} {view}" for view in range(views)] if tiled else [name]
    return names


def repeat_by_view(questions: Questions | None, images: Sequence[LazyImage]) -> Questions | None:
    """Return the question of each view from those of the images of a sample."""
    if questions is None:
        return None
    pairs = zip(questions, images, strict=True)
    return tuple(ids for ids, image in pairs for _ in range(count_views(image)))


def join_views(
    samples: Sequence[tuple[Sequence[LazyImage], list[int] | None]], tokens_per_view: int
) -> dict[str, Any]:
    """Return `visual_index` and `view_bounds` of a batch; {} where images are not tiled.

    Of images in their own aspect ratios there are `patch_grids` as well. `samples` have the images
    and the `visual_index` of each sample.
    """
    if any(visual_index is None for _, visual_index in samples):
        return {}
    index, bounds = [], [0]
    for images, visual_index in samples:
        numbers = torch.tensor(visual_index, dtype=torch.long)
        index.append(torch.where(numbers < 0, numbers, numbers + bounds[-1] * tokens_per_view))
        for image in images:
            bounds.append(bounds[-1] + count_views(image))
    views = {"visual_index": torch.cat(index), "view_bounds": torch.tensor(bounds)}
    native = [one for images, _ in samples for one in images if isinstance(one, NativeImage)]
    return {**views, "patch_grids": [image.grid for image in native]} if native else views


def stack_questions(questions: Sequence[Questions | None]) -> Tensor | None:
    """Return the `question_ids` of a batch from those of its samples; None where none is read.

    At least one position is there, so that what reads questions runs in every micro-batch.
    """
    if any(of_sample is None for of_sample in questions):
        return None
    read = [ids for of_sample in questions for ids in of_sample or ()]
    stacked = torch.full((len(read), max([1, *map(len, read)])), -1)
    for row, ids in enumerate(read):
        stacked[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return stacked


def stack_pixels(pixels: list[Tensor]) -> Tensor:
    """Stack the pixels of images, `[views, 3, height, width]`; `[0, 3, 0, 0]` for none.

    Those of a tiled image are `[views, 3, height, width]`, of any other `[3, height, width]`.
    """
    if pixels and pixels[0].dim() == 4:
        return torch.cat(pixels)
    return torch.stack(pixels) if pixels else torch.zeros(0, 3, 0, 0)
