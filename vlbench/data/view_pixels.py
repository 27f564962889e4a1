"""The pixels of an image's views: it is resized onto its grid once, and cut. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlbench.data.image_tiling import ImageTiling, TiledImage

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
            canvas = _paint_canvas(image, tiled, tiling, side, resample)
        top, left = view[0] * side, view[1] * side
        target[...] = canvas[top : top + side, left : left + side]
    return pixels


def _paint_canvas(
    image: Image.Image,
    tiled: TiledImage,
    tiling: ImageTiling,
    side: int,
    resample: Image.Resampling,
) -> NDArray[np.uint8]:
    """Return all tiles side by side, `[rows x side, columns x side, 3]`, with what is padded."""
    rows, columns = tiled.grid
    width, height = tiling.content_size(*tiled.size, tiled.grid, side)
    canvas = np.empty((rows * side, columns * side, 3), np.uint8)
    canvas[...] = PADDING_COLOUR
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    resized = np.asarray(image.resize((width, height), resample))
    canvas[top : top + height, left : left + width] = resized
    return canvas
