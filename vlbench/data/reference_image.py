"""The image that costs of tiled images are told for where no image is there. Imports no torch.

What a tiled image takes depends on its size. Tables of costs, matched budgets and plans without
data are for one of REFERENCE_SIZE, and say so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

from vlbench.data.image_tiling import SINGLE_VIEW, TiledImage
from vlbench.data.sample import Sample
from vlbench.data.view_layout import TiledSample, ViewLayout
from vlbench.errors import BadSample, UserError

REFERENCE_SIZE = (1024, 768)
"""Width and height in pixels: a photograph's shape, larger than the grids of usual encoders."""
REFERENCE_NAME = "an image of {} x {} pixels".format(*REFERENCE_SIZE)


@dataclass(frozen=True)
class ReferenceImage:
    """An image of REFERENCE_SIZE without content."""

    name: str = REFERENCE_NAME

    def open(self) -> Image.Image:
        """Return it, black."""
        return Image.new("RGB", REFERENCE_SIZE)

    def read_size(self, exif: bool) -> tuple[int, int]:
        """Return width and height in pixels."""
        return REFERENCE_SIZE


def largest_image(layout: ViewLayout) -> tuple[int, int]:
    """Return the most views that an image can have, and the most image positions."""
    tiling = layout.settings.tiling
    if tiling is None:
        return 1, 2 * layout.tokens_per_view  # one column: a newline follows each patch
    images = [
        TiledImage(
            ReferenceImage(),
            (columns * layout.side, rows * layout.side),
            (rows, columns),
            tiling.list_views((rows, columns)),
        )
        for rows, columns in tiling.list_grids() or (SINGLE_VIEW,)
    ]
    return max(len(one.views) for one in images), max(map(layout.count_positions, images))


def tile_reference(layout: ViewLayout) -> TiledSample:
    """Return the views of the reference image, and where their tokens stand.

    `max_views` does not count: a model for smaller images alone has a cost all the same.

    Raises:
        UserError: the recipe allows fewer visual tokens than it has in one view.
    """
    layout = replace(layout, settings=replace(layout.settings, max_views=None))
    try:
        return layout.tile_sample(Sample("reference", (), (ReferenceImage(),)))
    except BadSample as bad:
        raise UserError(f"{REFERENCE_NAME} {bad.reason}") from bad
