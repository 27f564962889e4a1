"""A released model: its small files, the model that they describe, and its weights.

Checkpoints of a run that began with a release hold its small files (configuration, tokenizer, image
processor), so that a checkpoint stands alone and an export can write them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.image_utils import IMAGENET_STANDARD_MEAN as SIGLIP_MEAN
from transformers.image_utils import IMAGENET_STANDARD_STD as SIGLIP_STD
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlbench.data.image_processing import MAX_RESIZED_SIDE
from vlbench.data.view_layout import ViewSettings
from vlbench.errors import UserError, one_line
from vlbench.model.decoder_families import DecoderConfig
from vlbench.model.language_model import check_language_config
from vlbench.model.view_tokens import NEWLINE_NAME, newline_of
from vlbench.model.vlm import VLM
from vlbench.model.weights import vision_layouts
from vlbench.model.weights.processor_values import (
    FIXED_PROCESSOR_VALUES,
    check_fixed_values,
    parse_resample,
)
from vlbench.model.weights.tensor_groups import (
    TensorGroup,
    load_language_state,
    load_tensor_groups,
    move_and_cast,
)
from vlbench.text_files import read_config_bytes, refuse_lfs_pointer

MAX_SMALL_FILE_BYTES = 64_000_000  # a tokenizer.json has some megabytes, weights have more
KEPT_FILE_PATTERNS = ("*.json", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
"""Files of a release that are kept: all but weights, images and the model card."""
LLAMA_CONFIG_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Keys of a configuration that define the architecture of a Llama."""


@dataclass(frozen=True)
class ReleaseSpec:
    """The model that a released folder describes, before any weight is read."""

    language_config: DecoderConfig
    vision_config: dict[str, Any]
    """What `vision_layouts.parse_vision_config` or that of `clip_layouts` returns."""
    vision_layer: int
    """Block of the vision encoder whose output is used, as `vision.layer` of a recipe."""
    preprocess: dict[str, Any]
    """mean, std, resize (shortest edge, pixels), crop (side, pixels), pad (to a square),
    interpolation; may have `fit`, as `VisionEncoder` takes it."""
    projector_depth: int
    """Linear layers of the projector."""
    projector_norm: bool
    """Whether a LayerNorm follows each of them."""
    template_name: str
    """Name of the chat template; "" where none is known."""
    template_reason: str = ""
    """Why it is that one; "" where it is beyond doubt."""
    encoder_note: str = ""
    """What is to be said of the vision encoder; "" where it is the one that is named."""
    id_limit: int | None = None
    """Ids from here on are never generated; None: all that have an embedding may be."""
    view_settings: ViewSettings | None = None
    """How images become views; None: each is one."""


def read_small_files(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Return the contents of small files directly in `folder`, by name with `prefix` before it."""
    contents: dict[str, bytes] = {}
    for path in sorted(path for pattern in KEPT_FILE_PATTERNS for path in folder.glob(pattern)):
        is_index = path.name.endswith(".index.json")  # of shards, which an export writes anew
        if path.is_file() and not is_index and path.stat().st_size < MAX_SMALL_FILE_BYTES:
            refuse_lfs_pointer(path)
            contents[prefix + path.name] = read_config_bytes(path)
    return contents


def write_release_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the small files of a release into `folder`."""
    for name, content in files.items():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"a file of the release would be written outside of {folder}: {name}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def require_keys(config: Mapping[str, Any], keys: Sequence[str], file: Path) -> None:
    """Raise a UserError that names the keys which `config`, read from `file`, lacks."""
    missing = [name for name in keys if config.get(name) is None]
    if missing:
        raise UserError(f"{file} has no {', '.join(missing)}")


def parse_llama_config(config: Mapping[str, Any], file: Path) -> DecoderConfig:
    """Return the Llama that `config`, read from `file`, describes."""
    try:
        llama_config: Any = LlamaConfig(
            **{key: config[key] for key in LLAMA_CONFIG_KEYS if config.get(key) is not None}
        )
    except Exception as error:  # the library's own checks, of types and of widths that divide
        raise UserError(f"{file}: {one_line(error)}") from error
    return check_language_config(llama_config, file)


def parse_preprocess_config(config: Mapping[str, Any], file: Path, pad: bool) -> dict[str, Any]:
    """Return the preprocessing that the file of CLIP's or SigLIP's image processor describes.

    Sizes may be written in the old or the new style. As in transformers, height and width are what
    an image is resized to whatever its sides, and one length is that of its shortest edge.
    """
    size = config.get("size")
    squash = isinstance(size, Mapping) and set(size) == {"height", "width"} and not pad
    if _is_siglip_without_crop(config):
        if not squash and not pad:
            raise UserError(
                f"{file}: size is {size!r}; of SigLIP's image processor, which does not crop, "
                "wanted are height and width"
            )
        whole = {"do_center_crop": True, "crop_size": size}
        config = {"image_mean": SIGLIP_MEAN, "image_std": SIGLIP_STD, **config, **whole}
    require_keys(config, ("size", "crop_size"), file)
    check_fixed_values(config, FIXED_PROCESSOR_VALUES, file)
    preprocess = {
        "mean": _parse_rgb_values(config.get("image_mean") or OPENAI_CLIP_MEAN, "image_mean", file),
        "std": _parse_rgb_values(config.get("image_std") or OPENAI_CLIP_STD, "image_std", file),
        "resize": _parse_side_length(config["size"], "size", file),
        "crop": _parse_side_length(config["crop_size"], "crop_size", file),
        "pad": pad,
        "interpolation": parse_resample(config, file),
    }
    return preprocess | ({"fit": "squash"} if squash else {})


def _is_siglip_without_crop(config: Mapping[str, Any]) -> bool:
    """Tell whether a file is that of SigLIP's image processor, which crops only if it says so."""
    kind = str(config.get("image_processor_type"))
    return kind.startswith("Siglip") and not config.get("do_center_crop")


def check_crop_size(
    preprocess: Mapping[str, Any], vision_config: Mapping[str, Any], folder: Path
) -> None:
    """Refuse images that are cropped to another size than the vision encoder takes."""
    if preprocess["crop"] != vision_config["image_size"]:
        raise UserError(
            f"{folder}: images are cropped to {preprocess['crop']} pixels (crop_size), but the "
            f"vision encoder takes {vision_config['image_size']} (image_size of config.json)"
        )


def _parse_side_length(value: Any, key: str, file: Path) -> int:
    """Return a size that is written as 448, {shortest_edge: 448} or {height: 448, width: 448}."""
    sides = list(value.values()) if isinstance(value, Mapping) else [value]
    has_known_keys = not isinstance(value, Mapping) or set(value) in (
        {"shortest_edge"},
        {"height", "width"},
    )
    if not has_known_keys or any(
        type(side) is not int or side < 1 or side != sides[0] for side in sides
    ):
        raise UserError(f"{file}: {key} is {value}; wanted is one length, such as 448")
    if sides[0] > MAX_RESIZED_SIDE:
        raise UserError(f"{file}: {key} is {sides[0]} pixels; at most {MAX_RESIZED_SIDE} are read")
    return int(sides[0])


def _parse_rgb_values(value: Any, key: str, file: Path) -> tuple[float, ...]:
    """Return a mean or standard deviation of red, green and blue, with 1 as white."""
    is_triple = isinstance(value, list | tuple) and len(value) == 3
    if not is_triple or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in value):
        raise UserError(f"{file}: {key} is {value!r}; wanted are three numbers from 0 to 1")
    if key == "image_std" and 0 in value:
        raise UserError(f"{file}: {key} is {value!r}; pixels are divided by it, so 0 is none")
    return tuple(value)


def collect_part_states(vlm: VLM) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts of a model's parts, by their keys in released layouts.

    The newline of images in tiles, which is a parameter of any connector, is a part of its own.
    """
    states = {
        "vision": vision_layouts.to_hf_state_dict(vlm.vision.visual),
        "language": vlm.language.state_dict(),
    }
    if vlm.has_newline:
        states["newline"] = {NEWLINE_NAME: newline_of(vlm.connector)}
    projector = vlm.connector.released_projector()
    return states | ({"connector": projector.state_dict()} if projector is not None else {})


def load_vlm_weights(
    vlm: VLM,
    groups: Sequence[TensorGroup],
    dtype: torch.dtype | None,
    device: torch.device | str,
    mmap_language: bool = False,
) -> None:
    """Read the weights of `groups` into `vlm`, tensor by tensor.

    Args:
        vlm: The model. A connector that is no projector is not in the files, and is only moved.
        groups: The files.
        dtype: Type of all weights; None keeps each as it is stored.
        device: Where they are loaded to.
        mmap_language: Whether weights of the language model stay memory-mapped, as they are stored.
    """
    projector = vlm.connector.released_projector()
    mmap_parts = ("language",) if mmap_language else ()
    loaded = load_tensor_groups(groups, collect_part_states(vlm), dtype, device, mmap_parts)
    vision_state = vision_layouts.to_open_clip_state_dict(loaded["vision"], vlm.vision.visual)
    vlm.vision.visual.load_state_dict(vision_state, assign=True)
    load_language_state(vlm.language, loaded["language"])
    vlm.language.model.rotary_emb.to(device)
    if projector is not None:
        projector.load_state_dict(loaded["connector"], assign=True)
    if projector is None or vlm.has_newline:  # what has its initial weights
        move_and_cast(vlm.connector, dtype, device)
    if loaded.get("newline"):
        newline_of(vlm.connector).data = loaded["newline"][NEWLINE_NAME]
