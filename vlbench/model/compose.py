"""From a recipe to a model: the one place that knows both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from vlbench import plugins
from vlbench.data.template import TEMPLATES
from vlbench.data.tokenizer import Tokenizer
from vlbench.mistakes import Mistake
from vlbench.model.language import (
    build_language,
    config_in,
    empty_language,
    end_ids,
    language_folder,
)
from vlbench.model.vision import Tower, build_tower, tower_of
from vlbench.model.vision_config import CONFIG, read_vision_config
from vlbench.model.vlm import VLM
from vlbench.model.weights.load import Choice
from vlbench.model.weights.origin import (
    ORIGINS,
    WeightOrigin,
    check_origin,
    origin_of,
    read_origins,
)
from vlbench.schema import Recipe

LANGUAGE = "language"  # folder in a checkpoint that describes its language model
VISION = "vision"  # folder in a checkpoint that describes its vision encoder


def compose(
    recipe: Recipe, image_size: int, objective: str = "language", mapped: bool = False
) -> VLM:
    """Build the model of `recipe` with its pretrained weights, at `image_size` pixels.

    `objective` is that of the stage which begins. With `mapped` the weights of the language model
    stay in their files, for a model that is to be sharded.
    """
    torch.manual_seed(recipe.seed)  # what has no pretrained weights starts from the seed
    tower, origin = _pretrained_tower(recipe, [image_size])
    language = build_language(recipe.language.name, recipe.language.weights, mapped=mapped)
    tokenizer = Tokenizer.load(language_folder(recipe.language.weights))
    vlm = _join(recipe, tower, language, tokenizer)
    vlm.pursue(objective, fresh=True)
    vlm.origins = {
        "vision": origin,
        "connector": origin_of(vlm.connector.weights_source, vlm.connector),
        "language": origin_of(recipe.language.weights, language),
    }
    return vlm


def compose_empty(
    recipe: Recipe, sides: Sequence[int], folder: Path, held: Collection[str], mapped: bool = False
) -> VLM:
    """Build the model of a checkpoint in `folder`, of which it holds the weights of parts `held`.

    Those are left to be loaded; what training never touched has the recipe's pretrained weights,
    which must be those that the run began with. `sides` are the image sizes in pixels that training
    went through, the last one that of the checkpoint: position embeddings that are resized twice
    are other ones than those that are resized at once.
    """
    before = read_origins(folder / ORIGINS)
    if "vision" in held:
        tower = checkpoint_tower(recipe, folder)
        tower.resize(sides[-1])
    else:
        tower, origin = _pretrained_tower(recipe, sides)
        check_origin("vision", before.get("vision"), origin, str(folder))
    if "language" in held:
        config = config_in(folder / LANGUAGE)
        language: Any = empty_language(config)
        language.generation_config.eos_token_id = end_ids(folder / LANGUAGE, config)
    else:
        language = build_language(recipe.language.name, recipe.language.weights, mapped=mapped)
        origin = origin_of(recipe.language.weights, language)
        check_origin("language", before.get("language"), origin, str(folder))
    return _join(recipe, tower, language, Tokenizer.load(folder))


def choice_of(recipe: Recipe) -> Choice:
    """Return what `recipe` decides about a model that begins as a released one."""
    return Choice(
        connector=recipe.connector["name"],
        options=options_of(recipe),
        layer=recipe.vision.layer,
        norm=recipe.vision.norm,
        template=recipe.language.template,
        max_length=recipe.language.max_length,
    )


def options_of(recipe: Recipe) -> dict[str, Any]:
    """Return the options of the recipe's connector."""
    return {key: value for key, value in recipe.connector.items() if key != "name"}


def _pretrained_tower(recipe: Recipe, sides: Sequence[int]) -> tuple[Tower, WeightOrigin]:
    """Return the recipe's tower, resized to each of `sides`; and its origin as its weights are."""
    vision = recipe.vision
    tower = build_tower(vision.name, vision.weights, vision.layer, vision.norm)
    origin = origin_of(vision.weights, tower.visual)
    for side in sides:
        tower.resize(side)
    return tower, origin


def checkpoint_tower(recipe: Recipe, folder: Path) -> Tower:
    """Return the tower that the checkpoint in `folder` describes; its weights are not loaded.

    `recipe` is that of the checkpoint.
    """
    vision = recipe.vision
    if (folder / VISION / CONFIG).is_file():
        config = read_vision_config(folder / VISION)
        return tower_of(config, vision.name, vision.layer, vision.norm)
    return build_tower(vision.name, vision.weights, vision.layer, vision.norm, load=False)


def _join(recipe: Recipe, tower: Tower, language: Any, tokenizer: Tokenizer) -> VLM:
    torch.manual_seed(recipe.seed)  # the connector's start does not depend on the other parts
    try:
        return VLM(
            tower,
            plugins.connector(recipe.connector["name"]),
            options_of(recipe),
            language,
            tokenizer,
            TEMPLATES[recipe.language.template],
            recipe.language.max_length,
        )
    except ValueError as error:
        raise Mistake(str(error)) from error
    except Exception as error:
        plugins.blame(error)
        raise
