"""CLIP's vision tower under two names: Hugging Face's files, and open_clip's module.

Nothing is lost on the way: open_clip keeps query, key and value in one matrix, Hugging Face in
three, and every tensor goes there and back bit for bit.
"""

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
from vlbench.errors import UserError, one_line
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

CLIP_CONFIG_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
"""Keys of a configuration that say what a CLIP tower is."""
IGNORED_TENSORS = (
    rf"(visual_projection|text_projection|text_model)\..*|logit_scale|{BUFFER_PATTERN}"
)
"""The rest of a whole CLIP model, of which the vision tower alone is taken."""


def hf_tensor_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Return Hugging Face's name of every open_clip tensor; three for query, key and value."""
    table: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in NON_BLOCK_KEYS.items()}
    for layer in range(num_layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            thirds = tuple(f"{theirs}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            table[f"{ours}.attn.in_proj_{kind}"] = thirds
            for one, other in BLOCK_KEYS.items():
                table[f"{ours}.{one}.{kind}"] = (f"{theirs}.{other}.{kind}",)
    return table


def to_hf_state_dict(visual: nn.Module) -> dict[str, Tensor]:
    """Return the state of an open_clip ViT under Hugging Face's names, without `vision_model.`.

    The projection of contrastive training is left out: a CLIPVisionModel has none.
    """
    state = visual.state_dict()
    return {
        name: part
        for ours, theirs in hf_tensor_names(_num_layers(visual)).items()
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True)
    }


def to_open_clip_state_dict(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return Hugging Face's state under open_clip's names; `state` is emptied to spare memory."""
    result = {}
    for ours, theirs in hf_tensor_names(num_layers).items():
        parts = [state.pop(name) for name in theirs]
        result[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return result


def build_clip_group(folder: Path, visual: nn.Module) -> TensorGroup:
    """Return the files of a CLIP in `folder`; transformers 5 writes its towers without a prefix."""
    files = weight_files(folder)
    found = (
        name.startswith("vision_model.") for file in files for name in read_tensor_shapes(file)
    )
    prefix = "vision_model." if any(found) else ""
    wanted = {prefix + key: ("vision", key) for key in to_hf_state_dict(visual)}
    return TensorGroup(files, wanted, IGNORED_TENSORS)


def load_clip_weights(folder: Path, visual: Any) -> set[str]:
    """Load the weights of a CLIP in Hugging Face's layout into an open_clip ViT, in float32.

    The ViT has no contrastive projection. Return its keys that were loaded.
    """
    states = {"vision": to_hf_state_dict(visual)}
    loaded = load_tensor_groups([build_clip_group(folder, visual)], states, torch.float32, "cpu")[
        "vision"
    ]
    state = to_open_clip_state_dict(loaded, _num_layers(visual))
    visual.load_state_dict(state, strict=True, assign=True)
    return set(state)


def parse_vision_config(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the keys `KEYS` of a CLIPVisionConfig, or of the one inside a CLIPConfig."""
    refuse_quantized_config(config, file)
    inner = config.get("vision_config") or config
    try:
        found = CLIPVisionConfig(**{key: inner[key] for key in CLIP_CONFIG_KEYS if key in inner})
        for key in CLIP_CONFIG_KEYS[:6]:
            if type(getattr(found, key)) is not int or getattr(found, key) < 1:
                raise ValueError(f"{key} is {getattr(found, key)}; it must be at least 1")
    except Exception as error:
        raise UserError(f"{file}: {one_line(error)}") from error
    return {key: getattr(found, key) for key in CLIP_CONFIG_KEYS}


def build_clip_vit(config: Mapping[str, Any]) -> VisionTransformer:
    """Build open_clip's module for a CLIPVisionConfig, given as a mapping, without projection."""
    act = config.get("hidden_act", "quick_gelu")
    if act not in ACTIVATIONS:
        raise UserError(f"the tower's hidden_act is '{act}'; known are {', '.join(ACTIVATIONS)}")
    width = config["hidden_size"]
    visual = VisionTransformer(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=width,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_ratio=(config["intermediate_size"] + 0.5) / width,  # open_clip truncates the product
        output_dim=1,
        act_layer=ACTIVATIONS[act],
        norm_layer=partial(LayerNorm, eps=config.get("layer_norm_eps", 1e-5)),
    )
    visual.proj = None
    return visual


def to_hf_vision_config(visual: Any) -> dict[str, Any]:
    """Return the CLIPVisionConfig of an open_clip ViT; a Mistake when CLIP cannot express it."""
    plain = type(visual) is VisionTransformer and not isinstance(visual.ln_pre, nn.Identity)
    if not plain or set(visual.state_dict()) - {"proj"} != set(
        hf_tensor_names(_num_layers(visual))
    ):
        raise UserError(
            "this format holds plain CLIP ViTs alone, and the tower is none; "
            "format=vlbench keeps every tower"
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
