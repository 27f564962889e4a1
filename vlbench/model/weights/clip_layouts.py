"""CLIP's vision encoder in two layouts: Hugging Face's files and open_clip's module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from vlbench.compat.vision_internals import encoder_blocks, encoder_image_size
from vlbench.errors import UserError
from vlbench.model.weights.hf_vit_layout import (
    TensorNames,
    join_vit_tensors,
    parse_vit_config,
    split_vit_tensors,
    vit_tensor_names,
)
from vlbench.model.weights.quantized_weights import refuse_quantized_config
from vlbench.model.weights.tensor_files import read_tensor_shapes, weight_files
from vlbench.model.weights.tensor_groups import BUFFER_PATTERN, TensorGroup, load_tensor_groups

ACTIVATIONS = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
}
NON_BLOCK_KEYS = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # Hugging Face's spelling
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
BLOCK_KEYS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
IGNORED_TENSORS = (
    rf"(visual_projection|text_projection|text_model)\..*|logit_scale|{BUFFER_PATTERN}"
)
"""Tensors of a whole CLIP model that are not of its vision encoder."""


def hf_tensor_names(num_layers: int) -> TensorNames:
    """Return Hugging Face's name of every open_clip tensor."""
    return vit_tensor_names(
        NON_BLOCK_KEYS, BLOCK_KEYS, "transformer.resblocks", "attn.in_proj_", num_layers
    )


def to_hf_state_dict(visual: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of an open_clip ViT by Hugging Face's names, without `vision_model.`.

    The projection of contrastive training is left out: a CLIPVisionModel has none.
    """
    return split_vit_tensors(visual.state_dict(), hf_tensor_names(_num_layers(visual)))


def to_open_clip_state_dict(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return Hugging Face's state dict by open_clip's names; `state` is emptied to save memory."""
    return join_vit_tensors(state, hf_tensor_names(num_layers))


def build_clip_group(folder: Path, visual: nn.Module) -> TensorGroup:
    """Return what to read from a CLIP in `folder` for an open_clip ViT.

    transformers 5 writes vision encoders without the prefix `vision_model.`.
    """
    files = weight_files(folder)
    has_prefix = any(
        name.startswith("vision_model.") for file in files for name in read_tensor_shapes(file)
    )
    prefix = "vision_model." if has_prefix else ""
    targets = {prefix + key: ("vision", key) for key in to_hf_state_dict(visual)}
    return TensorGroup(files, targets, IGNORED_TENSORS)


def load_clip_weights(folder: Path, visual: Any) -> set[str]:
    """Load the weights of a CLIP in Hugging Face's layout into an open_clip ViT, in float32.

    The ViT has no contrastive projection. The keys of it that were loaded are returned.
    """
    states = {"vision": to_hf_state_dict(visual)}
    loaded = load_tensor_groups([build_clip_group(folder, visual)], states, torch.float32, "cpu")
    state = to_open_clip_state_dict(loaded["vision"], _num_layers(visual))
    visual.load_state_dict(state, strict=True, assign=True)
    return set(state)


def parse_vision_config(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the keys `CONFIG_KEYS` of a CLIPVisionConfig, or of the one in a CLIPConfig."""
    refuse_quantized_config(config, file)
    return parse_vit_config(CLIPVisionConfig, config.get("vision_config") or config, file)


def build_clip_vit(config: Mapping[str, Any]) -> VisionTransformer:
    """Build open_clip's module for a CLIPVisionConfig, given as a mapping, without projection."""
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"the vision encoder's hidden_act is '{activation}'; known are {', '.join(ACTIVATIONS)}"
        )
    width = config["hidden_size"]
    visual = VisionTransformer(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=width,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_ratio=(config["intermediate_size"] + 0.5) / width,  # open_clip truncates the product
        output_dim=1,
        act_layer=ACTIVATIONS[activation],
        norm_layer=partial(LayerNorm, eps=config.get("layer_norm_eps", 1e-5)),
    )
    visual.proj = None
    return visual


def is_clip_vit(visual: Any) -> bool:
    """Tell whether a vision encoder of open_clip is the architecture of a CLIPVisionModel."""
    if type(visual) is not VisionTransformer or isinstance(visual.ln_pre, nn.Identity):
        return False
    return set(visual.state_dict()) - {"proj"} == set(hf_tensor_names(_num_layers(visual)))


def to_hf_vision_config(visual: Any) -> dict[str, Any]:
    """Return the CLIPVisionConfig of an open_clip ViT.

    Raises:
        UserError: when it is another architecture than CLIP's.
    """
    if not is_clip_vit(visual):
        raise UserError(
            "this format holds plain CLIP ViTs alone, and the vision encoder is none; "
            "format=vlbench keeps every vision encoder"
        )
    block: Any = encoder_blocks(visual)[0]
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": _activation_name(block.mlp.gelu),
        "hidden_size": visual.conv1.out_channels,
        "image_size": encoder_image_size(visual),
        "intermediate_size": block.mlp.c_fc.out_features,
        "layer_norm_eps": block.ln_1.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": block.attn.num_heads,
        "num_channels": 3,
        "num_hidden_layers": _num_layers(visual),
        "patch_size": visual.patch_size[0],
    }


def _num_layers(visual: Any) -> int:
    return len(encoder_blocks(visual))


def _activation_name(module: nn.Module) -> str:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    return "gelu_pytorch_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
