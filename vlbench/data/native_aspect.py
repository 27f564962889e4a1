"""Native aspect ratio: the grid of patches that an image of some width and height becomes.

An image is resized to whole patches, as many as its budget holds, and keeps its aspect ratio but
for that rounding. The rule is that of SigLIP 2's NaFlex (Tschannen et al. 2025, arXiv:2502.14786),
equal to transformers' and timm's (`tests/test_native_aspect.py`). The patches of an image, row by
row, are laid on a *sheet*, a square of pixels of the encoder's image size, which holds as many as
the budget: so pixels of images of any shape are one tensor. Imports no torch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlbench.data.image_tiling import Grid, TiledImage
from vlbench.data.sample import LazyImage

MAX_SCALE = 100.0  # by which a picture is enlarged at most, as in the reference
SCALE_PRECISION = 1e-5  # of the scale that is searched, likewise


@dataclass(frozen=True)
class NativeImage(TiledImage):
    """An image in its own aspect ratio: one view, whose `grid` are rows and columns of patches."""

    patch: int = 0
    """Side of a patch in pixels."""

    @property
    def content_size(self) -> tuple[int, int]:
        """Width and height in pixels that the image is resized to."""
        rows, columns = self.grid
        return columns * self.patch, rows * self.patch

    def longest_edge(self) -> int:
        """Return the longest edge in pixels below which a decoder would take detail away."""
        scales = (new / old for new, old in zip(self.content_size, self.size, strict=True))
        return math.ceil(max(self.size) * max(scales))


def keep_aspect(
    image: LazyImage, size: tuple[int, int], patch: int, most_patches: int
) -> NativeImage:
    """Return an image of `size`, width and height in pixels, with its grid of patches."""
    return NativeImage(image, size, choose_patch_grid(*size, patch, most_patches), (None,), patch)


@functools.lru_cache(maxsize=4096)
def choose_patch_grid(width: int, height: int, patch: int, most_patches: int) -> Grid:
    """Return rows and columns of patches for an image of `width` x `height` pixels.

    They are those of the largest scale at which the image, each edge rounded up to whole patches of
    `patch` pixels, has at most `most_patches`. Small images are enlarged, up to MAX_SCALE.
    """
    below, above = SCALE_PRECISION / 10, MAX_SCALE
    while above - below >= SCALE_PRECISION:
        middle = (below + above) / 2
        rows, columns = _scaled_grid(width, height, patch, middle)
        below, above = (middle, above) if rows * columns <= most_patches else (below, middle)
    return _scaled_grid(width, height, patch, below)


def _scaled_grid(width: int, height: int, patch: int, scale: float) -> Grid:
    return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))


def lay_patches(
    image: Image.Image, native: NativeImage, side: int, resample: Image.Resampling
) -> NDArray[np.uint8]:
    """Return the sheet of an opened RGB image as its one view, uint8 `[1, side, side, 3]`.

    Its patches stand row by row on the grid of the sheet, `side` pixels wide; what is left is 0.
    The sheet of a square image that fills it is the resized image.
    """
    patch, per_row = native.patch, side // native.patch
    (rows, columns), content = native.grid, image.resize(native.content_size, resample)
    patches = np.asarray(content).reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    sheet = np.zeros((per_row * per_row, patch, patch, 3), np.uint8)
    sheet[: rows * columns] = patches.reshape(-1, patch, patch, 3)
    square = sheet.reshape(per_row, per_row, patch, patch, 3).swapaxes(1, 2)
    return square.reshape(1, side, side, 3)
