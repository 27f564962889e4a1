"""From a recipe to a model with its processor: the one place that knows both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from vlbench.config.model_schema import ModelConfig, SecondEncoderConfig, VisionEncoderConfig
from vlbench.connector import registry
from vlbench.data.image_tiling import ImageTiling
from vlbench.data.own_template import bind_template
from vlbench.data.tokenizer import Tokenizer
from vlbench.data.view_layout import ViewSettings
from vlbench.model.language_model import (
    build_empty_language,
    build_language_model,
    language_folder,
    read_eos_token_ids,
    read_language_config,
)
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.named_encoder import read_encoder_config
from vlbench.model.paired_encoder import build_encoders
from vlbench.model.vision_encoder import (
    VisionEncoder,
    build_encoder_from_config,
    build_vision_encoder,
)
from vlbench.model.weights.load_release import ReleaseOverrides
from vlbench.model.weights.weight_origin import (
    ORIGINS_FILE,
    WeightOrigin,
    check_same_origin,
    make_weight_origin,
    read_origins,
)

LANGUAGE_FOLDER = "language"  # in a checkpoint: the configuration of its language model


def build_vlm(
    config: ModelConfig, image_size: int, objective: str = "language", mmap_language: bool = False
) -> LoadedVLM:
    """Build a recipe's model with its pretrained weights, at `image_size` pixels.

    `objective` is that of the first stage. With `mmap_language` the weights of the language model
    stay in their files, for a model that will be sharded.
    """
    torch.manual_seed(config.seed)  # for parts without pretrained weights
    encoder, origins = _build_pretrained_encoder(config.vision)
    encoder.set_image_size(image_size)
    name, weights = config.language.name, config.language.weights
    language = build_language_model(name, weights, mmap_weights=mmap_language)
    vlm = _assemble_vlm(config, encoder, language, Tokenizer.load(language_folder(weights)))
    vlm.model.set_objective(objective, fresh=True)
    vlm.weight_origins = {
        **origins,
        "connector": make_weight_origin(vlm.connector.weights_source, vlm.connector),
        "language": make_weight_origin(weights, language),
    }
    return vlm


def build_checkpoint_vlm(
    config: ModelConfig,
    image_sizes: Sequence[int],
    folder: Path,
    checkpoint_parts: Collection[str],
    mmap_language: bool = False,
) -> LoadedVLM:
    """Build the model of a checkpoint; the weights that the checkpoint holds are not loaded.

    Args:
        config: What the recipe of the checkpoint says of its model.
        image_sizes: The image sizes in pixels of the stages up to that of the checkpoint, in order:
            position embeddings that are resized twice differ from those that are resized once.
        folder: The checkpoint.
        checkpoint_parts: The parts whose weights it holds. The others have the recipe's pretrained
            weights, which must be those that the run began with.
        mmap_language: Leave the weights of the language model in their files.
    """
    origins = read_origins(folder / ORIGINS_FILE)
    encoder, encoder_origins = _build_pretrained_encoder(config.vision, folder, checkpoint_parts)
    for part, origin in encoder_origins.items():
        check_same_origin(part, origins.get(part), origin, str(folder))
    for image_size in image_sizes if encoder_origins else image_sizes[-1:]:
        encoder.set_image_size(image_size)
    if "language" in checkpoint_parts:
        llama_config = read_language_config(folder / LANGUAGE_FOLDER)
        language: Any = build_empty_language(llama_config)
        language.generation_config.eos_token_id = read_eos_token_ids(
            folder / LANGUAGE_FOLDER, llama_config
        )
    else:
        name, weights = config.language.name, config.language.weights
        language = build_language_model(name, weights, mmap_weights=mmap_language)
        origin = make_weight_origin(weights, language)
        check_same_origin("language", origins.get("language"), origin, str(folder))
    return _assemble_vlm(config, encoder, language, Tokenizer.load(folder))


def release_overrides(config: ModelConfig) -> ReleaseOverrides:
    """Return what a recipe changes of the released model that it starts from."""
    return ReleaseOverrides(
        connector_name=config.connector_name,
        connector_options=config.connector_options,
        vision_layer=config.vision.layer,
        vision_norm=config.vision.norm,
        template_name=config.language.template,
        max_length=config.language.max_length,
        has_own_views=False,
        view_settings=read_view_settings(config.vision),
    )


def view_keys(settings: ViewSettings | None) -> dict[str, Any]:
    """Return what `read_view_settings` has read, as keys of a recipe's `vision`."""
    if settings is None:
        return {}
    tiling = settings.tiling
    if tiling is None:
        return {"aspect": "native"}
    grids = [f"{rows}x{columns}" for rows, columns in tiling.grids]
    return {
        "tiling": {
            "tiles": tiling.tiles,
            "grid": tiling.grid,
            "thumbnail": tiling.thumbnail,
            "tags": settings.tags,
            "max_views": settings.max_views,
            "grids": grids or None,
        },
        "max_visual_tokens": settings.max_visual_tokens,
    }


def read_view_settings(vision: VisionEncoderConfig) -> ViewSettings | None:
    """Return what a recipe says of views; None where an image has one."""
    tiling = vision.tiling
    if vision.aspect == "native":
        return ViewSettings(None)
    if tiling is None:
        return None
    return ViewSettings(
        ImageTiling(tiling.tiles, tiling.grid, tiling.thumbnail, tiling.grid_sizes),
        tiling.tags,
        tiling.max_views,
        vision.max_visual_tokens,
    )


def _build_pretrained_encoder(
    vision: VisionEncoderConfig, folder: Path | None = None, checkpoint_parts: Collection[str] = ()
) -> tuple[VisionEncoder, dict[str, WeightOrigin]]:
    """Return the encoder, or the pair, and the origins of weights by part.

    Those of `checkpoint_parts` are built as the checkpoint in `folder` says, without weights; of
    the others it says what is done to images, which other versions may do otherwise.
    """
    origins: dict[str, WeightOrigin] = {}

    def build_one(part: str, config: VisionEncoderConfig | SecondEncoderConfig) -> VisionEncoder:
        if folder is not None and part in checkpoint_parts:
            return _build_saved_encoder(config, folder / part)
        encoder = build_vision_encoder(config.name, config.weights, config.layer, config.norm)
        origins[part] = make_weight_origin(config.weights, encoder.visual)
        if folder is not None and (folder / part).is_dir():
            encoder.set_preprocessing(read_encoder_config(folder / part))
        return encoder

    return build_encoders(vision, build_one), origins


def build_checkpoint_encoder(vision: VisionEncoderConfig, folder: Path) -> VisionEncoder:
    """Return the vision encoder, or the pair, of the checkpoint in `folder`, without its weights.

    `vision` is that of the checkpoint's recipe.
    """
    return build_encoders(vision, lambda part, one: _build_saved_encoder(one, folder / part))


def _build_saved_encoder(
    config: VisionEncoderConfig | SecondEncoderConfig, folder: Path
) -> VisionEncoder:
    """Return one encoder of a checkpoint, described in its sub-folder, without weights."""
    if folder.is_dir():
        saved = read_encoder_config(folder)
        return build_encoder_from_config(saved, config.name, config.layer, config.norm)
    return build_vision_encoder(
        config.name, config.weights, config.layer, config.norm, load_weights=False
    )


def _assemble_vlm(
    config: ModelConfig, vision_encoder: VisionEncoder, language: Any, tokenizer: Tokenizer
) -> LoadedVLM:
    # the connector's initial weights do not depend on the other parts
    torch.manual_seed(config.seed)
    return assemble_vlm(
        vision_encoder,
        registry.load_connector(config.connector_name),
        config.connector_options,
        language,
        tokenizer,
        bind_template(config.language.template, tokenizer),
        config.language.max_length,
        read_view_settings(config.vision),
    )
