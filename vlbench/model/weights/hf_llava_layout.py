"""The layout of transformers' `LlavaForConditionalGeneration`.

Its projector is Linear, activation, Linear. A single Linear layer is stored with a linear
activation and an identity as the second layer.

LLaMA-Factory has a variant of it for Yi-VL (`BUAADreamer/Yi-VL-6B-hf`): a key of config.json says
that a LayerNorm follows each Linear layer, and the four are `linear_1` to `linear_4`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from vlbench.errors import UserError
from vlbench.model.decoder_families import DecoderConfig, logit_divisor
from vlbench.model.language_model import parse_language_config
from vlbench.model.vlm import VLM
from vlbench.model.weights import template_detection, vision_layouts
from vlbench.model.weights.llava_projector import projector_tensor_name
from vlbench.model.weights.release_files import (
    ReleaseSpec,
    check_crop_size,
    parse_llama_config,
    parse_preprocess_config,
    read_small_files,
    require_keys,
)
from vlbench.model.weights.tensor_files import read_tensor_shapes, read_tensors, weight_files
from vlbench.model.weights.tensor_groups import BUFFER_PATTERN, TensorGroup, missing_tied_keys
from vlbench.text_files import read_json

LINEAR_ACTIVATION = "linear"  # transformers' name of the identity
# Prefixes of the parts in files: transformers changed them in versions 4.52 and 5.
VISION_PREFIXES = (
    *("vision_tower.vision_model.", "model.vision_tower.vision_model."),
    *("vision_tower.", "model.vision_tower."),
)
LANGUAGE_PREFIXES = ("language_model.model.", "model.language_model.")
HEAD_PREFIXES = ("language_model.lm_head.", "lm_head.")
YI_VL_KEY = "is_yi_vl_derived_model"
"""LLaMA-Factory's key in config.json: the projector has Yi-VL's LayerNorms."""
PROJECTOR_PREFIXES = ("multi_modal_projector.", "model.multi_modal_projector.")


def is_layout_config(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is of this layout."""
    return config.get("model_type") == "llava" and "text_config" in config


def read_release_spec(folder: Path) -> ReleaseSpec:
    """Read what the small files in `folder` describe."""
    file = folder / "config.json"
    config = read_json(file)
    config.setdefault("image_token_index", config.get("image_token_id"))  # newer name
    require_keys(config, ("text_config", "vision_config", "image_token_index"), file)
    _check_part_configs(config, file)
    vision = vision_layouts.parse_vision_config(config["vision_config"], file)
    wanted = vision_layouts.feature_selection(vision)
    if config.get("vision_feature_select_strategy", "default") != wanted:
        raise UserError(
            f"{file}: vision_feature_select_strategy must be '{wanted}' (patches alone)"
        )
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not -vision["num_hidden_layers"] <= layer < 0:
        raise UserError(f"{file}: vision_feature_layer is {layer!r}; wanted is one negative number")
    activation = config.get("projector_hidden_act", "gelu")
    if activation not in ("gelu", LINEAR_ACTIVATION):
        raise UserError(
            f"{file}: projector_hidden_act is {activation!r}; known are gelu and "
            f"{LINEAR_ACTIVATION}"
        )
    has_norms = bool(config.get(YI_VL_KEY))
    if has_norms and activation != "gelu":
        raise UserError(
            f"{file}: {YI_VL_KEY} is true and projector_hidden_act is {activation!r}; Yi-VL's is "
            "gelu"
        )
    template_name, template_reason = template_detection.detect_hf_llava_template(folder, has_norms)
    text = config["text_config"]
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    preprocess = _read_image_processor(folder)
    check_crop_size(preprocess, vision, folder)
    return ReleaseSpec(
        language_config=_parse_text_config({**text, "tie_word_embeddings": tied}, file),
        vision_config=vision,
        vision_layer=layer,
        preprocess=preprocess,
        projector_depth=1 if activation == LINEAR_ACTIVATION else 2,
        projector_norm=has_norms,
        template_name=template_name,
        template_reason=template_reason,
        id_limit=_find_id_limit(folder, config["image_token_index"]),
    )


def _check_part_configs(config: dict[str, Any], file: Path) -> None:
    """Refuse a configuration whose parts are no mappings, or whose projector has no biases."""
    for key in ("text_config", "vision_config"):
        if not isinstance(config[key], dict):
            raise UserError(f"{file}: {key} is {config[key]!r}; wanted is a mapping")
    if type(config["image_token_index"]) is not int or config["image_token_index"] < 1:
        raise UserError(
            f"{file}: image_token_index is {config['image_token_index']!r}; wanted is an id"
        )
    if config.get("multimodal_projector_bias") is False:
        raise UserError(f"{file}: multimodal_projector_bias is False; only True can be done here")


def _parse_text_config(text: dict[str, Any], file: Path) -> DecoderConfig:
    """Return the language model that `text_config` describes."""
    kind = text.get("model_type", "llama")  # transformers' default
    if kind == "llama":
        return parse_llama_config(text, file)
    config = parse_language_config(text, file)
    refuse_divided_logits(config, f"{file}: text_config")
    return config


def refuse_divided_logits(config: DecoderConfig, name: str) -> None:
    """Refuse a language model, called `name`, whose logits transformers' LLaVA would not divide."""
    if logit_divisor(config) != 1:
        raise UserError(
            f"{name} has logits_scaling {logit_divisor(config):g}, by which transformers' LLaVA "
            "does not divide; format=vlbench holds this model"
        )


def _find_id_limit(folder: Path, image_id: int) -> int:
    """Return the first id that the model never generates: the image token's, or a suppressed one.

    A tokenizer may have tokens that the model never learned. An export suppresses their ids, which
    come right before that of the image token.
    """
    file = folder / "generation_config.json"
    suppressed = read_json(file).get("suppress_tokens") if file.is_file() else None
    while isinstance(suppressed, list) and image_id - 1 in suppressed:
        image_id -= 1
    return image_id


def read_release_files(folder: Path) -> dict[str, bytes]:
    """Return the small files of a release."""
    return read_small_files(folder)


def _read_image_processor(folder: Path) -> dict[str, Any]:
    """Read the image processor, which transformers 5 writes into processor_config.json."""
    file = folder / "processor_config.json"
    inner = read_json(file).get("image_processor") if file.is_file() else None
    if inner is None:
        file = folder / "preprocessor_config.json"
        inner = read_json(file)
    if not isinstance(inner, dict):
        raise UserError(f"{file}: image_processor is {inner!r}; wanted is a mapping")
    return parse_preprocess_config(inner, file, pad=bool(inner.get("do_pad", False)))


def build_tensor_groups(folder: Path, vlm: VLM) -> list[TensorGroup]:
    """Return the weight files in `folder` and which parts of `vlm` their tensors are for.

    A connector that is no projector keeps its initial weights: that in the files is ignored.
    """
    files = weight_files(folder)
    file_names = {name for file in files for name in read_tensor_shapes(file)}
    vision_prefix = _find_used_prefix(VISION_PREFIXES, file_names)
    targets = {
        vision_prefix + key: ("vision", key)
        for key in vision_layouts.to_hf_state_dict(vlm.vision.visual)
    }
    language = {_language_tensor_name(key, file_names): key for key in vlm.language.state_dict()}
    tied = missing_tied_keys(
        vlm.language, [key for name, key in language.items() if name in file_names]
    )
    targets |= {name: ("language", key) for name, key in language.items() if key not in tied}
    ignored = rf"{BUFFER_PATTERN}|{re.escape(vision_prefix)}{vision_layouts.UNUSED_TENSORS}"
    projector = vlm.connector.released_projector()
    prefix = _find_used_prefix(PROJECTOR_PREFIXES, file_names)
    if projector is None:
        ignored = rf"{ignored}|{prefix}.*"
    else:
        for key in projector.state_dict():
            targets[prefix + projector_tensor_name(key, projector)] = ("connector", key)
        if len(projector) == 1:
            identity = f"{prefix}linear_2."
            _check_identity_layer(files, identity)
            ignored = rf"{ignored}|{identity}.*"
    return [TensorGroup(files, targets, ignored)]


def _language_tensor_name(key: str, file_names: Collection[str]) -> str:
    """Return the name in the files of the language model's tensor `key`."""
    prefixes = HEAD_PREFIXES if key.startswith("lm_head.") else LANGUAGE_PREFIXES
    return _find_used_prefix(prefixes, file_names) + key.removeprefix("lm_head.").removeprefix(
        "model."
    )


def _find_used_prefix(prefixes: tuple[str, ...], file_names: Collection[str]) -> str:
    """Return the first of `prefixes` that a name in the files has, else the first of all."""
    return next(
        (p for p in prefixes if any(name.startswith(p) for name in file_names)), prefixes[0]
    )


def _check_identity_layer(files: list[Path], prefix: str) -> None:
    """Refuse a projector with a linear activation whose second layer is not the identity."""
    for file in files:
        for name, tensor in read_tensors(
            file, [name for name in read_tensor_shapes(file) if name.startswith(prefix)]
        ):
            identity = torch.eye(len(tensor)) if tensor.dim() == 2 else torch.zeros(len(tensor))
            if not torch.equal(tensor.float(), identity):
                raise UserError(
                    f"{file}: {name} is not the identity, and two Linear layers without an "
                    "activation between them are no connector here"
                )
