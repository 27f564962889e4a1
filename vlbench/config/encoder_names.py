"""The names of the vision encoders that can be used, read without importing open_clip."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from vlbench.errors import suggest_name

EMBEDDED_ENCODERS = {
    "tiny": "the embedded miniature of a CLIP vision encoder",
    "tiny_eva": "the embedded miniature of an EVA-02 vision encoder",
}
CURATED_ENCODERS = (
    "ViT-B-32",
    "ViT-B-16",
    "ViT-L-14",
    "ViT-L-14-336",
    "ViT-H-14",
    "ViT-g-14",
    "ViT-bigG-14",
    "ViT-B-16-SigLIP",
    "ViT-SO400M-14-SigLIP-384",
    "EVA01-g-14",
    "EVA02-B-16",
    "EVA02-L-14",
    "EVA02-L-14-336",
    "EVA02-E-14",
)
"""Encoders in common use; `vision_encoder_names()` has all."""


@cache
def vision_encoder_names() -> tuple[str, ...]:
    """Return the names of the embedded encoders and of every ViT or EVA of open_clip."""
    spec = importlib.util.find_spec("open_clip")
    folders = spec.submodule_search_locations if spec else None
    files = [f for folder in folders or [] for f in Path(folder, "model_configs").glob("*.json")]
    usable = [f.stem for f in files if _is_supported_vit(json.loads(f.read_text(encoding="utf-8")))]
    return (*EMBEDDED_ENCODERS, *sorted(usable))


def _is_supported_vit(config: dict[str, Any]) -> bool:
    """Tell whether a model config of open_clip has a ViT or EVA, of open_clip itself or of timm."""
    vision = config.get("vision_cfg", {})
    timm = vision.get("timm_model_name")
    if timm:
        return str(timm).startswith(("vit_", "eva"))
    return isinstance(vision.get("layers"), int) and "patch_size" in vision


def check_encoder_name(name: str) -> str:
    """Return `name` if it is a vision encoder or a folder with one; a ValueError lists some."""
    if name in EMBEDDED_ENCODERS or name in vision_encoder_names():
        return name
    if Path(name, "open_clip_config.json").is_file():
        return name
    some = ", ".join((*EMBEDDED_ENCODERS, *CURATED_ENCODERS))
    raise ValueError(
        f"must be a ViT or EVA of open_clip, given '{name}'; some are: {some}; "
        f"`python -m vlbench list encoders` has all.{suggest_name(name, vision_encoder_names())}"
    )
