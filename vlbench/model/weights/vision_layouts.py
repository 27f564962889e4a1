"""Vision encoders that transformers' LLaVA holds, CLIP's and SigLIP's, each by its own module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import CLIPVisionConfig, SiglipVisionConfig

from vlbench.compat.vision_internals import encoder_blocks, has_timm_trunk
from vlbench.errors import UserError
from vlbench.model.weights import clip_layouts, siglip_layouts

CLIP_MODEL_TYPES = ("clip_vision_model", "clip")
UNUSED_TENSORS = r"head\..*"
"""Names of what a released encoder may have and LLaVA does not read: SigLIP's pooling head."""


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


def is_siglip(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration of this module is SigLIP's; it is CLIP's otherwise."""
    return config.get("model_type") == siglip_layouts.MODEL_TYPE


def build_vit(config: Mapping[str, Any]) -> nn.Module:
    """Build open_clip's module for what `parse_vision_config` has returned."""
    if is_siglip(config):
        return siglip_layouts.build_siglip_vit(config)
    visual: nn.Module = clip_layouts.build_clip_vit(config)
    return visual


def feature_selection(config: Mapping[str, Any]) -> Literal["default", "full"]:
    """Return LLaVA's `vision_feature_select_strategy`: "default" drops CLIP's class token."""
    return "full" if is_siglip(config) else "default"


def build_hf_config(config: Mapping[str, Any]) -> CLIPVisionConfig | SiglipVisionConfig:
    """Return transformers' object for what `to_hf_vision_config` has returned."""
    config_class: Any = SiglipVisionConfig if is_siglip(config) else CLIPVisionConfig
    built: CLIPVisionConfig | SiglipVisionConfig = config_class(**config)
    return built


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
