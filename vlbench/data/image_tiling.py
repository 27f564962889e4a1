"""Image tiling: which views an image of some width and height becomes. Imports no torch.

A view is a square of the vision encoder's size: a tile, which is a cell of a grid over the resized
image, or the thumbnail, which is all of the image. Two rules choose the grid, and each is equal to
its reference in transformers (`tests/test_image_tiling.py`):

`llava_next`  AnyRes of LLaVA-NeXT (Liu et al. 2024): of the grids of 2 to `tiles` tiles the one
              that keeps most pixels of the image, and of equal ones the one that wastes least. The
              image keeps its aspect ratio and is padded with black; the thumbnail comes first.
`internvl`    dynamic tiling of InternVL 1.5 (Chen et al. 2024, arXiv:2404.16821): of the grids of 1
              to `tiles` tiles the one of the closest aspect ratio, and of equal ones the largest
              that is less than twice as large as the image. The image is squashed onto the grid;
              the thumbnail comes last.

An image of one tile has one view, the thumbnail. Both references squash it to a square.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlbench.config.model_schema import TilingRule
from vlbench.data.sample import LazyImage

if TYPE_CHECKING:
    from PIL import Image

Grid = tuple[int, int]
"""Rows and columns of tiles."""
View = tuple[int, int] | None
"""Row and column of a tile; None for the thumbnail."""
SINGLE_VIEW: Grid = (1, 1)


@dataclass(frozen=True)
class ImageTiling:
    """The rule by which images become views."""

    tiles: int
    """Most tiles of an image, beside the thumbnail."""
    grid: TilingRule = "llava_next"
    thumbnail: bool = True
    """Whether an image of several tiles has a thumbnail as well."""
    grids: tuple[Grid, ...] = ()
    """The grids that an image may have, in an order that decides between those that are as good;
    (): all of up to `tiles` tiles."""

    @property
    def keeps_aspect(self) -> bool:
        """Whether an image is padded, and not squashed, onto its grid."""
        return self.grid == "llava_next"

    def choose_grid(self, width: int, height: int, side: int, most_tiles: int = 0) -> Grid:
        """Return the grid for an image of `width` x `height` pixels and views of `side` pixels.

        `most_tiles` replaces `tiles` if it is given.
        """
        grids = self.list_grids(most_tiles)
        choose = _most_pixels if self.keeps_aspect else _closest_ratio
        return choose(grids, width, height, side)

    def list_grids(self, most_tiles: int = 0) -> tuple[Grid, ...]:
        """Return the grids that are tried, in their order; those of `most_tiles` if it is given."""
        tiles = most_tiles or self.tiles
        if self.grids:
            return tuple(grid for grid in self.grids if grid[0] * grid[1] <= tiles)
        return _list_wide_grids(tiles) if self.keeps_aspect else _list_tall_grids(tiles)

    def describe(self) -> str:
        """Return the rule in words, as people read it in a run's report."""
        fit = "padded" if self.keeps_aspect else "squashed"
        thumbnail = " and a thumbnail" if self.thumbnail else ""
        return f"cut into up to {self.tiles} tiles ({self.grid}, {fit}){thumbnail}"

    def list_views(self, grid: Grid) -> tuple[View, ...]:
        """Return the views of an image with that grid, in their order."""
        return _list_views(grid, self.thumbnail, self.keeps_aspect)

    def content_size(self, width: int, height: int, grid: Grid, side: int) -> tuple[int, int]:
        """Return width and height in pixels that an image is resized to, on its grid."""
        rows, columns = grid
        canvas_width, canvas_height = columns * side, rows * side
        if not self.keeps_aspect:
            return canvas_width, canvas_height
        across, down = canvas_width / width, canvas_height / height
        if across < down:
            return canvas_width, min(math.ceil(height * across), canvas_height)
        return min(math.ceil(width * down), canvas_width), canvas_height


@dataclass(frozen=True)
class TiledImage:
    """An image with the grid that was chosen for it: what is opened gives all of its views."""

    image: LazyImage
    size: tuple[int, int]
    """Width and height in pixels, as its header says."""
    grid: Grid
    views: tuple[View, ...]
    """Its views in their order."""

    @property
    def name(self) -> str:
        """The name of the image."""
        return self.image.name

    @property
    def is_outside(self) -> bool:
        """Whether the image is outside of the data set's folder, so that no page shows it."""
        return bool(getattr(self.image, "is_outside", False))

    def open(self) -> Image.Image:
        """Return the whole image in RGB, or raise a UserError that names it."""
        return self.image.open()

    def draft_side(self, tiling: ImageTiling, side: int) -> int:
        """Return the longest edge in pixels below which a decoder would take detail away."""
        width, height = self.size
        across, down = tiling.content_size(width, height, self.grid, side)
        scale = max(across / width, down / height, side / min(self.size))
        return math.ceil(max(self.size) * scale)


def count_views(image: LazyImage) -> int:
    """Return how many views an image has: 1, unless it is tiled."""
    return len(image.views) if isinstance(image, TiledImage) else 1


def untiled(image: LazyImage) -> LazyImage:
    """Return the image itself, of which a `TiledImage` shows views."""
    return image.image if isinstance(image, TiledImage) else image


@functools.cache
def _list_views(grid: Grid, has_thumbnail: bool, thumbnail_first: bool) -> tuple[View, ...]:
    rows, columns = grid
    if grid == SINGLE_VIEW:
        return (None,)
    tiles: tuple[View, ...] = tuple((row, col) for row in range(rows) for col in range(columns))
    if not has_thumbnail:
        return tiles
    return (None, *tiles) if thumbnail_first else (*tiles, None)


@functools.cache
def _list_tall_grids(most_tiles: int) -> tuple[Grid, ...]:
    """Return the grids of up to so many tiles, fewest tiles first, then fewest columns.

    That is the order of InternVL's, which decides between grids that are as good.
    """
    grids = [
        (rows, columns)
        for columns in range(1, most_tiles + 1)
        for rows in range(1, most_tiles // columns + 1)
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


@functools.cache
def _list_wide_grids(most_tiles: int) -> tuple[Grid, ...]:
    """Return the grids of 2 and up to so many tiles, fewest tiles first, then fewest rows.

    The published list of LLaVA-NeXT begins so.
    """
    grids = [grid for grid in _list_tall_grids(most_tiles) if grid != SINGLE_VIEW]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def _most_pixels(grids: Sequence[Grid], width: int, height: int, side: int) -> Grid:
    best, most_kept, least_wasted = SINGLE_VIEW, 0, math.inf
    for rows, columns in grids:
        canvas_width, canvas_height = columns * side, rows * side
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_width * canvas_height - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (rows, columns), kept, wasted
    return best


def _closest_ratio(grids: Sequence[Grid], width: int, height: int, side: int) -> Grid:
    best, least_difference = SINGLE_VIEW, math.inf
    for rows, columns in grids:
        difference = abs(width / height - columns / rows)
        is_filled = width * height > 0.5 * side * side * rows * columns
        if difference < least_difference or (difference == least_difference and is_filled):
            best, least_difference = (rows, columns), difference
    return best
