"""A ViT as Hugging Face writes it, beside another layout of the same weights: CLIP's and SigLIP's.

The other layouts keep query, key and value in one matrix, Hugging Face in three. The conversion is
exact, there and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlbench.errors import UserError, one_line
from vlbench.model.config_limits import check_config_number
from vlbench.model.vision_config import check_image_grid

NUMBER_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size"),
)
CONFIG_KEYS = (*NUMBER_KEYS, "hidden_act", "layer_norm_eps")
"""Keys of a configuration that define the architecture."""
TensorNames = dict[str, tuple[str, ...]]
"""The other layout's name of a tensor -> Hugging Face's: three for query, key and value."""


def vit_tensor_names(
    non_block_keys: Mapping[str, str],
    block_keys: Mapping[str, str],
    block_prefix: str,
    qkv_key: str,
    num_layers: int,
) -> TensorNames:
    """Return the names of all tensors of a ViT of `num_layers` blocks.

    Args:
        non_block_keys: The other layout's names outside of the blocks -> Hugging Face's.
        block_keys: Those of a block's modules, each with a weight and a bias.
        block_prefix: What the other layout's blocks are called before their number.
        qkv_key: The other layout's name of query, key and value before `weight` or `bias`.
        num_layers: Blocks.
    """
    names: TensorNames = {key: (name,) for key, name in non_block_keys.items()}
    for layer in range(num_layers):
        block, hf_block = f"{block_prefix}.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            qkv_names = tuple(f"{hf_block}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            names[f"{block}.{qkv_key}{kind}"] = qkv_names
            for key, name in block_keys.items():
                names[f"{block}.{key}.{kind}"] = (f"{hf_block}.{name}.{kind}",)
    return names


def split_vit_tensors(state: Mapping[str, Tensor], names: TensorNames) -> dict[str, Tensor]:
    """Return the other layout's state dict by Hugging Face's names, without `vision_model.`."""
    return {
        name: part
        for key, hf_names in names.items()
        for name, part in zip(hf_names, state[key].chunk(len(hf_names)), strict=True)
    }


def join_vit_tensors(state: dict[str, Tensor], names: TensorNames) -> dict[str, Tensor]:
    """Return Hugging Face's state dict by the other names; `state` is emptied to save memory."""
    joined = {}
    for key, hf_names in names.items():
        parts = [state.pop(name) for name in hf_names]
        joined[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined


def parse_vit_config(config_class: Any, config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the keys `CONFIG_KEYS` of a configuration, read from `file`, of which a ViT is built.

    `config_class` is transformers' and brings what `config` leaves out. Raises a UserError that
    names `file` for values of wrong types and sizes that do not go together.
    """
    try:
        parsed = config_class(**{key: config[key] for key in CONFIG_KEYS if key in config})
    except Exception as error:
        raise UserError(f"{file}: {one_line(error)}") from error
    for key in NUMBER_KEYS:
        check_config_number(key, getattr(parsed, key), file)
    check_image_grid(parsed.image_size, parsed.patch_size, file)
    return {key: getattr(parsed, key) for key in CONFIG_KEYS}
