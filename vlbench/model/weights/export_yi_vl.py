"""From a model to a folder in Yi-VL's released layout, which the authors' code loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlbench.data.image_processing import ImageTransform
from vlbench.errors import UserError
from vlbench.model.decoder_families import family_label
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights import clip_layouts, template_detection, yi_vl_layout
from vlbench.model.weights.llava_projector import projector_depth_and_norm, require_projector
from vlbench.model.weights.processor_values import FIXED_PROCESSOR_VALUES, RESAMPLE_CODES
from vlbench.model.weights.release_files import (
    LLAMA_CONFIG_KEYS,
    collect_part_states,
    parse_preprocess_config,
    write_release_files,
)
from vlbench.model.weights.tensor_files import cast_floating
from vlbench.model.weights.tensor_groups import TensorGroup, read_unused_tensors
from vlbench.model.weights.tensor_writer import write_tensors
from vlbench.text_files import format_json, read_json

LAYOUT_NAME = "Yi-VL's layout"
ENCODER_IN_ITS_FOLDER = {"unfreeze_mm_vision_tower": False, "mm_tunable_parts": ""}
"""Keys of config.json with which the reference reads the encoder from its own folder."""


def write_yi_vl(
    vlm: LoadedVLM, folder: Path, dtype: torch.dtype | None, source: Path | None = None
) -> None:
    """Write `vlm` into the empty `folder`, in Yi-VL's released layout.

    Args:
        vlm: The model.
        folder: Where it is written.
        dtype: Type of all tensors; None keeps each its own.
        source: The released folder that `vlm` was loaded from and not trained since, if any. Its
            small files, and tensors that the reference ignores, are then written unchanged.

    Raises:
        UserError: when the authors' code could not load the model.
    """
    require_projector(vlm.model.connector, LAYOUT_NAME)
    _check_exportable(vlm)
    if yi_vl_layout.is_layout_config(json.loads(vlm.release_files.get("config.json", b"{}"))):
        write_release_files(vlm.release_files, folder)
    else:
        _create_release_files(vlm, folder)
    config = read_json(folder / "config.json")
    encoder_folder = yi_vl_layout.find_encoder_folder(folder, config)
    if source is None or dtype:
        _update_release_files(vlm, folder, encoder_folder, dtype)
    if source is None and yi_vl_layout.was_encoder_trained(config):
        changes = {key: new for key, new in ENCODER_IN_ITS_FOLDER.items() if key in config}
        _update_json_file(folder / "config.json", changes)
    _write_conv_mode(folder, source is not None)
    if source is not None:
        groups = yi_vl_layout.build_tensor_groups(source, vlm.model)
    else:
        keys = clip_layouts.to_hf_state_dict(vlm.vision.visual)
        vision = {f"vision_model.{key}": ("vision", key) for key in keys}
        groups = [
            TensorGroup([], yi_vl_layout.main_tensor_targets(config, vlm.model), ""),
            TensorGroup([], vision, ""),
        ]
    states = collect_part_states(vlm.model)
    for group, target in zip(groups, (folder, encoder_folder), strict=True):
        targets = group.tensor_targets.items()
        used = ((name, states[part][key]) for name, (part, key) in targets)
        tensors = chain(used, read_unused_tensors(group))
        write_tensors(((name, cast_floating(t, dtype)) for name, t in tensors), target)


def _check_exportable(vlm: LoadedVLM) -> None:
    """Refuse what the authors' code cannot load: another chat template or vision encoder."""
    if vlm.processor.template.name != "yi_vl":
        raise UserError(
            f"language.template is {vlm.processor.template.name}, and the authors' code knows "
            "yi_vl alone; "
            "format=hf_llava carries the template, format=vlbench everything"
        )
    if vlm.language.config.model_type != "llama":
        raise UserError(
            f"the language model is of the family {family_label(vlm.language.config)}, and the "
            "authors' code knows Llama's alone; format=hf_llava or format=vlbench hold it"
        )
    if vlm.vision.norm:
        raise UserError("vision.norm is true, which this layout cannot say; use format=vlbench")
    clip_layouts.to_hf_vision_config(vlm.vision.visual)


def _write_conv_mode(folder: Path, unchanged: bool) -> None:
    """Name Yi-VL's chat template in config.json, where it would not be recognised.

    A folder that is written back `unchanged` stays as it is if it was recognised before.
    """
    name, reason = template_detection.detect_yi_vl_template(
        folder, read_json(folder / "config.json")
    )
    if name != "yi_vl" or (reason and not unchanged):
        _update_json_file(folder / "config.json", {"conv_mode": template_detection.YI_VL_CONV_MODE})


def _update_release_files(
    vlm: LoadedVLM, folder: Path, encoder_folder: Path, dtype: torch.dtype | None
) -> None:
    """Update the small files of a release to the model as it is now."""
    transform = vlm.processor.transform
    depth, norm = projector_depth_and_norm(require_projector(vlm.model.connector, LAYOUT_NAME))
    projector_type = f"mlp{depth}x_gelu{'_Norm' if norm else ''}"
    main_changes: dict[str, Any] = {
        "mm_vision_tower": f"./{encoder_folder.relative_to(folder).as_posix()}",
        "mm_vision_select_layer": vlm.vision.block_index - len(vlm.vision.blocks()),
        "torch_dtype": _written_dtype_name(vlm.language, dtype),
    }
    before = read_json(folder / "config.json")
    if before["mm_projector_type"] != "linear" or depth > 1:
        main_changes["mm_projector_type"] = projector_type
    tied = vlm.language.config.tie_word_embeddings
    if bool(before.get("tie_word_embeddings")) != tied:
        main_changes["tie_word_embeddings"] = tied
    _update_json_file(folder / "config.json", main_changes)
    encoder_changes = {
        "image_size": vlm.vision.image_size,
        "torch_dtype": _written_dtype_name(vlm.vision, dtype),
    }
    _update_json_file(encoder_folder / "config.json", encoder_changes)
    file = encoder_folder / "preprocessor_config.json"
    preprocess = parse_preprocess_config(read_json(file), file, True)
    if (preprocess["resize"], preprocess["crop"]) != (transform.size, transform.crop):
        _update_json_file(file, processor_sizes(transform))
    if preprocess["interpolation"] != transform.interpolation:
        _update_json_file(file, {"resample": RESAMPLE_CODES[transform.interpolation]})


def _written_dtype_name(module: nn.Module, dtype: torch.dtype | None) -> str:
    """Return the name of the type in which the weights of a part are written."""
    return str(dtype or next(module.parameters()).dtype).removeprefix("torch.")


def _update_json_file(file: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON file; where nothing differs the file is not written."""
    config = read_json(file)
    inner: dict[str, Any] = config.get("vision_config") or config
    if "dtype" in inner:  # transformers 5 renamed torch_dtype
        changes = {"dtype" if k == "torch_dtype" else k: v for k, v in changes.items()}
    if any(inner.get(key) != value for key, value in changes.items()):
        inner |= changes
        file.write_text(format_json(config, indent=2) + "\n", encoding="utf-8")


def _create_release_files(vlm: LoadedVLM, folder: Path) -> None:
    """Write the small files of a model that was not loaded from a released Yi-VL."""
    if "tokenizer.model" not in vlm.tokenizer.file_contents:
        raise UserError(
            "the tokenizer has no tokenizer.model, which the authors' code needs; use "
            "format=hf_llava or format=vlbench"
        )
    vlm.tokenizer.save(folder)
    encoder_folder = folder / "vit" / f"tower-{vlm.vision.image_size}"
    encoder_folder.mkdir(parents=True)
    token_ids = {
        "bos_token_id": vlm.tokenizer.bos_token_id,
        "eos_token_id": vlm.tokenizer.eos_token_id,
        "pad_token_id": 0,
    }
    for file, content in (
        (folder / "config.json", _model_config(vlm, encoder_folder.name) | token_ids),
        (folder / "generation_config.json", token_ids),
        (encoder_folder / "config.json", clip_layouts.to_hf_vision_config(vlm.vision.visual)),
        (encoder_folder / "preprocessor_config.json", _processor_config(vlm.processor.transform)),
    ):
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model_config(vlm: LoadedVLM, encoder_folder_name: str) -> dict[str, Any]:
    """Return config.json of the released layout, without the ids of special tokens."""
    depth, norm = projector_depth_and_norm(require_projector(vlm.model.connector, LAYOUT_NAME))
    language = vlm.language.config.to_dict()
    config = {key: value for key, value in language.items() if key in LLAMA_CONFIG_KEYS}
    rope = dict(config.pop("rope_parameters"))
    rope_type, theta = rope.pop("rope_type", "default"), rope.pop("rope_theta")
    return config | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "pad" if vlm.processor.transform.pad else "square",
        "mm_hidden_size": vlm.vision.feature_width,
        "mm_projector_type": f"mlp{depth}x_gelu{'_Norm' if norm else ''}",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": vlm.vision.block_index - len(vlm.vision.blocks()),
        "mm_vision_tower": f"./vit/{encoder_folder_name}",
        "model_type": "llava",
        "rope_scaling": None if rope_type == "default" else {"type": rope_type, **rope},
        "rope_theta": theta,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_mm_proj": True,
    }


def _processor_config(transform: ImageTransform) -> dict[str, Any]:
    """Return preprocessor_config.json of a CLIPImageProcessor that does what `transform` does."""
    switches = {
        key: bool(value) for key, value in FIXED_PROCESSOR_VALUES.items() if key.startswith("do_")
    }
    return {
        **switches,
        "do_convert_rgb": True,
        "image_mean": list(transform.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(transform.std),
        "resample": RESAMPLE_CODES[transform.interpolation],
        "rescale_factor": 1 / 255,
        **processor_sizes(transform),
    }


def processor_sizes(transform: ImageTransform) -> dict[str, Any]:
    """Return the sizes of an image transform in the format of a CLIPImageProcessor."""
    return {
        "size": {"shortest_edge": transform.size},
        "crop_size": {"height": transform.crop, "width": transform.crop},
    }
