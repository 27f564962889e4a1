"""SigLIP's vision encoder in two layouts: Hugging Face's files, and timm's model in open_clip.

It has no class token. timm keeps query, key and value in one matrix, Hugging Face in three. The
head that pools patches for contrastive training is left out: nothing here reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig

from vlbench.compat.vision_internals import (
    build_timm_encoder,
    encoder_blocks,
    encoder_grid,
    encoder_image_size,
    has_timm_trunk,
)
from vlbench.errors import UserError
from vlbench.model.weights.hf_vit_layout import (
    TensorNames,
    join_vit_tensors,
    parse_vit_config,
    split_vit_tensors,
    vit_tensor_names,
)

MODEL_TYPE = "siglip_vision_model"
ARCHITECTURE = "vit_base_patch16_siglip_224"  # timm's; widths and depth are given as arguments
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's name of an activation -> timm's."""
LAYER_NORM_EPS = 1e-6  # timm's, and of all published SigLIPs
NON_BLOCK_KEYS = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
BLOCK_KEYS = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
POOLING_PREFIX = "attn_pool."


def hf_tensor_names(num_layers: int) -> TensorNames:
    """Return Hugging Face's name of every timm tensor."""
    return vit_tensor_names(NON_BLOCK_KEYS, BLOCK_KEYS, "blocks", "attn.qkv.", num_layers)


def to_hf_state_dict(visual: Any) -> dict[str, Tensor]:
    """Return the state dict of a SigLIP by Hugging Face's names, without `vision_model.`."""
    state = visual.trunk.state_dict()
    state["pos_embed"] = state["pos_embed"][0]
    return split_vit_tensors(state, hf_tensor_names(len(encoder_blocks(visual))))


def to_open_clip_state_dict(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return Hugging Face's state dict by open_clip's names; `state` is emptied to save memory."""
    converted = join_vit_tensors(state, hf_tensor_names(num_layers))
    converted["pos_embed"] = converted["pos_embed"][None]
    return {f"trunk.{key}": tensor for key, tensor in converted.items()}


def parse_vision_config(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the model type and the keys `CONFIG_KEYS` of a SiglipVisionConfig."""
    parsed = parse_vit_config(SiglipVisionConfig, config, file)
    if parsed["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"{file}: hidden_act is '{parsed['hidden_act']}'; known of SigLIP are "
            f"{', '.join(ACTIVATIONS)}"
        )
    if parsed["layer_norm_eps"] != LAYER_NORM_EPS:
        raise UserError(
            f"{file}: layer_norm_eps is {parsed['layer_norm_eps']}; of SigLIP only "
            f"{LAYER_NORM_EPS} can be done here"
        )
    return {"model_type": MODEL_TYPE, **parsed}


def build_siglip_vit(config: Mapping[str, Any]) -> nn.Module:
    """Build open_clip's holder of timm's model for a SiglipVisionConfig, without a pooling head."""
    width = config["hidden_size"]
    arguments = {
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "patch_size": config["patch_size"],
        "mlp_ratio": (config["intermediate_size"] + 0.5) / width,  # timm truncates the product
        "act_layer": ACTIVATIONS[config["hidden_act"]],
        "global_pool": "",
    }
    return build_timm_encoder(ARCHITECTURE, arguments, config["image_size"])


def to_hf_vision_config(visual: Any) -> dict[str, Any]:
    """Return the SiglipVisionConfig of timm's model that open_clip holds.

    Raises:
        UserError: when it is another architecture than SigLIP's.
    """
    if not _is_siglip(visual):
        raise UserError(
            "this format holds plain ViTs of CLIP and SigLIP alone, and the vision encoder is "
            "none; format=vlbench keeps every vision encoder"
        )
    block: Any = encoder_blocks(visual)[0]
    return {
        "architectures": ["SiglipVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": _activation_name(block.mlp.act),
        "hidden_size": visual.trunk.embed_dim,
        "image_size": encoder_image_size(visual),
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
        "model_type": MODEL_TYPE,
        "num_attention_heads": block.attn.num_heads,
        "num_channels": 3,
        "num_hidden_layers": len(encoder_blocks(visual)),
        "patch_size": encoder_image_size(visual) // encoder_grid(visual)[0],
        "vision_use_head": False,
    }


def _is_siglip(visual: Any) -> bool:
    """Tell whether a vision encoder computes what transformers' SiglipVisionModel does."""
    if not has_timm_trunk(visual):
        return False
    keys = {key for key in visual.trunk.state_dict() if not key.startswith(POOLING_PREFIX)}
    if keys != set(hf_tensor_names(len(encoder_blocks(visual)))):
        return False  # a class token, registers, layer scales, norms of queries, rotary positions
    rows, columns = encoder_grid(visual)
    block: Any = encoder_blocks(visual)[0]
    return (
        visual.trunk.pos_embed.shape[1] == rows * columns
        and isinstance(block.norm1, nn.LayerNorm)
        and block.norm1.eps == LAYER_NORM_EPS
        and _activation_name(block.mlp.act) in ACTIVATIONS
    )


def _activation_name(module: nn.Module) -> str:
    """Return Hugging Face's name of an activation of timm, by what it computes; "" for others."""
    values = torch.linspace(-3, 3, 13, device="cpu")  # also where the model is on meta
    with torch.no_grad():
        computed = module(values)
    exact = {
        "gelu": nn.functional.gelu(values),
        "gelu_pytorch_tanh": nn.functional.gelu(values, approximate="tanh"),
    }
    return next((name for name, known in exact.items() if torch.equal(known, computed)), "")
