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

    With `depth` it has as many layers instead of its own. Nothing is fetched for weights that a hub id names: they have the architecture of
    `language.name`.
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


def row_of(sample: Sample, row_tokens: int, places: int) -> list[Sample]:
    """Return the samples of a row that is full: as many as go in, the last with the rest of it.

    What is longer than a row has one of its own. `places` are those of a picture.
    """
    count = max(1, int(row_tokens // sample.length))
    length = max(round(sample.length), 1)
    images = _spread(sample.images, count, max(0, (length - 1) // places))
    learned = _spread(sample.supervised, count, length)
    row = [Sample(length, *each) for each in zip(images, learned, strict=True)]
    rest = max(0, row_tokens - count * length)
    share = sample.supervised / max(1.0, sample.length - sample.images * places)
    row[-1] = Sample(length + rest, row[-1].images, row[-1].supervised + round(rest * share))
    return row


def _spread(mean: float, count: int, most: int) -> list[int]:
    """Return `count` whole numbers of at most `most` whose mean is about `mean`."""
    ends = [math.floor(mean * number + 0.5) for number in range(count + 1)]
    return [min(most, after - before) for before, after in zip(ends, ends[1:], strict=False)]


def batch_of(row: list[Sample], places: int, side: int) -> Batch:
    """Return a micro-batch of one row: every sample's pictures, then its text, learned at the end.

    Whole numbers are real; make it where other tensors have no values.
    """
    ids, labels, index, positions, image_index, first = [], [], [], [], [], 0
    for number, (length, images, supervised) in enumerate(row):
        length, images, supervised = int(length), int(images), int(supervised)
        own = torch.zeros(length, dtype=torch.long)
        own[: images * places] = IMAGE
        learned = torch.full_like(own, IGNORE)
        learned[length - min(supervised, length) :] = 0
        ids.append(own)
        labels.append(learned)
        index.append(torch.full_like(own, number))
        positions.append(torch.arange(length))
        image_index.append(image_of(own, places, first))
        first += images
    label = torch.cat(labels)
    return Batch(
        ids=torch.cat(ids)[None],
        labels=label[None],
        positions=torch.cat(positions)[None],
        sample_index=torch.cat(index)[None],
        image_index=torch.cat(image_index)[None],
        pixels=torch.zeros(first, 3, side, side),
        sample_id=[str(number) for number in range(len(row))],
        lengths=[[int(length) for length, _, _ in row]],
        tokens=int((label != IGNORE).sum()),
        image_id=[str(number) for number in range(first)],
    ).located()
