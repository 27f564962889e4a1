"""The names of the vision encoders that can be used, read without importing open_clip or timm."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from vlbench.errors import suggest_name

EMBEDDED_ENCODERS = {
    "tiny": "the embedded miniature of a CLIP vision encoder",
    "tiny_eva": "the embedded miniature of an EVA-02 vision encoder",
}
NATIVE_ENCODER = "timm/naflexvit_so400m_patch16_siglip.v2_webli"
"""SigLIP 2 in NaFlex, which takes pictures of any shape: an example for `vision.aspect=native`."""
CURATED_ENCODERS = (
    "ViT-SO400M-16-SigLIP2-384",
    "ViT-B-16-SigLIP2-256",
    "PE-Core-L-14-336",
    "timm/vit_large_patch16_dinov3.lvd1689m",
    "timm/vit_large_patch14_reg4_dinov2.lvd142m",
    "timm/aimv2_large_patch14_336.apple_pt",
    "timm/vit_large_patch16_radio_v3.c_radio",
    NATIVE_ENCODER,
    "ViT-B-32",
    "ViT-B-16",
    "ViT-L-14",
    "ViT-L-14-336-quickgelu",
    "ViT-H-14",
    "ViT-g-14",
    "ViT-bigG-14",
    "ViT-SO400M-14-SigLIP-384",
    "EVA01-g-14",
    "EVA02-B-16",
    "EVA02-L-14",
    "EVA02-L-14-336",
    "EVA02-E-14",
)
"""Encoders in common use, those that are asked for most first; OWNER/NAME is on a hub.

`vision_encoder_names()` has all of open_clip."""
HYBRID_FAMILIES = {
    r"fastvit|mobileclip-|mobileclip2-|vit_base_mci": "a FastViT or MobileCLIP, with "
    "convolutions and BatchNorm around its blocks, so that a step would depend on its packing",
    r"convnext|resnet|^rn\d|_r\d+_s\d+|_r_s\d+|_resnet": "a convolutional network, or a ViT behind "
    "one",
    r"swin|hiera|nextvit|vitamin|mvitv2|pvt_|davit": "a network of stages, whose grid of patches "
    "shrinks from one to the next",
}
"""Patterns of names of timm and open_clip, and why such a vision encoder is no plain ViT."""
DESCRIPTION_FILES = ("open_clip_config.json", "config.json")
"""Names of the small file, open_clip's and timm's, in a folder that is a vision encoder."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""OWNER/NAME, a repository of a hub."""

TIMM_NAME = re.compile(
    r"(?:hf[-_]hub:)?(?:timm/)?((?:vit|eva|beit|deit|aimv2|naflexvit)\w*_[\w.]+)"
)
"""A name as timm itself takes it: without an owner, or with a prefix."""


def is_hub_name(name: str) -> bool:
    """Tell whether a vision encoder's name is a repository of a hub, and no folder that is here."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def brings_weights(name: str) -> bool:
    """Tell whether a vision encoder's name is a folder, or a repository of a hub: it has weights.

    A name of open_clip stays one beside a folder of that name with a config.json of a whole CLIP.
    """
    if not name or name in EMBEDDED_ENCODERS:
        return False
    folder = os.path.expanduser(name)
    own, other = (os.path.isfile(os.path.join(folder, file)) for file in DESCRIPTION_FILES)
    return own or (other and name not in vision_encoder_names()) or is_hub_name(name)


def hybrid_reason(name: str) -> str | None:
    """Return why a model of timm or open_clip is no plain ViT, as far as its name tells."""
    return next((why for form, why in HYBRID_FAMILIES.items() if re.search(form, name, re.I)), None)


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
        return str(timm).startswith(("vit_", "eva")) and hybrid_reason(str(timm)) is None
    return isinstance(vision.get("layers"), int) and "patch_size" in vision


def check_encoder_name(name: str) -> str:
    """Return `name` if it is a vision encoder, a folder with one, or a repository of a hub.

    A ValueError says why a name of open_clip is none that can be used, or lists some that can.
    """
    if name in EMBEDDED_ENCODERS or name in vision_encoder_names() or is_hub_name(name):
        return name
    if any(Path(name, file).is_file() for file in DESCRIPTION_FILES):
        return name
    reason = hybrid_reason(name)
    if reason is not None:
        raise ValueError(
            f"is '{name}', {reason}; a plain ViT is needed, equal blocks over one grid of patches, "
            f"for example {CURATED_ENCODERS[0]}"
        )
    some = ", ".join((*EMBEDDED_ENCODERS, *CURATED_ENCODERS))
    bare = TIMM_NAME.fullmatch(name)
    close = f" Did you mean 'timm/{bare[1]}'?" if bare else ""
    close = close or suggest_name(name, vision_encoder_names())
    raise ValueError(
        f"must be a ViT or EVA of open_clip, or OWNER/NAME of timm's on a hub, given '{name}'; "
        f"some are: {some}; "
        f"`python -m vlbench list encoders` has all.{close}"
    )
