"""Whether image sizes and lengths suit the parts of a model, told before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

from vlbench import plugins
from vlbench import recipe as recipes
from vlbench.connector import Shapes
from vlbench.mistakes import Mistake
from vlbench.model import language, vision
from vlbench.model.compose import LANGUAGE, checkpoint_tower, choice_of, options_of
from vlbench.model.language import config_in, config_of
from vlbench.model.vision import Tower, build_tower
from vlbench.model.vlm import shapes_of
from vlbench.model.weights import hub
from vlbench.model.weights.load import bare_tower, check_release, layout_of
from vlbench.model.weights.reference import References, load_reference
from vlbench.model.weights.shards import weight_files
from vlbench.schema import Recipe, Stage
from vlbench.train import checkpoint
from vlbench.train.checkpoint import RELEASE
from vlbench.train.legs import Leg
from vlbench.train.restore import KINDS, of_connector


def check_sizes(recipe: Recipe, legs: list[Leg]) -> None:
    """Refuse texts that are too long for the language model, and image sizes that do not suit.

    An empty tower is resized through all stages, and the connector built at each new size.
    """
    for _ in _tokens(recipe, legs):
        pass


def check_weights(recipe: Recipe, stage: Stage) -> None:
    """Compare names and shapes of all files of weights that training begins with; read no number.

    `stage` is the one that begins. What lies on a hub is downloaded. A checkpoint in `init` is
    compared when it is loaded.
    """
    source = str(recipe.init)
    if recipe.init and checkpoint.holds(Path(source)):
        return
    if recipe.init and Path(source).is_file():
        _check_reference(recipe, stage, [Path(source)])
    elif recipe.init:
        folder = hub.fetch(source, "init", hub.RELEASE, KINDS)
        if not of_connector(folder):
            check_release(folder, choice_of(recipe))
            return
        _check_reference(recipe, stage, weight_files(folder))
    vision.check_weights(recipe.vision.name, recipe.vision.weights)
    language.check_weights(recipe.language.weights)


def _check_reference(recipe: Recipe, stage: Stage, files: list[Path]) -> None:
    """Load the weights of a reference, without numbers, into a connector without memory."""
    tower, config = outline(recipe)
    tower.resize(stage.image_size)
    name = recipe.connector["name"]
    with torch.device("meta"):
        made = plugins.connector(name)(shapes_of(tower, config), **options_of(recipe))
        made.prepare(stage.objective)
        file = files[0] if len(files) == 1 else files[0].parent
        load_reference(made, References(files, empty=True), name, f"init={file}")


def tokens_of_stages(recipe: Recipe, legs: list[Leg]) -> list[int]:
    """Return the places that a picture takes in the text, stage by stage."""
    return list(_tokens(recipe, legs))


def _tokens(recipe: Recipe, legs: list[Leg]) -> Iterator[int]:
    """Give the places of a picture in each stage; refuse what does not suit."""
    tower, config = outline(recipe)
    if recipe.language.max_length > config.max_position_embeddings:
        raise Mistake(
            f"language.max_length is {recipe.language.max_length}, but the language model has "
            f"{config.max_position_embeddings} positions: say "
            f"language.max_length={config.max_position_embeddings}"
        )
    connector = plugins.connector(recipe.connector["name"])
    built: dict[Shapes, int] = {}
    for leg in legs:
        try:
            tower.resize(leg.stage.image_size)
            shapes = shapes_of(tower, config)
            if shapes not in built:
                with torch.device("meta"):
                    made = connector(shapes, **options_of(recipe))
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
            raise Mistake(f"stages.{leg.name}.image_size: {error}") from error
        except Exception as error:
            plugins.blame(error)
            raise
        yield built[shapes]


def outline(recipe: Recipe) -> tuple[Tower, LlamaConfig]:
    """Return the empty tower and the language model's configuration that training begins with."""
    source = Path(str(recipe.init))
    if recipe.init and checkpoint.holds(source):
        folder = checkpoint.find(source)
        config = config_in(folder / LANGUAGE)
        if (folder / RELEASE).is_dir():
            return _released_tower(folder / RELEASE), config
        with torch.device("meta"):
            return checkpoint_tower(recipes.load_file(folder / "recipe.yaml"), folder), config
    if recipe.init and not source.is_file():
        folder = hub.fetch(str(source), "init", hub.RELEASE, KINDS, hub.SMALL)
        if not of_connector(folder):
            return _released_tower(folder), layout_of(folder).blueprint(folder).language
    weights = recipe.language.weights
    if weights in ("embedded", "random"):
        return _tower(recipe), config_of(recipe.language.name)
    folder = hub.fetch(weights, "language.weights", hub.LANGUAGE, patterns=hub.SMALL)
    return _tower(recipe), config_in(folder)


def _released_tower(folder: Path) -> Tower:
    plan = layout_of(folder).blueprint(folder)
    return bare_tower(plan, plan.layer, False)


def _tower(recipe: Recipe) -> Tower:
    """Return the tower of a recipe without memory for its weights."""
    tower = recipe.vision
    with torch.device("meta"):
        return build_tower(tower.name, tower.weights, tower.layer, tower.norm, load=False)
