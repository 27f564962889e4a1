"""From a tiled model to a folder that `LlavaNextForConditionalGeneration` and `AutoProcessor` load.

LLaVA-NeXT of transformers (checked with 5.17 and 5.24) has one way with tiles, AnyRes:

- the views of an image are the thumbnail, squashed to a square, then the tiles row by row;
- the tiles are cut from the image at its own aspect ratio on a black canvas, whose sides are the
  first of `image_grid_pinpoints` that keeps most pixels and wastes least: their order decides;
- the text has the thumbnail's patches, then row by row those of the tiles side by side, without
  what is padded, and `image_newline` after each row; none follows the thumbnail.

An image always has a thumbnail and a tile at least, so no grid of one tile can be said.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

from vlbench.compat.transformers_internals import pil_llava_next_image_processor
from vlbench.data.image_tiling import ImageTiling
from vlbench.data.view_layout import ViewSettings
from vlbench.errors import UserError
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.view_tokens import newline_of
from vlbench.model.weights.export_hf_llava import (
    LlavaVariant,
    check_plain_projector,
    write_llava_folder,
)
from vlbench.model.weights.hf_llava_next_layout import LAYOUT_NAME, NEWLINE_TENSORS
from vlbench.model.weights.processor_values import RESAMPLE_CODES

WANTED_SETTINGS: dict[str, object] = {"grid": "llava_next", "thumbnail": True, "tags": "newline"}
"""Of `vision.tiling`: what this layout has alone."""


def write_hf_llava_next(vlm: LoadedVLM, folder: Path, dtype: torch.dtype | None) -> None:
    """Write `vlm` into the empty `folder`; `dtype` None keeps the type of every tensor.

    Raises:
        UserError: when the layout cannot express the tiles, or another part of the model.
    """
    tiling = _require_tiling(vlm.processor.view_settings)
    check_plain_projector(vlm, LAYOUT_NAME)
    transform = vlm.processor.transform
    side = transform.crop
    pinpoints = [[rows * side, columns * side] for rows, columns in tiling.list_grids()]
    image_processor = pil_llava_next_image_processor()(
        do_convert_rgb=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        resample=RESAMPLE_CODES[transform.interpolation],
        image_grid_pinpoints=pinpoints,
    )
    variant = LlavaVariant(
        LAYOUT_NAME,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        {"image_grid_pinpoints": pinpoints},
        {NEWLINE_TENSORS[-1]: newline_of(vlm.connector).detach()},
    )
    write_llava_folder(vlm, folder, dtype, variant, image_processor)


def _require_tiling(settings: ViewSettings | None) -> ImageTiling:
    """Return how a model tiles images; a UserError where this layout does otherwise."""
    if settings is None or settings.tiling is None:
        raise UserError(
            f"{LAYOUT_NAME} is for images in tiles, and this model has no vision.tiling; "
            "format=hf_llava is the layout without"
        )
    tiling = settings.tiling
    given: dict[str, object] = {
        "grid": tiling.grid,
        "thumbnail": tiling.thumbnail,
        "tags": settings.tags,
    }
    other = {key: value for key, value in given.items() if value != WANTED_SETTINGS[key]}
    wanted = {key: WANTED_SETTINGS[key] for key in other}
    if not other and not tiling.list_grids():
        other, wanted = {"tiles": tiling.tiles}, {"tiles": "2 or more"}
    if other:
        raise UserError(
            f"{LAYOUT_NAME} has {_format_keys(wanted)} of vision.tiling alone, and this model has "
            f"{_format_keys(other)}; format=vlbench holds every tiling"
        )
    return tiling


def _format_keys(keys: dict[str, object]) -> str:
    """Return keys of a recipe as a command has them."""
    return ", ".join(f"{key}={str(value).lower()}" for key, value in keys.items())
