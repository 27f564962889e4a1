"""A micro-batch: samples packed into rows, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from vlbench.data.sample import LazyImage
from vlbench.data.sample_encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX, EncodedSample


@dataclass(frozen=True)
class ContrastPool:
    """All pairs of a picture and a caption of a global batch, for objectives that compare them.

    Their order follows from their keys: it is the same for any packing and number of processes.
    """

    embeddings: dict[str, Tensor]
    """What `Connector.embed` gave of every pair, `[all pairs, ...]`; it carries no gradient."""
    local_indices: Tensor
    """`[pairs]` int64, which of all pairs are those of the micro-batch."""
    pair_keys: list[str]
    """Of each pair of the micro-batch, what tells it from all others; seeds follow from it."""
    gather_features: Callable[[Tensor], Tensor]
    """Called with numbers of pairs `[wanted]`, gives the features of their pictures `[wanted,
    patches, vision_width]`. All processes have to call it equally often, if only for none."""


@dataclass
class PackedBatch:
    """A micro-batch. Attention never crosses samples; padding is at the end of a row."""

    input_ids: Tensor
    """`[rows, length]` int64 token ids, IMAGE at places, 0 at padding."""
    labels: Tensor | None
    """`[rows, length]` next-token targets, IGNORE where unsupervised; None for generation."""
    position_ids: Tensor
    """`[rows, length]`, restarting at 0 for every sample."""
    sample_index: Tensor
    """`[rows, length]` index into `sample_id`, -1 at padding."""
    image_index: Tensor
    """`[rows, length]` index into `pixels`: the image that a place fills, and for text the nearest
    image before it in the same sample; -1 for none."""
    pixels: Tensor
    """`[images, 3, height, width]` in the order of the places."""
    sample_ids: list[str]
    """Identity of each sample (`Sample.identity`, not its id), in the order of the rows."""
    sample_lengths: list[list[int]]
    """The sample lengths of every row in order, padding not counted; Python numbers, so that
    reading them never waits for a device."""
    supervised_token_count: int
    """Number of supervised positions."""
    image_ids: list[str] = field(default_factory=list)
    """Identity of each image of `pixels`: its sample and its number there."""
    features: Tensor | None = None
    """`[images, patches, vision_width]`, what a frozen tower made of the pictures, when that is
    known; `pixels` are then of size 0."""
    captions: list[str] = field(default_factory=list)
    """The first answer of each sample, for objectives that read text in a way of their own."""
    supervised_positions: Tensor | None = None
    """`[tokens]` where in the flattened `ids` the labels are; found before the batch travels, for a
    GPU that has to count would make everybody wait. None: not found yet."""
    image_positions: Tensor | None = None
    """Where in the flattened `ids` the places are, likewise."""
    stream_index: list[int] = field(default_factory=list)
    """Where each sample stands in the stream of its stage: it tells apart what has the same id."""
    contrast_pool: ContrastPool | None = None
    """The pairs of the global batch, in a step whose objective compares pairs."""

    def sample_keys(self) -> list[str]:
        """Return what tells each sample from all others of the step, however it is packed."""
        if not self.stream_index:
            return self.sample_ids
        return [
            f"{index} {name}"
            for index, name in zip(self.stream_index, self.sample_ids, strict=True)
        ]

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        non_blocking: bool = True,
    ) -> PackedBatch:
        """Return the batch on `device`, its pixels as `dtype`."""
        moved = self.locate_positions()._map_tensors(
            lambda tensor: tensor.to(device, non_blocking=non_blocking)
        )
        return moved if dtype is None else replace(moved, pixels=moved.pixels.to(dtype))

    def locate_positions(self) -> PackedBatch:
        """Return the batch with `supervised` and `places`; a batch on a GPU stays as it is."""
        if self.input_ids.device.type != "cpu":
            return self
        supervised, labels = self.supervised_positions, self.labels
        if supervised is None and labels is not None:
            supervised = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
        places = self.image_positions
        if places is None:
            places = (self.input_ids.flatten() == IMAGE_TOKEN_INDEX).nonzero()[:, 0]
        return replace(self, supervised_positions=supervised, image_positions=places)

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory, from which copies to a GPU do not wait."""
        return self.locate_positions()._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: function(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def collate(
    rows: Sequence[Sequence[EncodedSample]], load_pixels: Callable[[LazyImage], Tensor]
) -> PackedBatch:
    """Make a batch of rows of samples; shorter rows are padded on the right.

    `pixels_of` gives the pixels `[3, height, width]` of a picture; it is called once per use, in
    the order of the places. Raises ValueError when ids, labels and pictures do not fit together.
    """
    length = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    positions = torch.zeros_like(ids)
    sample_index = torch.full_like(ids, -1)
    image_index = torch.full_like(ids, -1)
    pictures: list[LazyImage] = []
    image_id: list[str] = []
    sample_id: list[str] = []
    captions: list[str] = []
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            _check_encoded(sample)
            at = (number, slice(start, start + len(sample.input_ids)))
            ids[at] = torch.tensor(sample.input_ids)
            labels[at] = torch.tensor(sample.labels)
            positions[at] = torch.arange(len(sample.input_ids))
            sample_index[at] = len(sample_id)
            image_index[at] = assign_image_index(ids[at], sample.tokens_per_image, len(pictures))
            sample_id.append(sample.sample.unique_name)
            captions.append(sample.sample.caption_text)
            shown = sample.sample.images
            image_id += [f"{sample.sample.unique_name} {number}" for number in range(len(shown))]
            pictures += shown
            start += len(sample.input_ids)
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        sample_index=sample_index,
        image_index=image_index,
        pixels=stack_pixels([load_pixels(picture) for picture in pictures]),
        sample_ids=sample_id,
        sample_lengths=[[len(sample.input_ids) for sample in row] for row in rows],
        supervised_token_count=int((labels != IGNORE_INDEX).sum()),
        image_ids=image_id,
        captions=captions,
    )


def _check_encoded(encoded: EncodedSample) -> None:
    name, places = encoded.sample.id, encoded.input_ids.count(IMAGE_TOKEN_INDEX)
    if not encoded.input_ids or len(encoded.input_ids) != len(encoded.labels):
        raise ValueError(f"{name}: {len(encoded.input_ids)} ids, {len(encoded.labels)} labels")
    if places != len(encoded.sample.images) * encoded.tokens_per_image:
        raise ValueError(
            f"{name}: {places} places for {len(encoded.sample.images)} images x "
            f"{encoded.tokens_per_image} tokens"
        )
    if IMAGE_TOKEN_INDEX in encoded.labels:
        raise ValueError(f"{name}: the id of a place is a label")


def assign_image_index(input_ids: Tensor, tokens_per_image: int, first_image: int) -> Tensor:
    """Return the image of each position `[length]`; the sample's images begin at `first`."""
    places = (
        (input_ids == IMAGE_TOKEN_INDEX).long().cumsum(0)
    )  # places up to and with this position
    image = (places + tokens_per_image - 1) // tokens_per_image - 1
    return torch.where(image < 0, image, image + first_image)


def stack_pixels(pixels: list[Tensor]) -> Tensor:
    """Stack the pixels of pictures, `[images, 3, height, width]`; no picture gives no image."""
    return torch.stack(pixels) if pixels else torch.zeros(0, 3, 0, 0)


def empty_batch(like: PackedBatch | None = None) -> PackedBatch:
    """Return a micro-batch of weight 0: one token without a label, no image.

    A rank that has fewer micro-batches than the others runs it, so that all meet in the
    collectives. `like` gives device and pixel type.
    """
    zero = torch.zeros(1, 1, dtype=torch.long, device=like.input_ids.device if like else None)
    return PackedBatch(
        input_ids=zero,
        labels=torch.full_like(zero, IGNORE_INDEX),
        position_ids=zero,
        sample_index=zero,
        image_index=torch.full_like(zero, -1),
        pixels=like.pixels[:0] if like else torch.zeros(0, 3, 0, 0),
        sample_ids=["(empty)"],
        sample_lengths=[[1]],
        supervised_token_count=0,
    )


def pack_samples(encoded: Sequence[EncodedSample], max_tokens_per_row: int) -> list[list[int]]:
    """Put samples into as few rows as first-fit decreasing finds; returns indices into `encoded`.

    No row exceeds `max_tokens_per_row`, except that a longer sample gets a row of its own.
    Deterministic:
    equal lengths keep their order, a row is in ascending order, rows follow their first sample.
    """
    lengths = [len(sample.input_ids) for sample in encoded]
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = (row for row, free in enumerate(room) if free >= lengths[index])
        row = next(fitting, None)
        if row is None:
            rows.append([])
            room.append(max_tokens_per_row)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    return sorted(sorted(row) for row in rows)
