"""Checks of image sizes, lengths and weight shapes before a model is built."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vlbench import hub_download
from vlbench.config import recipe as recipes
from vlbench.config.model_schema import ModelConfig, VisionEncoderConfig
from vlbench.config.stage_schema import StageConfig
from vlbench.connector import registry
from vlbench.connector.base import Connector, Shapes
from vlbench.connector.bounded_building import NewTensorLimit, build_connector
from vlbench.data.image_processing import ImageTransform
from vlbench.data.view_layout import view_fields
from vlbench.errors import UserError
from vlbench.model import language_model
from vlbench.model.build_vlm import (
    LANGUAGE_FOLDER,
    build_checkpoint_encoder,
    read_view_settings,
    release_overrides,
)
from vlbench.model.connector_adaptation import check_adaptation
from vlbench.model.connector_cost import ConnectorCostCounter
from vlbench.model.decoder_families import DecoderConfig
from vlbench.model.language_model import named_language_config, read_language_config
from vlbench.model.paired_encoder import build_encoders, check_encoder_weights
from vlbench.model.view_tokens import check_native_aspect, connector_layout
from vlbench.model.vision_encoder import VisionEncoder, build_vision_encoder
from vlbench.model.vlm import connector_shapes
from vlbench.model.weights.connector_reference import ReferenceWeights, load_reference_weights
from vlbench.model.weights.load_release import build_meta_encoder, check_release, find_layout_module
from vlbench.model.weights.tensor_files import weight_files
from vlbench.train import checkpoint_files
from vlbench.train.checkpoint_files import RELEASE_FOLDER
from vlbench.train.resume import ACCEPTED_SOURCES, is_blip2_folder
from vlbench.train.stage_plan import StageRun


def check_stage_shapes(config: ModelConfig, stage_runs: list[StageRun]) -> None:
    """Refuse texts that are too long for the language model, and image sizes that do not fit.

    A vision encoder on the meta device is resized through all stages, and the connector is built
    at each new size.
    """
    tokens_per_image_by_stage(config, stage_runs)


def check_init_weights(config: ModelConfig, stage: StageConfig) -> None:
    """Compare names and shapes in all files of weights that training begins with.

    `stage` is the first one. Files on a hub are downloaded. A checkpoint in `init` is compared when
    it is loaded.
    """
    source = str(config.init)
    if config.init and checkpoint_files.is_run_or_checkpoint(Path(source)):
        return
    if config.init and Path(source).is_file():
        _check_reference_shapes(config, stage, [Path(source)])
    elif config.init:
        folder = hub_download.fetch_hub_folder(
            source, "init", hub_download.RELEASE_CONTENTS, ACCEPTED_SOURCES
        )
        if not is_blip2_folder(folder):
            check_release(folder, release_overrides(config))
            return
        _check_reference_shapes(config, stage, weight_files(folder))
    check_encoder_weights(config.vision)
    language_model.check_language_weights(config.language.weights)


def _check_reference_shapes(config: ModelConfig, stage: StageConfig, files: list[Path]) -> None:
    """Load the weights of a reference implementation into a connector on the meta device."""
    encoder, language_config = meta_encoder_and_config(config)
    encoder.set_image_size(stage.image_size)
    name = config.connector_name
    with torch.device("meta"):
        connector = build_connector(
            registry.load_connector(name),
            connector_shapes(encoder, language_config),
            config.connector_options,
        )
        with NewTensorLimit(type(connector)):
            connector.prepare_objective(stage.objective)
        file = files[0] if len(files) == 1 else files[0].parent
        load_reference_weights(
            connector, ReferenceWeights(files, on_meta=True), name, f"init={file}"
        )


def image_transforms_by_stage(
    config: ModelConfig, stage_runs: list[StageRun]
) -> list[ImageTransform]:
    """Return what is done to an image before the vision encoder sees it, stage by stage."""
    encoder, _ = meta_encoder_and_config(config)
    settings = read_view_settings(config.vision)
    transforms = []
    for stage_run in stage_runs:
        encoder.set_image_size(stage_run.stage.image_size)
        transforms.append(replace(encoder.transform, **view_fields(settings)))
    return transforms


def tokens_per_image_by_stage(config: ModelConfig, stage_runs: list[StageRun]) -> list[int]:
    """Return the positions that an image, or a view of it, takes in the text, stage by stage.

    Raises a UserError for what `check_stage_shapes` refuses.
    """
    return [one.tokens_per_image for one in connectors_by_stage(config, stage_runs)]


def connectors_by_stage(config: ModelConfig, stage_runs: list[StageRun]) -> list[Connector]:
    """Return the connector of each stage on the meta device.

    Raises a UserError for what `check_stage_shapes` refuses.
    """
    encoder, language_config = meta_encoder_and_config(config)
    if config.language.max_length > language_config.max_position_embeddings:
        raise UserError(
            f"language.max_length is {config.language.max_length}, but the language model has "
            f"{language_config.max_position_embeddings} positions: say "
            f"language.max_length={language_config.max_position_embeddings}"
        )
    connector_class = registry.load_connector(config.connector_name)
    connectors: dict[Shapes, Connector] = {}
    by_stage: list[Connector] = []
    last_shapes: Shapes | None = None
    for stage_run in stage_runs:
        with registry.blame_connector_errors():
            with _blame_image_size(stage_run):
                encoder.set_image_size(stage_run.stage.image_size)
                shapes = connector_shapes(encoder, language_config)
                if shapes not in connectors:
                    with torch.device("meta"):
                        connectors[shapes] = build_connector(
                            connector_class, shapes, config.connector_options
                        )
                connector = connectors[shapes]
                _check_image_fits(connector.tokens_per_image, config.language.max_length)
            check_native_aspect(encoder, connector, read_view_settings(config.vision))
            _check_view_fits(connector, config, stage_run.stage.image_size)
            encoder.read_blocks(connector.vision_layers, connector.class_token)
            if last_shapes is not None and last_shapes != shapes:
                check_adaptation(connector, by_stage[-1], last_shapes, shapes)
            last_shapes = shapes
            by_stage.append(connector)
    return by_stage


@contextlib.contextmanager
def _blame_image_size(stage_run: StageRun) -> Iterator[None]:
    """Say of an error at which image size it is: most are of a grid that does not divide."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"stages.{stage_run.name}.image_size: {error}") from error


def _check_image_fits(tokens_per_image: int, max_length: int) -> None:
    """Raise a ValueError if one image fills the whole text."""
    if tokens_per_image >= max_length:
        raise ValueError(
            f"an image takes {tokens_per_image} tokens of the text, and "
            f"language.max_length={max_length} leaves no room for them"
        )


def _check_view_fits(connector: Connector, config: ModelConfig, side: int) -> None:
    """Raise a UserError if an image of one view, `side` pixels, has more visual tokens than any.

    So it does for a connector whose tokens cannot be laid out.
    """
    layout = connector_layout(connector, read_view_settings(config.vision), side)
    most = config.vision.max_visual_tokens
    if layout is None or most is None:
        return
    tokens = layout.tokens_per_view + layout.settings.has_newline
    if tokens > most:
        raise UserError(
            f"vision.max_visual_tokens is {most}, and at {side} pixels an image of one view takes "
            f"{tokens} visual tokens"
        )


def meta_encoder_and_config(config: ModelConfig) -> tuple[VisionEncoder, DecoderConfig]:
    """Return the encoder that training begins with, on the meta device, and the LM's config."""
    source = Path(str(config.init))
    if config.init and checkpoint_files.is_run_or_checkpoint(source):
        folder = checkpoint_files.find_checkpoint(source)
        language_config = read_language_config(folder / LANGUAGE_FOLDER)
        if (folder / RELEASE_FOLDER).is_dir():
            return _released_vision_encoder(folder / RELEASE_FOLDER), language_config
        vision = recipes.load_recipe_file(folder / "recipe.yaml").vision
        with torch.device("meta"):
            return build_checkpoint_encoder(vision, folder), language_config
    if config.init and not source.is_file():
        folder = hub_download.fetch_hub_folder(
            str(source),
            "init",
            hub_download.RELEASE_CONTENTS,
            ACCEPTED_SOURCES,
            hub_download.SMALL_FILE_PATTERNS,
        )
        if not is_blip2_folder(folder):
            return _released_vision_encoder(folder), find_layout_module(folder).read_release_spec(
                folder
            ).language_config
    weights = config.language.weights
    if weights in ("embedded", "random"):
        return _configured_encoder(config.vision), named_language_config(config.language.name)
    folder = language_model.tokenizer_folder(weights)
    return _configured_encoder(config.vision), read_language_config(folder)


def offline_encoder_and_config(config: ModelConfig) -> tuple[VisionEncoder, DecoderConfig]:
    """Return what `meta_encoder_and_config` does, without a download of a language model.

    Weights of a hub id are taken to have the architecture of `language.name`.
    """
    language = config.language
    if not Path(language.weights).expanduser().is_dir():
        language = language.model_copy(update={"weights": "random"})
    return meta_encoder_and_config(replace(config, language=language))


def cost_counter(config: ModelConfig, image_sizes: Sequence[int]) -> ConnectorCostCounter:
    """Return what counts the costs of connectors in a model, at the `image_sizes` of its stages."""
    return ConnectorCostCounter(
        *offline_encoder_and_config(config),
        config.language.max_length,
        read_view_settings(config.vision),
        image_sizes,
    )


def _released_vision_encoder(folder: Path) -> VisionEncoder:
    """Return the encoder of a released model on the meta device."""
    spec = find_layout_module(folder).read_release_spec(folder)
    return build_meta_encoder(spec, spec.vision_layer, False)


def _configured_encoder(vision: VisionEncoderConfig) -> VisionEncoder:
    """Return the vision encoder of a recipe on the meta device."""
    with torch.device("meta"):
        return build_encoders(
            vision,
            lambda _, one: build_vision_encoder(
                one.name, one.weights, one.layer, one.norm, load_weights=False
            ),
        )
