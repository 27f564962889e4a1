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

from vlbench.mistakes import Mistake
from vlbench.model.weights.groups import BUFFERS, Group, load_groups
from vlbench.model.weights.shards import shapes

ANCHORS = ("trunk.patch_embed.proj.weight", "conv1.weight")
"""The patch embedding, which every vision encoder has: of timm, and of open_clip itself."""
POSITIONS = ("trunk.pos_embed", "positional_embedding")
"""Position embeddings `[1, tokens, width]` of timm and `[tokens, width]` of open_clip."""


def group(file: Path, state: Mapping[str, Tensor]) -> Group:
    """Return what to read from `file` for an encoder with `state`; every other name is its text's.

    Raises:
        Mistake: when the file has no vision encoder of open_clip.
    """
    prefix = _prefix(file, list(shapes(file)))
    outside = rf"(?!{re.escape(prefix)}).*" if prefix.endswith("visual.") else r"(?!)"
    wanted = {prefix + key: ("vision", key) for key in state}
    return Group([file], wanted, rf"{outside}|{BUFFERS}")


def image_size(file: Path, visual: Any) -> int | None:
    """Return the side in pixels of the pictures that the position embeddings in `file` are for.

    None where the file has none, or not those of a square.
    """
    known = shapes(file)
    prefix = _prefix(file, list(known))
    for key in POSITIONS:
        shape = known.get(prefix + key)
        own = visual.state_dict().get(key)
        if shape is None or own is None or len(shape) != own.dim():
            continue
        rows, columns = _grid(visual)
        more = own.shape[-2] - rows * columns  # class token and registers
        side = math.isqrt(max(0, shape[-2] - more))
        if side and side**2 == shape[-2] - more:
            return int(side * (visual.image_size[0] // rows))
    return None


def load(file: Path, visual: Any) -> set[str]:
    """Load the encoder in `file` into `visual`, in float32; return the keys that were loaded."""
    state = visual.state_dict()
    loaded = load_groups([group(file, state)], {"vision": state}, torch.float32, "cpu")["vision"]
    visual.load_state_dict(loaded, strict=True, assign=True)
    return set(loaded)


def _grid(visual: Any) -> tuple[int, int]:
    rows, columns = (
        visual.trunk.patch_embed.grid_size if hasattr(visual, "trunk") else (visual.grid_size)
    )
    return int(rows), int(columns)


def _prefix(file: Path, names: list[str]) -> str:
    """Return what stands before the encoder's own names in `file`, for example "visual."."""
    for anchor in ANCHORS:
        found = [name for name in names if name == anchor or name.endswith(f".{anchor}")]
        if found:
            inside = [name for name in found if f"visual.{anchor}" in name]
            if len(inside) > 1:
                starts = " and ".join(name.removesuffix(anchor) for name in sorted(inside)[:3])
                raise Mistake(
                    f"{file} holds several vision encoders ({starts}): give a file of one"
                )
            return min(inside or found, key=len).removesuffix(anchor)
    if any("embeddings.patch_embedding" in name for name in names):
        raise Mistake(
            f"{file} is a CLIP in Hugging Face's layout: give its folder, in which config.json "
            "says what it is"
        )
    some = ", ".join(names[:3]) or "nothing"
    raise Mistake(
        f"{file} holds no vision encoder of open_clip: no tensor visual.{ANCHORS[1]} or visual."
        f"{ANCHORS[0]} is among its {len(names)} ({some}{', ...' if len(names) > 3 else ''})"
    )
