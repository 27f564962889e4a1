"""Whether image sizes and lengths suit the parts of a model, told before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe, StageConfig
from vlbench.connector import registry
from vlbench.connector.base import Shapes
from vlbench.errors import UserError
from vlbench.model import language_model, vision_encoder
from vlbench.model.build_vlm import (
    LANGUAGE_FOLDER,
    build_checkpoint_encoder,
    recipe_connector_options,
    release_overrides,
)
from vlbench.model.language_model import named_language_config, read_language_config
from vlbench.model.vision_encoder import VisionEncoder, build_vision_encoder
from vlbench.model.vlm import connector_shapes
from vlbench.model.weights import hub_download
from vlbench.model.weights.connector_reference import ReferenceWeights, load_reference_weights
from vlbench.model.weights.load_release import build_meta_encoder, check_release, find_layout_module
from vlbench.model.weights.tensor_files import weight_files
from vlbench.train import checkpoint_files
from vlbench.train.checkpoint_files import RELEASE_FOLDER
from vlbench.train.resume import ACCEPTED_SOURCES, is_blip2_folder
from vlbench.train.stage_plan import StageRun


def check_stage_shapes(recipe: Recipe, stage_runs: list[StageRun]) -> None:
    """Refuse texts that are too long for the language model, and image sizes that do not suit.

    An empty tower is resized through all stages, and the connector built at each new size.
    """
    for _ in _iter_tokens_per_image(recipe, stage_runs):
        pass


def check_init_weights(recipe: Recipe, stage: StageConfig) -> None:
    """Compare names and shapes of all files of weights that training begins with; read no number.

    `stage` is the one that begins. What lies on a hub is downloaded. A checkpoint in `init` is
    compared when it is loaded.
    """
    source = str(recipe.init)
    if recipe.init and checkpoint_files.is_run_or_checkpoint(Path(source)):
        return
    if recipe.init and Path(source).is_file():
        _check_reference_shapes(recipe, stage, [Path(source)])
    elif recipe.init:
        folder = hub_download.fetch_hub_folder(
            source, "init", hub_download.RELEASE_CONTENTS, ACCEPTED_SOURCES
        )
        if not is_blip2_folder(folder):
            check_release(folder, release_overrides(recipe))
            return
        _check_reference_shapes(recipe, stage, weight_files(folder))
    vision_encoder.check_vision_weights(recipe.vision.name, recipe.vision.weights)
    language_model.check_language_weights(recipe.language.weights)


def _check_reference_shapes(recipe: Recipe, stage: StageConfig, files: list[Path]) -> None:
    """Load the weights of a reference, without numbers, into a connector without memory."""
    tower, config = meta_encoder_and_config(recipe)
    tower.set_image_size(stage.image_size)
    name = recipe.connector["name"]
    with torch.device("meta"):
        made = registry.load_connector(name)(
            connector_shapes(tower, config), **recipe_connector_options(recipe)
        )
        made.prepare_objective(stage.objective)
        file = files[0] if len(files) == 1 else files[0].parent
        load_reference_weights(made, ReferenceWeights(files, on_meta=True), name, f"init={file}")


def tokens_per_image_by_stage(recipe: Recipe, stage_runs: list[StageRun]) -> list[int]:
    """Return the places that a picture takes in the text, stage by stage."""
    return list(_iter_tokens_per_image(recipe, stage_runs))


def _iter_tokens_per_image(recipe: Recipe, stage_runs: list[StageRun]) -> Iterator[int]:
    """Give the places of a picture in each stage; refuse what does not suit."""
    tower, config = meta_encoder_and_config(recipe)
    if recipe.language.max_length > config.max_position_embeddings:
        raise UserError(
            f"language.max_length is {recipe.language.max_length}, but the language model has "
            f"{config.max_position_embeddings} positions: say "
            f"language.max_length={config.max_position_embeddings}"
        )
    connector = registry.load_connector(recipe.connector["name"])
    built: dict[Shapes, int] = {}
    for leg in stage_runs:
        try:
            tower.set_image_size(leg.stage.image_size)
            shapes = connector_shapes(tower, config)
            if shapes not in built:
                with torch.device("meta"):
                    made = connector(shapes, **recipe_connector_options(recipe))
                    tokens, tower.class_token = made.tokens_per_image, made.class_token
                    if not built and tower.class_token:  # not every tower has one
                        tower(torch.empty(1, 3, tower.image_size, tower.image_size))
                if tokens >= recipe.language.max_length:
                    raise ValueError(
                        f"a picture takes {tokens} tokens of the text, and "
                        f"language.max_length={recipe.language.max_length} leaves no room for them"
                    )
                built[shapes] = tokens
        except ValueError as error:
            raise UserError(f"stages.{leg.name}.image_size: {error}") from error
        except Exception as error:
            registry.blame_connector_file(error)
            raise
        yield built[shapes]


def meta_encoder_and_config(recipe: Recipe) -> tuple[VisionEncoder, LlamaConfig]:
    """Return the empty tower and the language model's configuration that training begins with."""
    source = Path(str(recipe.init))
    if recipe.init and checkpoint_files.is_run_or_checkpoint(source):
        folder = checkpoint_files.find_checkpoint(source)
        config = read_language_config(folder / LANGUAGE_FOLDER)
        if (folder / RELEASE_FOLDER).is_dir():
            return _released_vision_encoder(folder / RELEASE_FOLDER), config
        with torch.device("meta"):
            return build_checkpoint_encoder(
                recipes.load_recipe_file(folder / "recipe.yaml"), folder
            ), config
    if recipe.init and not source.is_file():
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
    weights = recipe.language.weights
    if weights in ("embedded", "random"):
        return _recipe_vision_encoder(recipe), named_language_config(recipe.language.name)
    folder = hub_download.fetch_hub_folder(
        weights,
        "language.weights",
        hub_download.LANGUAGE_CONTENTS,
        patterns=hub_download.SMALL_FILE_PATTERNS,
    )
    return _recipe_vision_encoder(recipe), read_language_config(folder)


def _released_vision_encoder(folder: Path) -> VisionEncoder:
    plan = find_layout_module(folder).read_release_spec(folder)
    return build_meta_encoder(plan, plan.vision_layer, False)


def _recipe_vision_encoder(recipe: Recipe) -> VisionEncoder:
    """Return the tower of a recipe without memory for its weights."""
    tower = recipe.vision
    with torch.device("meta"):
        return build_vision_encoder(
            tower.name, tower.weights, tower.layer, tower.norm, load_weights=False
        )
