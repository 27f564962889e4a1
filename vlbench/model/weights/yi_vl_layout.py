"""Yi-VL's released layout.

config.json                        Llama's keys and LLaVA's (mm_*)
model-0000x-of-0000n.safetensors   language model and projector (.bin shards work as well); copies
                                   of the vision encoder are ignored, as in the reference, unless
                                   config.json says that it was trained (LLaVA's
                                   unfreeze_mm_vision_tower, LLaVA-NeXT's mm_tunable_parts)
tokenizer.model tokenizer_config.json ...
vit/NAME/                          the vision encoder, a CLIPVisionModel: config.json,
                                   preprocessor_config.json, pytorch_model.bin or model.safetensors
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlbench.errors import UserError
from vlbench.model.decoder_families import DecoderConfig
from vlbench.model.language_model import parse_language_config
from vlbench.model.vlm import VLM
from vlbench.model.weights import clip_layouts, template_detection
from vlbench.model.weights.release_files import (
    LLAMA_CONFIG_KEYS,
    ReleaseSpec,
    check_crop_size,
    parse_llama_config,
    parse_preprocess_config,
    read_small_files,
    require_keys,
)
from vlbench.model.weights.tensor_files import read_tensor_shapes, weight_files
from vlbench.model.weights.tensor_groups import BUFFER_PATTERN, TensorGroup, missing_tied_keys
from vlbench.text_files import format_json, read_json

PROJECTOR_PREFIX = "model.mm_projector."
ENCODER_PREFIX = "model.vision_tower.vision_tower."
IGNORED_TENSORS = rf"model\.vision_tower\..*|{BUFFER_PATTERN}"
LLAMA_TYPES = ("llava", "llava_llama", "llama")
MISTRAL_TYPES = ("llava_mistral", "mistral")
"""`model_type` of a Mistral, which computes what a Llama does where no window is in use."""
REQUIRED_CONFIG_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_vision_select_layer")
FIXED_CONFIG_VALUES = {
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
}
"""Options of the reference that may have these values alone, as in Yi-VL."""


def is_layout_config(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is of this layout."""
    return "mm_vision_tower" in config


def read_release_spec(folder: Path) -> ReleaseSpec:
    """Read what the small files in `folder` describe."""
    file = folder / "config.json"
    config = read_json(file)
    require_keys(config, (*REQUIRED_CONFIG_KEYS, *LLAMA_CONFIG_KEYS[:4], "vocab_size"), file)
    for key, value in FIXED_CONFIG_VALUES.items():
        if config.get(key, value) != value:
            raise UserError(f"{file}: {key} is {config[key]!r}; only {value!r} can be done here")
    encoder_folder = find_encoder_folder(folder, config)
    depth, norm = parse_projector_type(config["mm_projector_type"], file)
    encoder_file = encoder_folder / "config.json"
    vision = clip_layouts.parse_vision_config(read_json(encoder_file), encoder_file)
    pad = _parse_aspect_ratio(config.get("image_aspect_ratio"), file)
    processor_file = encoder_folder / "preprocessor_config.json"
    preprocess = parse_preprocess_config(read_json(processor_file), processor_file, pad)
    check_crop_size(preprocess, vision, encoder_folder)
    if config.get("mm_hidden_size", vision["hidden_size"]) != vision["hidden_size"]:
        raise UserError(
            f"{file}: mm_hidden_size is {config['mm_hidden_size']}, but the vision encoder "
            f"is {vision['hidden_size']} wide"
        )
    template_name, template_reason = template_detection.detect_yi_vl_template(folder, config)
    return ReleaseSpec(
        language_config=_parse_language_config(config, file),
        vision_config=vision,
        vision_layer=_parse_select_layer(
            config["mm_vision_select_layer"], vision["num_hidden_layers"], file
        ),
        preprocess=preprocess,
        projector_depth=depth,
        projector_norm=norm,
        template_name=template_name,
        template_reason=template_reason,
        encoder_note=_describe_encoder(encoder_folder, config),
    )


def _parse_language_config(config: dict[str, Any], file: Path) -> DecoderConfig:
    """Return the Llama that config.json describes.

    Raises:
        UserError: for another family. Several of them have a Llama's tensors and compute otherwise.
    """
    kind = config.get("model_type", LLAMA_TYPES[0])
    if kind not in LLAMA_TYPES + MISTRAL_TYPES:
        raise UserError(
            f"{file}: model_type is {kind!r}; in this layout language models of Llama's and "
            f"Mistral's families can be done here ({', '.join(LLAMA_TYPES + MISTRAL_TYPES)}); for "
            "others give transformers' layout, model_type llava"
        )
    if kind in MISTRAL_TYPES:  # refuses a window that is in use
        keys = (*LLAMA_CONFIG_KEYS, "sliding_window")
        mistral = {key: config[key] for key in keys if config.get(key) is not None}
        parse_language_config({"sliding_window": None, **mistral, "model_type": "mistral"}, file)
    return parse_llama_config(config, file)


def _parse_aspect_ratio(aspect: Any, file: Path) -> bool:
    """Return whether images are padded to a square; without a value the reference crops them."""
    if aspect not in ("pad", "square", None):
        raise UserError(
            f"{file}: image_aspect_ratio is {aspect!r}; in this layout 'pad' and 'square' can be "
            "done here; for tiles (anyres) give LLaVA-NeXT in transformers' layout, model_type "
            "llava_next"
        )
    return bool(aspect == "pad")


def read_release_files(folder: Path) -> dict[str, bytes]:
    """Return the small files of a release; those of an encoder outside of it are put under `vit/`.

    The configuration is changed to match: an export must never write outside of its folder.
    """
    config = read_json(folder / "config.json")
    encoder_folder, root = find_encoder_folder(folder, config).resolve(), folder.resolve()
    if encoder_folder.is_relative_to(root):
        prefix = f"{encoder_folder.relative_to(root).as_posix()}/"
        return read_small_files(folder) | read_small_files(encoder_folder, prefix)
    path = f"vit/{encoder_folder.name}"
    moved = format_json({**config, "mm_vision_tower": f"./{path}"}, indent=2)
    return {
        **read_small_files(folder),
        **read_small_files(encoder_folder, f"{path}/"),
        "config.json": moved.encode(),
    }


def _parse_select_layer(select_layer: Any, num_layers: int, file: Path) -> int:
    """Return the block whose output is `hidden_states[select_layer]`; [0] is the first's input."""
    if type(select_layer) is not int or not (
        -num_layers <= select_layer < 0 or 0 < select_layer <= num_layers
    ):
        raise UserError(
            f"{file}: mm_vision_select_layer is {select_layer!r}; the vision encoder has "
            f"{num_layers} blocks, so -{num_layers} to -1 and 1 to {num_layers} are allowed"
        )
    return select_layer if select_layer < 0 else select_layer - 1


def find_encoder_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Return the folder of the vision encoder: as config.json says, or the only one in `vit/`.

    A config.json that the reference saved has an absolute path of the machine that saved it.
    """
    named = str(config["mm_vision_tower"])
    candidates = [folder / named.removeprefix("./"), folder / "vit" / Path(named).name]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    others = [path.parent for path in sorted(folder.glob("vit/*/config.json"))]
    if len(others) == 1:
        return others[0]
    there_are = f"; in vit/ there are {', '.join(path.name for path in others)}" if others else ""
    raise UserError(
        f"{folder / 'config.json'}: mm_vision_tower is '{named}'; there is no {candidates[0]} with "
        "config.json, preprocessor_config.json and pytorch_model.bin or model.safetensors"
        f"{there_are}"
    )


def _describe_encoder(encoder_folder: Path, config: Mapping[str, Any]) -> str:
    """Return what is to be said of an encoder that is called otherwise than in config.json."""
    named = str(config["mm_vision_tower"])
    if encoder_folder.name == Path(named).name:
        return ""
    found = f"vit/{encoder_folder.name}, the only one"
    return f"vision encoder {found}, though config.json names '{named}'"


def parse_projector_type(projector_type: Any, file: Path) -> tuple[int, bool]:
    """Return depth and LayerNorms of a type such as linear, mlp2x_gelu or mlp2x_gelu_Norm."""
    if projector_type == "linear":
        return 1, False
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu(_Norm)?", str(projector_type))
    if not match:
        raise UserError(
            f"{file}: mm_projector_type is {projector_type!r}; known are linear, mlpNx_gelu, "
            "mlpNx_gelu_Norm"
        )
    return int(match[1]), bool(match[2])


def build_tensor_groups(folder: Path, vlm: VLM) -> list[TensorGroup]:
    """Return the weight files in `folder` and which parts of `vlm` their tensors are for.

    A connector that is no projector keeps its initial weights: that in the files is ignored.
    """
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    file_names = [name for file in files for name in read_tensor_shapes(file)]
    ignored = IGNORED_TENSORS
    if vlm.connector.released_projector() is None:
        ignored = rf"{ignored}|{re.escape(PROJECTOR_PREFIX)}.*"
    targets = main_tensor_targets(config, vlm, file_names)
    encoder = clip_layouts.build_clip_group(find_encoder_folder(folder, config), vlm.vision.visual)
    trained = _trained_encoder_targets(config, encoder, file_names)
    if trained:
        encoder = replace(encoder, tensor_targets={}, ignored_pattern=".*")
    return [TensorGroup(files, targets | trained, ignored), encoder]


def was_encoder_trained(config: Mapping[str, Any]) -> bool:
    """Tell whether config.json says that the vision encoder was trained, in LLaVA's words for it.

    The reference then reads it from the main shards.
    """
    parts = str(config.get("mm_tunable_parts") or "")
    return bool(config.get("unfreeze_mm_vision_tower")) or "mm_vision_tower" in parts


def _trained_encoder_targets(
    config: Mapping[str, Any], encoder: TensorGroup, file_names: Collection[str]
) -> dict[str, tuple[str, str]]:
    """Return the tensors of a trained encoder in the main shards; {} where it is not in them."""
    if not was_encoder_trained(config):
        return {}
    prefixes = (f"{ENCODER_PREFIX}vision_model.", ENCODER_PREFIX)
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in file_names)), None)
    if prefix is None:
        return {}
    targets = encoder.tensor_targets.items()
    return {prefix + name.removeprefix("vision_model."): target for name, target in targets}


def main_tensor_targets(
    config: dict[str, Any], vlm: VLM, file_names: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """Return the tensors of the main shards: name -> (part of the model, key in that part).

    `file_names` are the names in files that are read; none for files that are written.
    """
    tied = missing_tied_keys(vlm.language, file_names)
    targets = {name: ("language", name) for name in vlm.language.state_dict() if name not in tied}
    projector = vlm.connector.released_projector()
    unnumbered = config["mm_projector_type"] == "linear"  # LLaVA v1 has no layer numbers
    for key in projector.state_dict() if projector is not None else ():
        name = key.removeprefix("0.") if unnumbered else key
        targets[PROJECTOR_PREFIX + name] = ("connector", key)
    return targets
