"""Vision encoders from open_clip's weight files.

The file of a CLIP holds `visual.*` and the text encoder, which is left out. Checkpoints of training
code put `module.` before every name; files of a vision encoder alone have no `visual.`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlbench.compat.vision_internals import encoder_grid, encoder_image_size
from vlbench.errors import UserError
from vlbench.model.weights.tensor_files import read_tensor_shapes
from vlbench.model.weights.tensor_groups import BUFFER_PATTERN, TensorGroup, load_tensor_groups

PATCH_EMBED_KEYS = ("trunk.patch_embed.proj.weight", "conv1.weight")
"""The patch embedding, which every vision encoder has: in timm's models, and open_clip's."""
POSITION_EMBED_KEYS = ("trunk.pos_embed", "positional_embedding")
"""Position embeddings `[1, tokens, width]` of timm and `[tokens, width]` of open_clip."""


def build_open_clip_group(file: Path, state: Mapping[str, Tensor]) -> TensorGroup:
    """Return what to read from `file` for a vision encoder with the state dict `state`.

    Raises:
        UserError: when the file has no vision encoder of open_clip.
    """
    prefix = _find_encoder_prefix(file, list(read_tensor_shapes(file)))
    other_parts = rf"(?!{re.escape(prefix)}).*" if prefix.endswith("visual.") else r"(?!)"
    targets = {prefix + key: ("vision", key) for key in state}
    return TensorGroup([file], targets, rf"{other_parts}|{BUFFER_PATTERN}")


def infer_image_size(file: Path, visual: Any) -> int | None:
    """Return the image size in pixels that the position embeddings in `file` are for.

    None where the file has none, not those of a square, or as many as `visual` already has: its
    image size need not be whole patches.
    """
    shapes = read_tensor_shapes(file)
    prefix = _find_encoder_prefix(file, list(shapes))
    for key in POSITION_EMBED_KEYS:
        shape = shapes.get(prefix + key)
        own_embed = visual.state_dict().get(key)
        if shape is None or own_embed is None or len(shape) != own_embed.dim():
            continue
        rows, columns = encoder_grid(visual)
        extra_tokens = own_embed.shape[-2] - rows * columns  # class token and registers
        patches = shape[-2] - extra_tokens
        side = math.isqrt(max(0, patches))
        if side and side**2 == patches:
            return None if side == rows else int(side * (encoder_image_size(visual) // rows))
    return None


def load_open_clip_weights(file: Path, visual: Any) -> set[str]:
    """Load the encoder in `file` into `visual`, as float32; return the keys that were loaded."""
    state = visual.state_dict()
    loaded = load_tensor_groups(
        [build_open_clip_group(file, state)], {"vision": state}, torch.float32, "cpu"
    )["vision"]
    visual.load_state_dict(loaded, strict=True, assign=True)
    return set(loaded)


def _find_encoder_prefix(file: Path, tensor_names: list[str]) -> str:
    """Return the prefix of the vision encoder's names in `file`, for example "visual."."""
    for anchor in PATCH_EMBED_KEYS:
        names = [name for name in tensor_names if name == anchor or name.endswith(f".{anchor}")]
        if names:
            visual_names = [name for name in names if f"visual.{anchor}" in name]
            if len(visual_names) > 1:
                prefixes = [name.removesuffix(anchor) for name in sorted(visual_names)[:3]]
                raise UserError(
                    f"{file} holds several vision encoders ({' and '.join(prefixes)}): give a file "
                    "of one"
                )
            return min(visual_names or names, key=len).removesuffix(anchor)
    if any("embeddings.patch_embedding" in name for name in tensor_names):
        raise UserError(
            f"{file} is a CLIP in Hugging Face's layout: give its folder, in which config.json "
            "says what it is"
        )
    examples = ", ".join(tensor_names[:3]) or "nothing"
    raise UserError(
        f"{file} holds no vision encoder of open_clip: no tensor visual.{PATCH_EMBED_KEYS[1]} "
        f"or visual.{PATCH_EMBED_KEYS[0]} is among its {len(tensor_names)} "
        f"({examples}{', ...' if len(tensor_names) > 3 else ''})"
    )
