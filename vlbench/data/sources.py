"""Which samples a stage learns from: the sources that a recipe names, mixed."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

from vlbench.data.llava import LlavaJson
from vlbench.data.order import Mixture
from vlbench.data.remote import is_url
from vlbench.data.sample import Source
from vlbench.data.scenes import Captions, Conversations
from vlbench.data.shards import Shards, is_tar
from vlbench.mistakes import Mistake
from vlbench.schema import Data, Stage

SCENES = "scenes"
HELD_OUT = 1 << 20  # added to the seed of rendered scenes: pictures that training never meets

Opened = MutableMapping[tuple[str, str | None], Source]
"""Files that are open, by path and folder of pictures: stages share what they have in common."""


def stage_data(data: Data, stage: Stage) -> Data:
    """Return the data of a stage: its own, or those of the recipe."""
    return stage.data or data


def sources(
    data: Data, stage: Stage, name: str, seed: int, opened: Opened | None = None
) -> list[tuple[Source, float]]:
    """Return the (source, weight) pairs that stage `name` trains on."""
    data = stage_data(data, stage)
    if data.mix:
        return [
            (_open(one.train, one.images, data, stage, seed, opened), one.weight)
            for one in data.mix
        ]
    if data.train is None:
        raise Mistake(
            f"stage {name} has no data: give data.train=FILE.json (LLaVA's format) and "
            f"data.images=FOLDER, or data.train={SCENES}"
        )
    return [(_open(data.train, data.images, data, stage, seed, opened), 1.0)]


def _open(
    train: str, images: str | None, data: Data, stage: Stage, seed: int, opened: Opened | None
) -> Source:
    if train == SCENES:
        if stage.form == "caption":
            return Captions(seed, data.samples)
        return Conversations(seed, data.samples, data.questions)
    opened = {} if opened is None else opened
    if (train, images) not in opened:
        shards = is_url(train) or is_tar(train) or Path(train).is_dir()
        opened[train, images] = Shards(train) if shards else LlavaJson(Path(train), images)
    return opened[train, images]


def mixture(
    data: Data, stage: Stage, name: str, seed: int, opened: Opened | None = None
) -> Mixture:
    """Return the shuffled stream of stage `name`."""
    return Mixture(sources(data, stage, name, seed, opened), seed)


def held_out(data: Data, stage: Stage, seed: int, opened: Opened | None = None) -> Source | None:
    """Return samples that training never meets, None when there are none."""
    data = stage_data(data, stage)
    if data.val:
        try:
            return _open(data.val, data.images, data, stage, seed + HELD_OUT, opened)
        except Mistake as mistake:
            raise Mistake(f"data.val: {str(mistake).removeprefix('data ')}") from mistake
    trains_on_scenes = data.train == SCENES and not data.mix
    return _open(SCENES, None, data, stage, seed + HELD_OUT, None) if trains_on_scenes else None
