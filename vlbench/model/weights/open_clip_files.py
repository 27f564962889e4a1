"""open_clip's files of weights: the vision encoder out of a CLIP, by its names.

A CLIP file holds `visual.*` beside the text encoder, which is left out. Checkpoints of training
code put `module.` before every name; files of an encoder alone have no `visual.`.
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
"""The patch embedding, which every vision encoder has: of timm, and of open_clip itself."""
POSITION_EMBED_KEYS = ("trunk.pos_embed", "positional_embedding")
"""Position embeddings `[1, tokens, width]` of timm and `[tokens, width]` of open_clip."""


def build_open_clip_group(file: Path, state: Mapping[str, Tensor]) -> TensorGroup:
    """Return what to read from `file` for an encoder with `state`; every other name is its text's.

    Raises:
        Mistake: when the file has no vision encoder of open_clip.
    """
    prefix = _find_encoder_prefix(file, list(read_tensor_shapes(file)))
    outside = rf"(?!{re.escape(prefix)}).*" if prefix.endswith("visual.") else r"(?!)"
    wanted = {prefix + key: ("vision", key) for key in state}
    return TensorGroup([file], wanted, rf"{outside}|{BUFFER_PATTERN}")


def infer_image_size(file: Path, visual: Any) -> int | None:
    """Return the side in pixels of the pictures that the position embeddings in `file` are for.

    None where the file has none, or not those of a square.
    """
    known = read_tensor_shapes(file)
    prefix = _find_encoder_prefix(file, list(known))
    for key in POSITION_EMBED_KEYS:
        shape = known.get(prefix + key)
        own = visual.state_dict().get(key)
        if shape is None or own is None or len(shape) != own.dim():
            continue
        rows, columns = encoder_grid(visual)
        more = own.shape[-2] - rows * columns  # class token and registers
        side = math.isqrt(max(0, shape[-2] - more))
        if side and side**2 == shape[-2] - more:
            return int(side * (encoder_image_size(visual) // rows))
    return None


def load_open_clip_weights(file: Path, visual: Any) -> set[str]:
    """Load the encoder in `file` into `visual`, in float32; return the keys that were loaded."""
    state = visual.state_dict()
    loaded = load_tensor_groups(
        [build_open_clip_group(file, state)], {"vision": state}, torch.float32, "cpu"
    )["vision"]
    visual.load_state_dict(loaded, strict=True, assign=True)
    return set(loaded)


def _find_encoder_prefix(file: Path, tensor_names: list[str]) -> str:
    """Return what stands before the encoder's own names in `file`, for example "visual."."""
    for anchor in PATCH_EMBED_KEYS:
        found = [name for name in tensor_names if name == anchor or name.endswith(f".{anchor}")]
        if found:
            inside = [name for name in found if f"visual.{anchor}" in name]
            if len(inside) > 1:
                starts = " and ".join(name.removesuffix(anchor) for name in sorted(inside)[:3])
                raise UserError(
                    f"{file} holds several vision encoders ({starts}): give a file of one"
                )
            return min(inside or found, key=len).removesuffix(anchor)
    if any("embeddings.patch_embedding" in name for name in tensor_names):
        raise UserError(
            f"{file} is a CLIP in Hugging Face's layout: give its folder, in which config.json "
            "says what it is"
        )
    some = ", ".join(tensor_names[:3]) or "nothing"
    raise UserError(
        f"{file} holds no vision encoder of open_clip: no tensor visual.{PATCH_EMBED_KEYS[1]} "
        "or visual."
        f"{PATCH_EMBED_KEYS[0]} is among its {len(tensor_names)} "
        f"({some}{', ...' if len(tensor_names) > 3 else ''})"
    )
