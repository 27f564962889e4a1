"""View layout: where the visual tokens of an image's views stand in the text. Imports no torch.

It is decided from the sizes of images, before one is opened. The visual tokens of a sample are
numbered view by view, `[views x tokens]`; the layout of an image is the order of these numbers at
its image positions, with NEWLINE_INDEX where a learned separator stands.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlbench.config.model_schema import ViewTags
from vlbench.data.image_size import read_image_size
from vlbench.data.image_tiling import SINGLE_VIEW, Grid, ImageTiling, TiledImage
from vlbench.data.native_aspect import NativeImage, keep_aspect
from vlbench.data.sample import LazyImage, Sample
from vlbench.errors import BadSample, UserError

NEWLINE_INDEX = -1  # in place of a visual token's number: the learned newline
THUMBNAIL_TAG = "<tile_global_thumbnail>"  # the texts of NVLM (Dai et al. 2024, arXiv:2409.11402)
TILE_TAG = "<tile_{}>"  # its number, from 1


@dataclass(frozen=True)
class ViewSettings:
    """What a recipe says of views."""

    tiling: ImageTiling | None
    """The rule by which images become tiles; None: an image is one view, in its own aspect ratio,
    and a newline follows each row of its patches."""
    tags: ViewTags = "newline"
    """What tells the views apart: nothing, a newline behind each row of tokens, or texts."""
    max_views: int | None = None
    """Most views of a sample."""
    max_visual_tokens: int | None = None
    """Most image positions of a sample; grids are reduced until they fit."""

    @property
    def most_views(self) -> int:
        """Most views of an image."""
        return len(self.tiling.list_views((1, self.tiling.tiles))) if self.tiling else 1

    @property
    def has_newline(self) -> bool:
        """Whether the model has a learned newline."""
        return self.tags == "newline"


def view_fields(settings: ViewSettings | None) -> dict[str, Any]:
    """Return what an `ImageTransform` has of `settings`."""
    if settings is None:
        return {"tiling": None, "native": False}
    return {"tiling": settings.tiling, "native": settings.tiling is None}


@dataclass(frozen=True)
class ViewLayout:
    """The views of the images of a sample at one image size, and the order of their tokens."""

    settings: ViewSettings
    side: int
    """Of a view, pixels."""
    tokens_per_view: int
    token_grid: tuple[int, int] | None = None
    """Rows and columns of a view's tokens; None where they have no places: one row, all kept. Of
    images in their own aspect ratios: those of the sheet, one token for each patch."""
    exif: bool = False
    """Whether an image is turned as its EXIF orientation says."""

    def __post_init__(self) -> None:
        grid = self.token_grid
        if grid is None:
            return
        is_grid = isinstance(grid, tuple) and [type(edge) for edge in grid] == [int, int]
        if not is_grid or min(grid) < 1:
            raise UserError(
                f"the connector's token_grid is {grid!r}; expected are the numbers of its rows and "
                "columns, as (4, 4), or None"
            )
        if grid[0] * grid[1] != self.tokens_per_view:
            raise UserError(
                f"the connector's token_grid is {grid[0]} x {grid[1]}, and its tokens_per_image is "
                f"{self.tokens_per_view}"
            )

    def tile_sample(self, sample: Sample) -> TiledSample:
        """Return a sample with the views of its images.

        Grids are reduced until the sample has at most `max_visual_tokens` image positions: of the
        image with most tiles, of several the first, to the best grid of fewer tiles.

        Raises:
            BadSample: it has more positions with one view of each image, or too many views.
            UserError: the size of an image cannot be read.
        """
        tiling, images = self.settings.tiling, sample.images
        sizes = [read_image_size(image, self.exif) for image in images]
        if tiling is None:
            kept = (self._keep_aspect(*pair) for pair in zip(images, sizes, strict=True))
            return self._number_tokens(sample, tuple(kept), False)
        tiled = [
            self._tile(image, size, tiling, tiling.choose_grid(*size, self.side))
            for image, size in zip(images, sizes, strict=True)
        ]
        limit, is_reduced = self.settings.max_visual_tokens, False
        while limit is not None and sum(map(self.count_positions, tiled)) > limit:
            counts = [_tile_count(image.grid) for image in tiled]
            largest = counts.index(max(counts))
            if counts[largest] == 1:
                raise BadSample(
                    sample.id,
                    f"has {len(images)} image{'s' if len(images) > 1 else ''} of "
                    f"{self.count_positions(tiled[0])} visual tokens in one view, and "
                    f"vision.max_visual_tokens is {limit}",
                )
            size = tiled[largest].size
            grid = tiling.choose_grid(*size, self.side, most_tiles=counts[largest] - 1)
            tiled[largest] = self._tile(images[largest], size, tiling, grid)
            is_reduced = True
        self._check_views(tiled, sample.id)
        return self._number_tokens(sample, tuple(tiled), is_reduced)

    def _tile(
        self, image: LazyImage, size: tuple[int, int], tiling: ImageTiling, grid: Grid
    ) -> TiledImage:
        return TiledImage(image, size, grid, tiling.list_views(grid))

    def _keep_aspect(self, image: LazyImage, size: tuple[int, int]) -> NativeImage:
        assert self.token_grid is not None, "a connector with tokens of no places"
        return keep_aspect(image, size, self.side // self.token_grid[0], self.tokens_per_view)

    def _check_views(self, images: Sequence[TiledImage], sample_id: str) -> None:
        """Raise BadSample for more than `max_views` views."""
        count, most = sum(len(image.views) for image in images), self.settings.max_views
        if most is not None and count > most:
            raise BadSample(
                sample_id, f"has {count} views of its images, and vision.tiling.max_views is {most}"
            )

    def _number_tokens(
        self, sample: Sample, images: tuple[TiledImage, ...], is_reduced: bool
    ) -> TiledSample:
        """Return a sample with the numbers of its visual tokens, counted over all of its views."""
        visual_index: list[int] = []
        lengths, first = [], 0
        for image in images:
            order = self.order_tokens(image)
            visual_index += [number if number < 0 else first + number for number in order]
            lengths.append(len(order))
            first += len(image.views) * self.tokens_per_view
        return TiledSample(
            replace(sample, images=images), images, visual_index, lengths, is_reduced
        )

    def count_positions(self, image: TiledImage) -> int:
        """Return the image positions of an image, newlines included."""
        return len(self.order_tokens(image))

    def order_tokens(self, image: TiledImage) -> tuple[int, ...]:
        """Return the number of the visual token at each image position, counted in this image."""
        if isinstance(image, NativeImage):
            return _order_patches(image.grid)
        if not self.settings.has_newline:
            return tuple(range(len(image.views) * self.tokens_per_view))
        rows, columns = self.token_grid or (1, self.tokens_per_view)
        cut_rows, cut_columns = 0, 0
        tiling = self.settings.tiling
        if self.token_grid and tiling is not None and tiling.keeps_aspect:
            cut_rows, cut_columns = _padded_tokens(image, self.token_grid)
        return _order_by_row(image.views, image.grid, (rows, columns), cut_rows, cut_columns)

    def view_tags(self, image: TiledImage) -> list[str]:
        """Return the text before each view of an image; [] where views have none."""
        if self.settings.tags != "numbered":
            return []
        numbers = iter(range(1, len(image.views) + 1))
        return [TILE_TAG.format(next(numbers)) if view else THUMBNAIL_TAG for view in image.views]


@dataclass(frozen=True)
class TiledSample:
    """A sample with the views of its images, before its text is tokenized."""

    sample: Sample
    """Its images are `images`."""
    images: tuple[TiledImage, ...]
    visual_index: list[int]
    """For each image position the number of its visual token, counted over the sample's views
    `[views x tokens_per_view]`, or NEWLINE_INDEX."""
    image_lengths: list[int]
    """The image positions of each image."""
    is_reduced: bool = False
    """Whether a grid was reduced to `max_visual_tokens`."""

    def encoded_fields(self, image_count: int) -> dict[str, Any]:
        """Return what an `EncodedSample` has of it, of the first images alone."""
        lengths = self.image_lengths[:image_count]
        return {
            "visual_index": self.visual_index[: sum(lengths)],
            "image_lengths": lengths,
            "is_reduced": self.is_reduced,
        }


def _tile_count(grid: Grid) -> int:
    return grid[0] * grid[1]


def _padded_tokens(image: TiledImage, token_grid: tuple[int, int]) -> tuple[int, int]:
    """Return how many rows and columns of the merged tokens are padding, on each side.

    The numbers are those of LLaVA-NeXT's `unpad_image`. Of a strip it leaves no row or no column;
    where there is no thumbnail either, one is left.
    """
    least = 0 if None in image.views else 1
    width, height = image.size
    all_rows, all_columns = image.grid[0] * token_grid[0], image.grid[1] * token_grid[1]
    if width / height > all_columns / all_rows:
        rows = max(least, int(round(height * (all_columns / width), 7)))
        return (all_rows - rows) // 2, 0
    columns = max(least, int(round(width * (all_rows / height), 7)))
    return 0, (all_columns - columns) // 2


@functools.lru_cache(maxsize=256)
def _order_patches(grid: Grid) -> tuple[int, ...]:
    """Return the numbers of the patches of an image row by row, a newline behind each row."""
    rows, columns = grid
    lines = ((*range(row * columns, (row + 1) * columns), NEWLINE_INDEX) for row in range(rows))
    return tuple(itertools.chain.from_iterable(lines))


@functools.lru_cache(maxsize=256)  # of at most 300 kB
def _order_by_row(
    views: tuple[tuple[int, int] | None, ...],
    grid: Grid,
    token_grid: tuple[int, int],
    cut_rows: int,
    cut_columns: int,
) -> tuple[int, ...]:
    """Return the numbers of visual tokens row by row of the tiles side by side.

    A newline follows every row; of a single view one follows all of its tokens. The tokens of the
    thumbnail keep their order and their place among the views.
    """
    rows, columns = token_grid
    per_view = rows * columns
    if grid == SINGLE_VIEW:
        return (*range(per_view), NEWLINE_INDEX)
    first_tile = 1 if views[0] is None else 0
    merged: list[int] = []
    for row in range(cut_rows, grid[0] * rows - cut_rows):
        for column in range(cut_columns, grid[1] * columns - cut_columns):
            tile = (row // rows) * grid[1] + column // columns
            inside = (row % rows) * columns + column % columns
            merged.append((first_tile + tile) * per_view + inside)
        merged.append(NEWLINE_INDEX)
    thumbnail = views.index(None) if None in views else None
    if thumbnail is None:
        return tuple(merged)
    whole = range(thumbnail * per_view, (thumbnail + 1) * per_view)
    return (*whole, *merged) if thumbnail == 0 else (*merged, *whole)
