"""What a stage has to do: its samples and their lengths, steps, operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from vlbench.data.order import Mixture
from vlbench.data.sample import IGNORE, encode
from vlbench.data.sources import mixture, stage_data
from vlbench.mistakes import BadSample, Mistake
from vlbench.model.flops import StepFlops, step_flops, untrained
from vlbench.model.vlm import VLM
from vlbench.plan.outline import Sample
from vlbench.schema import Recipe, Stage
from vlbench.train.legs import steps_in

LOOKED_AT = 256  # samples whose mean length stands for all
PAIRS = {"align_224": 100_000_000, "align_448": 25_000_000, "chat": 1_000_000}
"""Of Yi-VL's stages, from its announcement (2024-01-22): the last two are about so many."""
TEXT = {"caption": 40, "chat": 250}
"""Tokens beside the places where no data say it: assumed, the system prompt of 100 included."""
LEARNED = {"caption": 1.0, "chat": 0.5}
"""The share of them that is learned, assumed."""


@dataclass(frozen=True)
class Work:
    """What a stage has to do, over all ranks."""

    stage: str
    sample: Sample
    samples: int
    """That are learned from, repeated ones counted again."""
    steps: int
    each: float
    """Operations of a sample, without recomputation."""
    again: dict[str, float]
    """Operations of a sample that a way of recomputing repeats."""

    def operations(self, way: str) -> float:
        """Return the operations of the stage."""
        return self.samples * (self.each + self.again[way])

    def micro_batches(self, batch: int, world: int, row_tokens: int) -> int:
        """Return the micro-batches of a rank in a step of `batch` samples over `world` ranks."""
        own = -(-batch // world)
        return -(-own // max(1, int(row_tokens // self.sample.length)))


def work_of(
    recipe: Recipe, name: str, vlm: VLM, pairs: int | None, text: float | None
) -> tuple[Work, bool]:
    """Return the work of a stage, and whether its lengths are assumed.

    `vlm` is ready for the stage, on `meta`. `pairs` and `text`, where they are given, stand for the
    number of samples and the tokens of text beside the pictures.
    """
    stage = recipe.stages[name]
    found = stage_data(recipe.data, stage)
    there = found.train is not None or found.mix is not None
    data = (
        mixture(recipe.data, stage, name, recipe.seed) if there and not (pairs and text) else None
    )
    if pairs is None:
        pairs = len(data) if data is not None else PAIRS.get(name)
    if pairs is None and stage.steps is None:
        raise Mistake(f"samples=NUMBER is needed: nobody says how many stage {name} has")
    steps = steps_in(stage, pairs or 0)
    if data is not None and text is None:
        sample = _mean(_looked_at(vlm, stage, data), name)
    else:
        sample = assumed(vlm, stage, text)
    flops = step_flops(vlm)
    work = Work(
        stage=name,
        sample=sample,
        samples=steps * stage.batch,
        steps=steps,
        each=operations_of(flops, sample),
        again=_again(vlm, sample),
    )
    return work, data is None or text is not None


def assumed(vlm: VLM, stage: Stage, text: float | None = None) -> Sample:
    """Return a sample of one picture with as much text as is assumed, or `text` tokens."""
    tokens = TEXT[stage.form] if text is None else text
    length = vlm.connector.tokens_per_image + tokens
    return Sample(min(length, vlm.max_length), 1, tokens * LEARNED[stage.form])


def _looked_at(vlm: VLM, stage: Stage, data: Mixture) -> Iterator[Sample]:
    """Give the shapes of the first samples of a stream; no picture is opened."""
    for position in range(min(LOOKED_AT, len(data))):
        try:
            one = encode(
                data[position],
                vlm.template,
                vlm.tokenizer,
                vlm.connector.tokens_per_image,
                vlm.max_length,
                stage.form,
            )
        except BadSample:
            continue
        learned = sum(label != IGNORE for label in one.labels)
        yield Sample(len(one.ids), len(one.sample.pictures), learned)


def _mean(samples: Iterator[Sample], name: str) -> Sample:
    found = list(samples)
    if not found:
        raise Mistake(f"stage {name}: none of the first {LOOKED_AT} samples can be learned from")
    return Sample(*(mean(column) for column in zip(*found, strict=True)))


def operations_of(flops: StepFlops, sample: Sample) -> float:
    """Return the operations of a sample, forward and backward."""
    pairs = sample.length * (sample.length + 1) / 2
    return (
        flops.position * sample.length
        + flops.pair * pairs
        + flops.supervised * sample.supervised
        + flops.image * sample.images
    )


def _again(vlm: VLM, sample: Sample) -> dict[str, float]:
    """Return what each way repeats: the forward pass of what `recompute` and gradients reach.

    `selective` keeps the products of decoder layers; a tower and a connector know all or nothing.
    """
    tower_trains = any(one.requires_grad for one in vlm.vision.parameters())
    with untrained(vlm):
        forward = step_flops(vlm)
    seen = (forward.image - (0 if tower_trains else forward.tower)) * sample.images
    layers = forward.position * sample.length + forward.pair * sample.length**2 / 2
    return {"none": 0.0, "selective": seen, "full": seen + layers}
