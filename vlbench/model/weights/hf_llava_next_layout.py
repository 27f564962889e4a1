"""The layout of transformers' `LlavaNextForConditionalGeneration`: LLaVA's, for images in tiles.

Beside LLaVA's own it has `image_grid_pinpoints`, the pixels `[height, width]` of the grids that an
image may be cut into, in an order that decides between grids that are as good, and the learned
`image_newline`. The published folders (llava-v1.6) have five grids of two to four tiles.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vlbench.data.image_tiling import Grid, ImageTiling
from vlbench.data.view_layout import ViewSettings
from vlbench.errors import UserError
from vlbench.model.view_tokens import NEWLINE_NAME
from vlbench.model.vlm import VLM
from vlbench.model.weights import hf_llava_layout
from vlbench.model.weights.release_files import ReleaseSpec
from vlbench.model.weights.tensor_files import read_tensor_shapes
from vlbench.model.weights.tensor_groups import TensorGroup
from vlbench.text_files import read_json

LAYOUT_NAME = "transformers' LLaVA-NeXT"
PUBLISHED_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""transformers' default where a folder says nothing."""
NEWLINE_TENSORS = ("image_newline", "model.image_newline")
"""The newline in files: transformers changed the name in version 5."""
read_release_files = hf_llava_layout.read_release_files


def is_layout_config(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is of this layout."""
    return config.get("model_type") == "llava_next" and "text_config" in config


def read_release_spec(folder: Path) -> ReleaseSpec:
    """Read what the small files in `folder` describe."""
    spec = hf_llava_layout.read_release_spec(folder)
    side = spec.vision_config["image_size"]
    if spec.preprocess["resize"] != side:
        raise UserError(
            f"{folder}: images are resized to {spec.preprocess['resize']} pixels (size) and the "
            f"vision encoder takes {side}; tiles of another size are not known here"
        )
    grids = _read_grids(folder / "config.json", side)
    tiling = ImageTiling(max(rows * columns for rows, columns in grids), grids=grids)
    if ImageTiling(tiling.tiles).list_grids() == grids:
        tiling = ImageTiling(tiling.tiles)
    # `fit` is for a recipe that does without tiles: the thumbnail's
    preprocess = spec.preprocess | {"fit": "squash"}
    return replace(spec, preprocess=preprocess, view_settings=ViewSettings(tiling))


def _read_grids(file: Path, side: int) -> tuple[Grid, ...]:
    """Return the grids that an image may have, rows and columns of tiles of `side` pixels."""
    pinpoints = read_json(file).get("image_grid_pinpoints") or PUBLISHED_PINPOINTS
    is_list = isinstance(pinpoints, list) and all(
        isinstance(sides, list) and len(sides) == 2 and all(type(one) is int for one in sides)
        for sides in pinpoints
    )
    if not is_list or any(one < side or one % side for sides in pinpoints for one in sides):
        raise UserError(
            f"{file}: image_grid_pinpoints is {pinpoints!r:.200}; wanted are pairs of multiples of "
            f"{side}, the vision encoder's image_size"
        )
    grids = tuple((height // side, width // side) for height, width in pinpoints)
    if (1, 1) in grids:
        raise UserError(
            f"{file}: image_grid_pinpoints has [{side}, {side}], a single tile beside the "
            "thumbnail; here an image of one tile has one view"
        )
    return grids


def build_tensor_groups(folder: Path, vlm: VLM) -> list[TensorGroup]:
    """Return the weight files in `folder` and which parts of `vlm` their tensors are for.

    The newline is not read by a model without one.
    """
    (group,) = hf_llava_layout.build_tensor_groups(folder, vlm)
    names = {name for file in group.files for name in read_tensor_shapes(file)}
    newline = next((name for name in NEWLINE_TENSORS if name in names), NEWLINE_TENSORS[0])
    if not vlm.has_newline:
        return [replace(group, ignored_pattern=rf"{group.ignored_pattern}|{newline}")]
    targets = group.tensor_targets | {newline: ("newline", NEWLINE_NAME)}
    return [replace(group, tensor_targets=targets)]
