"""Vision encoders that transformers' LLaVA holds, CLIP's and SigLIP's, each by its own module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vlbench.compat.vision_internals import encoder_blocks, has_class_token, has_timm_trunk
from vlbench.errors import UserError
from vlbench.model.weights import clip_layouts, siglip_layouts

CLIP_MODEL_TYPES = ("clip_vision_model", "clip")


def parse_vision_config(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the keys of a `vision_config` that define the architecture."""
    kind = config.get("model_type", CLIP_MODEL_TYPES[0])
    if kind == siglip_layouts.MODEL_TYPE:
        return siglip_layouts.parse_vision_config(config, file)
    if kind in CLIP_MODEL_TYPES:
        return clip_layouts.parse_vision_config(config, file)
    raise UserError(
        f"{file}: vision_config has model_type {kind!r}; known are {CLIP_MODEL_TYPES[0]} and "
        f"{siglip_layouts.MODEL_TYPE}"
    )


def build_vit(config: Mapping[str, Any]) -> nn.Module:
    """Build open_clip's module for what `parse_vision_config` has returned."""
    if config.get("model_type") == siglip_layouts.MODEL_TYPE:
        return siglip_layouts.build_siglip_vit(config)
    visual: nn.Module = clip_layouts.build_clip_vit(config)
    return visual


def feature_selection(visual: nn.Module) -> Literal["default", "full"]:
    """Return LLaVA's `vision_feature_select_strategy`: whether a class token is dropped."""
    return "default" if has_class_token(visual) else "full"


def to_hf_vision_config(visual: nn.Module) -> dict[str, Any]:
    """Return transformers' configuration; a UserError for an encoder of neither kind."""
    if has_timm_trunk(visual):
        return siglip_layouts.to_hf_vision_config(visual)
    return clip_layouts.to_hf_vision_config(visual)


def to_hf_state_dict(visual: nn.Module) -> dict[str, Tensor]:
    """Return the weights by transformers' names, without `vision_model.`."""
    if has_timm_trunk(visual):
        return siglip_layouts.to_hf_state_dict(visual)
    return clip_layouts.to_hf_state_dict(visual)


def to_open_clip_state_dict(state: dict[str, Tensor], visual: nn.Module) -> dict[str, Tensor]:
    """Return transformers' state dict by the names of `visual`; `state` is emptied."""
    num_layers = len(encoder_blocks(visual))
    if has_timm_trunk(visual):
        return siglip_layouts.to_open_clip_state_dict(state, num_layers)
    return clip_layouts.to_open_clip_state_dict(state, num_layers)
