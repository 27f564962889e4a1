"""A CLIP in Hugging Face's layout as the weights of a vision encoder that `vision.name` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip

from vlbench.errors import UserError
from vlbench.model.weights import clip_layouts
from vlbench.model.weights.hf_vit_layout import CONFIG_KEYS
from vlbench.model.weights.tensor_groups import check_tensor_groups
from vlbench.text_files import read_json


def load_clip_folder(encoder: Any, name: str, folder: Path, load_values: bool = True) -> set[str]:
    """Load a CLIP in `folder` into a `VisionEncoder`, at the image size of the folder.

    Returns:
        The keys of `encoder.visual` that were loaded. Without `load_values` names and shapes are
        compared, and nothing is loaded.

    Raises:
        UserError: when the encoder, `name` in errors, is none of that layout, or another one.
    """
    _refuse_other_layouts(encoder.visual, name, folder)
    file = folder / "config.json"
    config = clip_layouts.parse_vision_config(read_json(file), file)
    needed = clip_layouts.to_hf_vision_config(encoder.visual)
    for key in CONFIG_KEYS:
        if config[key] != needed[key] and key != "image_size":
            raise UserError(
                f"{file}: {key} is {config[key]}, and of the vision encoder vision.name it is "
                f"{needed[key]}"
            )
    encoder.set_image_size(config["image_size"])
    if load_values:
        return clip_layouts.load_clip_weights(folder, encoder.visual)
    check_tensor_groups(
        [clip_layouts.build_clip_group(folder, encoder.visual)],
        {"vision": clip_layouts.to_hf_state_dict(encoder.visual)},
    )
    return set()


def _refuse_other_layouts(visual: Any, name: str, folder: Path) -> None:
    """Refuse a folder of Hugging Face's layout for an encoder that is no CLIP of that layout."""
    if not clip_layouts.is_clip_vit(visual):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise UserError(
            f"vision.weights is '{folder}', a folder in Hugging Face's layout, and vision.name="
            f"{name} is no CLIP of that layout; allowed are 'random', a file or folder of "
            f"open_clip, or one of {', '.join(tags) or '(no tags)'}; vision.name=timm/NAME brings "
            "its own weights"
        )
