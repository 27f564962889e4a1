"""Vision encoders from timm's weight files: model.safetensors in timm's own layout.

A file holds one model under its own names, and may hold the classifier that it was trained with,
which is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlbench.compat.vision_internals import (
    encoder_grid,
    encoder_image_size,
    resample_radio_positions,
)
from vlbench.model.weights.tensor_files import read_tensor_shapes
from vlbench.model.weights.tensor_groups import (
    BUFFER_PATTERN,
    TensorGroup,
    check_tensor_groups,
    load_tensor_groups,
)

OWN_PREFIX = "trunk."
"""Before timm's names in a vision encoder of open_clip that holds a model of timm."""
POSITIONS = "pos_embed"
HEAD_PATTERN = r"(head|head_dist)\..*|mask_token"
"""Names of the classifier, and of what stands for masked patches in pretraining."""


def load_timm_weights(file: Path, encoder: Any, load_values: bool = True) -> set[str]:
    """Load `file` into a `VisionEncoder` of timm, as float32, at the image size of the file.

    Returns:
        The keys of `encoder.visual` that were loaded. Without `load_values` names and shapes are
        compared, and nothing is loaded.

    Raises:
        UserError: names a tensor that is missing, surplus or of another shape.
    """
    visual, key = encoder.visual, OWN_PREFIX + POSITIONS
    positions = read_tensor_shapes(file).get(POSITIONS)
    # a NaFlexViT keeps the file's grid, and resizes it for each picture
    is_radio = "radio" in encoder.config.architecture and not encoder.takes_any_grid
    image_size = None if is_radio else _image_size_of(positions, visual)
    if image_size is not None:
        encoder.set_image_size(image_size)
    state = dict(visual.state_dict())
    if is_radio and positions is not None and len(positions) == 3:  # a larger grid, see below
        state[key] = torch.empty(positions, device="meta")
    group = _build_timm_group(file, state)
    if not load_values:
        check_tensor_groups([group], {"vision": state})
        return set()
    loaded = load_tensor_groups([group], {"vision": state}, torch.float32, "cpu")["vision"]
    if is_radio:
        architecture = encoder.config.architecture
        loaded[key] = resample_radio_positions(loaded[key], visual, architecture)
    visual.load_state_dict(loaded, strict=True, assign=True)
    return set(loaded)


def _build_timm_group(file: Path, state: Mapping[str, Tensor]) -> TensorGroup:
    """Return what to read from `file` for a vision encoder with the state dict `state`."""
    targets = {key.removeprefix(OWN_PREFIX): ("vision", key) for key in state}
    return TensorGroup([file], targets, rf"{HEAD_PATTERN}|{BUFFER_PATTERN}")


def _image_size_of(positions: tuple[int, ...] | None, visual: Any) -> int | None:
    """Return the image size in pixels of position embeddings `[1, tokens, width]`, if of a square.

    None where there are none, as with rotary ones alone, or as many as `visual` already has: its
    image size need not be whole patches.
    """
    own_embed = getattr(visual.trunk, POSITIONS, None)
    if positions is None or own_embed is None or len(positions) != own_embed.dim():
        return None
    rows, columns = encoder_grid(visual)
    patches = positions[-2] - (own_embed.shape[-2] - rows * columns)  # class token and registers
    side = math.isqrt(max(0, patches))
    if not side or side**2 != patches or side == rows:
        return None
    return side * (encoder_image_size(visual) // rows)
