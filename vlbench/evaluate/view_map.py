"""A map over an image, from a map of each of its views.

The patches of the tiles lie side by side. What a patch of the thumbnail has is spread over those
that show the same place: so the sum of a map over an image is that of the maps of its views.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlbench.data.image_processing import ImageTransform
from vlbench.data.image_size import read_image_size
from vlbench.data.image_tiling import SINGLE_VIEW, ImageTiling, TiledImage
from vlbench.data.native_aspect import NativeImage
from vlbench.data.sample import LazyImage

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a map, in shares of an image's width and height."""
WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)


def map_image(
    transform: ImageTransform, image: LazyImage, views: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Return the map `[rows, columns]` over an image, which is as the sample's layout has it.

    `views` are a value for each patch of its views, `[views, patches]`, whose rows and columns are
    `grid`.
    """
    if isinstance(image, NativeImage):  # what is behind its own patches is no part of it
        own: Tensor = views[0, : math.prod(image.grid)].unflatten(0, image.grid)
        return own
    maps: Tensor = views.unflatten(1, grid)
    if transform.tiling is None or not isinstance(image, TiledImage):
        return maps[0]
    return merge_views(maps, image, transform.tiling, transform.crop)


def find_map_box(transform: ImageTransform, image: LazyImage) -> Box:
    """Return where the map over an image lies; what is padded is outside of 0..1."""
    if isinstance(image, NativeImage):
        return WHOLE_IMAGE
    if transform.tiling is None or not isinstance(image, TiledImage):
        return transform.seen_box(*read_image_size(image, transform.exif))
    return find_box(image, transform.tiling, transform.crop)


def merge_views(maps: Tensor, tiled: TiledImage, tiling: ImageTiling, side: int) -> Tensor:
    """Return the map over a tiled image from those of its views `[views, rows, columns]`.

    `side` is that of a view in pixels.
    """
    if tiled.grid == SINGLE_VIEW:
        return maps[0]
    rows, columns = maps.shape[1:]
    merged = maps.new_zeros(tiled.grid[0] * rows, tiled.grid[1] * columns)
    left, top, right, bottom = find_box(tiled, tiling, side)
    for view, own in zip(tiled.views, maps, strict=True):
        if view is None:
            down = _shared_lengths(len(merged), top, bottom, rows).to(own)
            across = _shared_lengths(merged.shape[1], left, right, columns).to(own)
            merged += down @ own @ across.T
        else:
            row, column = view[0] * rows, view[1] * columns
            merged[row : row + rows, column : column + columns] += own
    return merged


def find_box(tiled: TiledImage, tiling: ImageTiling, side: int) -> Box:
    """Return where the tiles side by side lie over the image, which stands in their middle."""
    if tiled.grid == SINGLE_VIEW:  # squashed
        return WHOLE_IMAGE
    width, height = tiling.content_size(*tiled.size, tiled.grid, side)
    canvas_height, canvas_width = (count * side for count in tiled.grid)
    left, top = -((canvas_width - width) // 2) / width, -((canvas_height - height) // 2) / height
    return left, top, left + canvas_width / width, top + canvas_height / height


def _shared_lengths(count: int, begin: float, end: float, others: int) -> Tensor:
    """Return `[count, others]`: the share of each of `others` parts of 0..1 in each of `count`.

    These are equal parts of `begin` to `end`, which are as far as 0 and 1 or farther.
    """
    edges = torch.linspace(begin, end, count + 1, dtype=torch.float64)
    starts = torch.arange(others, dtype=torch.float64) / others
    first = torch.maximum(edges[:-1, None], starts)
    last = torch.minimum(edges[1:, None], starts + 1 / others)
    return (last - first).clamp(min=0) * others
