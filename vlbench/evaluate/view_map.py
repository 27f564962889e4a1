"""A map over an image, from a map of each of its views.

The patches of the tiles lie side by side. What a patch of the thumbnail has is spread over those
that show the same place: so the sum of a map over an image is that of the maps of its views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlbench.data.image_tiling import SINGLE_VIEW, ImageTiling, TiledImage
from vlbench.data.sample import Sample
from vlbench.processor import Processor

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a map, in shares of an image's width and height."""
WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)


def map_image(
    processor: Processor, sample: Sample, image: int, views: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Return the map `[rows, columns]` over image number `image` of a sample, from 0.

    `views` are a value for each patch of its views, `[views, patches]`, whose rows and columns are
    `grid`.
    """
    maps: Tensor = views.unflatten(1, grid)
    layout = processor.view_layout
    if layout is None:
        return maps[0]
    tiled, tiling = layout.tile_sample(sample).images[image], layout.settings.tiling
    if tiling is None:  # what is behind its own patches on the sheet is no part of it
        rows, columns = tiled.grid
        own: Tensor = views[0, : rows * columns].unflatten(0, tiled.grid)
        return own
    return merge_views(maps, tiled, tiling, layout.side)


def find_map_box(processor: Processor, sample: Sample, image: int) -> Box:
    """Return where the map over an image of a sample lies; what is padded is outside of 0..1."""
    layout, transform = processor.view_layout, processor.transform
    if layout is None:
        return transform.seen_box(*transform.open_image(sample.images[image]).size)
    if layout.settings.tiling is None:
        return WHOLE_IMAGE
    tiled = layout.tile_sample(sample).images[image]
    return find_box(tiled, layout.settings.tiling, layout.side)


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
