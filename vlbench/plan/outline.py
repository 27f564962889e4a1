"""The model and the micro-batches of a stage as shapes: what a plan is counted on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import torch

from vlbench import plugins
from vlbench.data.batch import Batch, image_of
from vlbench.data.sample import IGNORE, IMAGE
from vlbench.data.template import TEMPLATES
from vlbench.data.tokenizer import Tokenizer
from vlbench.mistakes import Mistake
from vlbench.model.compose import options_of
from vlbench.model.language import TINY, random_language
from vlbench.model.vision import Tower
from vlbench.model.vlm import VLM
from vlbench.schema import Recipe
from vlbench.train.module import check_objective, freeze
from vlbench.train.sizes import outline


class Sample(NamedTuple):
    """A sample of a stage on average."""

    length: float
    """Positions, places included."""
    images: float
    supervised: float
    """Positions whose next token is learned."""


class Depth(NamedTuple):
    """How deep a model is."""

    decoder: int
    """Layers of the language model."""
    tower: int
    """Blocks of the tower that are computed."""


def outlined(recipe: Recipe, name: str, depth: Depth | None = None) -> VLM:
    """Return the model of a stage on `meta`, at its image size, with its parts frozen or not.

    With `depth` it has as many layers instead of its own. Nothing is fetched for weights that a hub
    id names: they have the architecture of `language.name`.
    """
    stage = recipe.stages[name]
    local = Path(recipe.language.weights).expanduser().is_dir()
    language = recipe.language if local else dataclasses.replace(recipe.language, weights="random")
    tower, config = outline(dataclasses.replace(recipe, language=language))
    tower.resize(stage.image_size)
    if depth is not None:
        config.num_hidden_layers = depth.decoder
        _cut(tower, depth.tower)
    try:
        with torch.device("meta"):
            vlm = VLM(
                tower,
                plugins.connector(recipe.connector["name"]),
                options_of(recipe),
                random_language(config),
                Tokenizer.load(Path(recipe.language.weights).expanduser() if local else TINY),
                TEMPLATES[recipe.language.template],
                recipe.language.max_length,
            )
            check_objective(vlm, name, stage)
            freeze(vlm, stage)
    except ValueError as error:
        raise Mistake(str(error)) from error
    return vlm


def _cut(tower: Tower, blocks: int) -> None:
    """Leave a tower its first blocks; the features are those of the last."""
    visual = tower.visual
    if hasattr(visual, "trunk"):
        visual.trunk.blocks = visual.trunk.blocks[:blocks]
    else:
        visual.transformer.resblocks = visual.transformer.resblocks[:blocks]
    tower.index = blocks - 1


def row_of(sample: Sample, row_tokens: int, places: int) -> Sample:
    """Return a full row as one long sample; what is longer than a row has one of its own.

    Attention takes no more memory for a long sample than for several short ones. `places` are those
    of a picture; where the last sample would be cut, the row ends in text.
    """
    length = max(row_tokens, math.ceil(sample.length))
    count = max(1, int(length // sample.length))
    images = min(round(count * sample.images), (length - 1) // places)
    learned = sample.supervised / max(1.0, sample.length - sample.images * places)
    return Sample(length, images, min(length, round(learned * (length - images * places))))


def batch_of(row: Sample, places: int, side: int) -> Batch:
    """Return a micro-batch of one row: the pictures, then the text, learned at the end.

    Whole numbers are real; make it where other tensors have no values.
    """
    length, images, supervised = (int(count) for count in row)
    ids = torch.zeros(length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    ids[: images * places] = IMAGE
    labels[length - supervised :] = 0
    return Batch(
        ids=ids[None],
        labels=labels[None],
        positions=torch.arange(length)[None],
        sample_index=torch.zeros(1, length, dtype=torch.long),
        image_index=image_of(ids, places, 0)[None],
        pixels=torch.zeros(images, 3, side, side),
        sample_id=["row"],
        lengths=[[length]],
        tokens=supervised,
        image_id=[str(number) for number in range(images)],
    ).located()
