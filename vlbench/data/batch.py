"""A micro-batch: samples packed into rows, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from vlbench.data.sample import IGNORE, IMAGE, Encoded, Picture


@dataclass(frozen=True)
class Pool:
    """All pairs of a picture and a caption of a global batch, for objectives that compare them.

    Their order follows from their keys: it is the same for any packing and number of processes.
    """

    rows: dict[str, Tensor]
    """What `Connector.embed` gave of every pair, `[all pairs, ...]`; it carries no gradient."""
    own: Tensor
    """`[pairs]` int64, which of all pairs are those of the micro-batch."""
    keys: list[str]
    """Of each pair of the micro-batch, what tells it from all others; seeds follow from it."""
    features: Callable[[Tensor], Tensor]
    """Called with numbers of pairs `[wanted]`, gives the features of their pictures `[wanted,
    patches, vision_width]`. All processes have to call it equally often, if only for none."""


@dataclass
class Batch:
    """A micro-batch. Attention never crosses samples; padding is at the end of a row."""

    ids: Tensor
    """`[rows, length]` int64 token ids, IMAGE at places, 0 at padding."""
    labels: Tensor | None
    """`[rows, length]` next-token targets, IGNORE where unsupervised; None for generation."""
    positions: Tensor
    """`[rows, length]`, restarting at 0 for every sample."""
    sample_index: Tensor
    """`[rows, length]` index into `sample_id`, -1 at padding."""
    image_index: Tensor
    """`[rows, length]` index into `pixels`: the image that a place fills, and for text the nearest
    image before it in the same sample; -1 for none."""
    pixels: Tensor
    """`[images, 3, height, width]` in the order of the places."""
    sample_id: list[str]
    """Identity of each sample (`Sample.identity`, not its id), in the order of the rows."""
    lengths: list[list[int]]
    """The sample lengths of every row in order, padding not counted; Python numbers, so that
    reading them never waits for a device."""
    tokens: int
    """Number of supervised positions."""
    image_id: list[str] = field(default_factory=list)
    """Identity of each image of `pixels`: its sample and its number there."""
    features: Tensor | None = None
    """`[images, patches, vision_width]`, what a frozen tower made of the pictures, when that is
    known; `pixels` are then of size 0."""
    captions: list[str] = field(default_factory=list)
    """The first answer of each sample, for objectives that read text in a way of their own."""
    supervised: Tensor | None = None
    """`[tokens]` where in the flattened `ids` the labels are; found before the batch travels, for a
    GPU that has to count would make everybody wait. None: not found yet."""
    places: Tensor | None = None
    """Where in the flattened `ids` the places are, likewise."""
    stream_index: list[int] = field(default_factory=list)
    """Where each sample stands in the stream of its stage: it tells apart what has the same id."""
    pool: Pool | None = None
    """The pairs of the global batch, in a step whose objective compares pairs."""

    def keys(self) -> list[str]:
        """Return what tells each sample from all others of the step, however it is packed."""
        if not self.stream_index:
            return self.sample_id
        return [
            f"{index} {name}" for index, name in zip(self.stream_index, self.sample_id, strict=True)
        ]

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        non_blocking: bool = True,
    ) -> Batch:
        """Return the batch on `device`, its pixels as `dtype`."""
        moved = self.located()._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved if dtype is None else replace(moved, pixels=moved.pixels.to(dtype))

    def located(self) -> Batch:
        """Return the batch with `supervised` and `places`; a batch on a GPU stays as it is."""
        if self.ids.device.type != "cpu":
            return self
        supervised, labels = self.supervised, self.labels
        if supervised is None and labels is not None:
            supervised = (labels.flatten() != IGNORE).nonzero()[:, 0]
        places = self.places
        if places is None:
            places = (self.ids.flatten() == IMAGE).nonzero()[:, 0]
        return replace(self, supervised=supervised, places=places)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU do not wait."""
        return self.located()._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: change(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def collate(rows: Sequence[Sequence[Encoded]], pixels_of: Callable[[Picture], Tensor]) -> Batch:
    """Make a batch of rows of samples; shorter rows are padded on the right.

    `pixels_of` gives the pixels `[3, height, width]` of a picture; it is called once per use, in
    the order of the places. Raises ValueError when ids, labels and pictures do not fit together.
    """
    length = max(sum(len(sample.ids) for sample in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    positions = torch.zeros_like(ids)
    sample_index = torch.full_like(ids, -1)
    image_index = torch.full_like(ids, -1)
    pictures: list[Picture] = []
    image_id: list[str] = []
    sample_id: list[str] = []
    captions: list[str] = []
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            _validate(sample)
            at = (number, slice(start, start + len(sample.ids)))
            ids[at] = torch.tensor(sample.ids)
            labels[at] = torch.tensor(sample.labels)
            positions[at] = torch.arange(len(sample.ids))
            sample_index[at] = len(sample_id)
            image_index[at] = image_of(ids[at], sample.tokens_per_image, len(pictures))
            sample_id.append(sample.sample.identity)
            captions.append(sample.sample.caption)
            shown = sample.sample.pictures
            image_id += [f"{sample.sample.identity} {number}" for number in range(len(shown))]
            pictures += shown
            start += len(sample.ids)
    return Batch(
        ids=ids,
        labels=labels,
        positions=positions,
        sample_index=sample_index,
        image_index=image_index,
        pixels=stack([pixels_of(picture) for picture in pictures]),
        sample_id=sample_id,
        lengths=[[len(sample.ids) for sample in row] for row in rows],
        tokens=int((labels != IGNORE).sum()),
        image_id=image_id,
        captions=captions,
    )


def _validate(sample: Encoded) -> None:
    name, places = sample.sample.id, sample.ids.count(IMAGE)
    if not sample.ids or len(sample.ids) != len(sample.labels):
        raise ValueError(f"{name}: {len(sample.ids)} ids, {len(sample.labels)} labels")
    if places != len(sample.sample.pictures) * sample.tokens_per_image:
        raise ValueError(
            f"{name}: {places} places for {len(sample.sample.pictures)} images x "
            f"{sample.tokens_per_image} tokens"
        )
    if IMAGE in sample.labels:
        raise ValueError(f"{name}: the id of a place is a label")


def image_of(ids: Tensor, tokens_per_image: int, first: int) -> Tensor:
    """Return the image of each position `[length]`; the sample's images begin at `first`."""
    places = (ids == IMAGE).long().cumsum(0)  # places up to and with this position
    image = (places + tokens_per_image - 1) // tokens_per_image - 1
    return torch.where(image < 0, image, image + first)


def stack(pixels: list[Tensor]) -> Tensor:
    """Stack the pixels of pictures, `[images, 3, height, width]`; no picture gives no image."""
    return torch.stack(pixels) if pixels else torch.zeros(0, 3, 0, 0)


def empty(like: Batch | None = None) -> Batch:
    """Return a micro-batch of weight 0: one token without a label, no image.

    A rank that has fewer micro-batches than the others runs it, so that all meet in the
    collectives. `like` gives device and pixel type.
    """
    zero = torch.zeros(1, 1, dtype=torch.long, device=like.ids.device if like else None)
    return Batch(
        ids=zero,
        labels=torch.full_like(zero, IGNORE),
        positions=zero,
        sample_index=zero,
        image_index=torch.full_like(zero, -1),
        pixels=like.pixels[:0] if like else torch.zeros(0, 3, 0, 0),
        sample_id=["(empty)"],
        lengths=[[1]],
        tokens=0,
    )


def pack(encoded: Sequence[Encoded], row_tokens: int) -> list[list[int]]:
    """Put samples into as few rows as first-fit decreasing finds; returns indices into `encoded`.

    No row exceeds `row_tokens`, except that a longer sample gets a row of its own. Deterministic:
    equal lengths keep their order, a row is in ascending order, rows follow their first sample.
    """
    lengths = [len(sample.ids) for sample in encoded]
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = (row for row, free in enumerate(room) if free >= lengths[index])
        row = next(fitting, None)
        if row is None:
            rows.append([])
            room.append(row_tokens)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    return sorted(sorted(row) for row in rows)
