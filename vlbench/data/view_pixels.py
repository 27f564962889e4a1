"""The pixels of an image's views: it is resized onto its grid once, and cut. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlbench.data.image_tiling import Grid, ImageTiling, TiledImage

PADDING_COLOUR = (0, 0, 0)  # of a tile beside the image, as in LLaVA-NeXT


def cut_views(
    image: Image.Image,
    tiled: TiledImage,
    tiling: ImageTiling,
    side: int,
    resample: Image.Resampling,
) -> NDArray[np.uint8]:
    """Return the views of an opened image, uint8 `[views, side, side, 3]`.

    Args:
        image: The whole image, RGB.
        tiled: Its grid and views.
        tiling: The rule by which it is tiled.
        side: Of a view, pixels.
        resample: Of the resize, of the tiles and of the thumbnail.
    """
    pixels = np.empty((len(tiled.views), side, side, 3), np.uint8)
    canvas = None
    for view, target in zip(tiled.views, pixels, strict=True):
        if view is None:
            target[...] = np.asarray(image.resize((side, side), resample))
            continue
        if canvas is None:
            size = tiling.content_size(*tiled.size, tiled.grid, side)
            canvas = _paint_canvas(image.resize(size, resample), tiled.grid, side)
        top, left = view[0] * side, view[1] * side
        target[...] = canvas[top : top + side, left : left + side]
    return pixels


def _paint_canvas(content: Image.Image, grid: Grid, side: int) -> NDArray[np.uint8]:
    """Return all tiles side by side, `[rows x side, columns x side, 3]`, with what is padded."""
    canvas = np.empty((grid[0] * side, grid[1] * side, 3), np.uint8)
    canvas[...] = PADDING_COLOUR
    width, height = content.size
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(content)
    return canvas
