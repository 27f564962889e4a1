"""From a recipe to a model: the one place that knows both."""

from __future__ import annotations

from pathlib import Path

from vlbench import plugins
from vlbench.data.template import TEMPLATES
from vlbench.data.tokenizer import Tokenizer
from vlbench.mistakes import Mistake
from vlbench.model.language import build_language, weights_folder
from vlbench.model.vision import build_tower
from vlbench.model.vlm import VLM
from vlbench.schema import Recipe


def compose(recipe: Recipe, image_size: int) -> VLM:
    """Build the model of `recipe` with its pretrained weights, at `image_size` pixels."""
    import torch

    torch.manual_seed(recipe.seed)  # what has no pretrained weights starts from the seed
    tower = build_tower(
        recipe.vision.name, recipe.vision.weights, recipe.vision.layer, recipe.vision.norm
    )
    tower.resize(image_size)
    language, tokenizer = _language(recipe)
    options = {key: value for key, value in recipe.connector.items() if key != "name"}
    torch.manual_seed(recipe.seed)  # the connector's start does not depend on the other parts
    try:
        return VLM(
            tower,
            plugins.connector(recipe.connector["name"]),
            options,
            language,
            tokenizer,
            TEMPLATES[recipe.language.template],
            recipe.language.max_length,
        )
    except ValueError as error:
        raise Mistake(str(error)) from error


def _language(recipe: Recipe) -> tuple:
    """Build the language model and its tokenizer; weights that are not there are one clear line."""
    name, weights = recipe.language.name, recipe.language.weights
    folder = weights_folder(name, weights)
    try:
        language = build_language(name, weights)
        tokenizer = Tokenizer.load(local_folder(folder))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise Mistake(
            f"language.weights is '{weights}', which cannot be read ({reason}); wanted is a folder "
            "with config.json, *.safetensors and tokenizer.model, or a hub id with a network"
        ) from error
    return language, tokenizer


def local_folder(source: str) -> Path:
    """Return the folder of a hub id's small files, or the folder itself."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["tokenizer*", "*.json"]))
