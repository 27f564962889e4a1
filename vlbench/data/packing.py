"""Packing: samples end to end in rows, and a micro-batch of such rows as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from vlbench.data.batch_images import (
    assign_image_index,
    join_views,
    name_views,
    repeat_by_view,
    stack_pixels,
    stack_questions,
)
from vlbench.data.sample import LazyImage
from vlbench.data.sample_encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX, EncodedSample


@dataclass(frozen=True)
class ContrastPool:
    """All image-caption pairs of a global batch, for contrastive objectives.

    Their order follows from their keys: it is the same for any packing and number of processes.
    """

    embeddings: dict[str, Tensor]
    """What `Connector.contrast_embeddings` returned for every pair, `[all pairs, ...]`, without
    gradient."""
    local_indices: Tensor
    """`[pairs]` int64, which of all pairs are those of the micro-batch."""
    pair_keys: list[str]
    """The unique key of each pair of the micro-batch; random seeds are derived from it."""
    gather_features: Callable[[Tensor], Any]
    """Takes indices of pairs `[wanted]`, returns the features of their images `[wanted, patches,
    vision_width]`, as the connector reads them. A collective: every process must call it equally
    often, if only for no pair."""


@dataclass
class PackedBatch:
    """A micro-batch. Attention never crosses samples; padding is at the end of a row."""

    input_ids: Tensor
    """`[rows, length]` int64 token ids, IMAGE_TOKEN_INDEX at image positions, 0 at padding."""
    labels: Tensor | None
    """`[rows, length]` next-token targets, IGNORE_INDEX where unsupervised; None for generation."""
    position_ids: Tensor
    """`[rows, length]`, restarting at 0 for every sample."""
    sample_index: Tensor
    """`[rows, length]` index into `sample_ids`, -1 at padding."""
    image_index: Tensor
    """`[rows, length]` the images of the batch in their order: at an image position its image, at
    text the nearest image before it in the same sample; -1 for none. Its views are at
    `view_bounds`; where these are None, an image is a row of `pixels`."""
    pixels: Tensor
    """`[views, 3, height, width]` in the order of images, one view of each unless it is tiled:
    normalised, or the uint8 levels of the image, of which `level_values` has the normalised
    values."""
    sample_ids: list[str]
    """The unique name of each sample (`Sample.unique_name`, not its id), in the order of rows."""
    sample_lengths: list[list[int]]
    """The sample lengths of every row in order, padding not counted; Python numbers, so that
    reading them never synchronizes with a device."""
    supervised_token_count: int
    """Number of supervised positions."""
    image_ids: list[str] = field(default_factory=list)
    """The unique name of each view in `pixels`: its sample, its image's number there, and, of a
    tiled image, its own."""
    features: Tensor | None = None
    """`[views, patches, vision_width]`, cached output of a frozen vision encoder, or None;
    `pixels` are then of size 0. Of several levels it is `[views, levels, patches, vision_width]`
    (`vlbench.connector.levels.stack_levels`)."""
    level_values: Tensor | None = None
    """`[3, 256]` float32, the normalised value of each level of each channel, for uint8 pixels."""
    captions: list[str] = field(default_factory=list)
    """The `caption_text` of each sample, for objectives that tokenize text themselves."""
    supervised_positions: Tensor | None = None
    """`[tokens]` the positions in the flattened `input_ids` that have a label. They are computed
    before the batch moves to a GPU, where counting would synchronize. None: not computed yet."""
    image_positions: Tensor | None = None
    """The image positions in the flattened `input_ids`, likewise."""
    truncated_samples: int = 0
    """Samples whose end was cut off at `language.max_length`."""
    lost_supervised_tokens: int = 0
    """Supervised tokens of these ends."""
    stream_index: list[int] = field(default_factory=list)
    """The position of each sample in the stream of its stage: unique even where ids repeat."""
    contrast_pool: ContrastPool | None = None
    """The pairs of the global batch, in a step with a contrastive objective."""
    question_ids: Tensor | None = None
    """`[views, length]` int64 token ids of the text of the human turn that shows each view, -1 at
    padding, which is on the right; None where the connector reads none."""
    visual_index: Tensor | None = None
    """`[image positions]` int64, the visual token of each, counted over the batch's
    `[views x tokens_per_image]`; NEWLINE_INDEX for the learned newline. None: they are in order,
    one view of each image."""
    view_bounds: Tensor | None = None
    """`[images + 1]` int64: the views of image i are `view_bounds[i]` to `view_bounds[i + 1] - 1`.
    None: each image has one."""
    patch_grids: list[tuple[int, int]] | None = None
    """Rows and columns of the patches of each image, where images keep their aspect ratios and
    `pixels` are their sheets (`vlbench.data.native_aspect`); Python numbers, as `sample_lengths`.
    None: views are squares of pixels, or there is no image."""
    reduced_samples: int = 0
    """Samples with fewer tiles than they could have, for `vision.max_visual_tokens`."""

    @property
    def image_count(self) -> int:
        """Number of images."""
        return len(self.pixels) if self.view_bounds is None else len(self.view_bounds) - 1

    @property
    def view_count(self) -> int:
        """Number of views in `pixels`, which the vision encoder sees."""
        return len(self.pixels)

    def sample_keys(self) -> list[str]:
        """Return a key for each sample that is unique in the step, however it is packed."""
        if not self.stream_index:
            return self.sample_ids
        pairs = zip(self.stream_index, self.sample_ids, strict=True)
        return [f"{index} {name}" for index, name in pairs]

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        non_blocking: bool = True,
    ) -> PackedBatch:
        """Return the batch on `device`, its pixels normalised and as `dtype` if that is given."""
        moved = self.locate_positions()._map_tensors(
            lambda tensor: tensor.to(device, non_blocking=non_blocking)
        )
        if dtype is None:
            return moved
        return replace(moved, pixels=moved.normalized_pixels().to(dtype))

    def normalized_pixels(self) -> Tensor:
        """Return the pixels as the vision encoder takes them, on the device that they are on."""
        if self.pixels.dtype is not torch.uint8:
            return self.pixels
        assert self.level_values is not None
        return normalize_levels(self.pixels, self.level_values)

    def locate_positions(self) -> PackedBatch:
        """Return the batch with `supervised_positions` and `image_positions`.

        A batch on a GPU is returned unchanged.
        """
        if self.input_ids.device.type != "cpu":
            return self
        supervised, labels = self.supervised_positions, self.labels
        if supervised is None and labels is not None:
            supervised = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
        return replace(
            self, supervised_positions=supervised, image_positions=self.find_image_positions()
        )

    def find_image_positions(self) -> Tensor:
        """Return the image positions in the flattened `input_ids`, looked for if not yet known."""
        if self.image_positions is not None:
            return self.image_positions
        return (self.input_ids.flatten() == IMAGE_TOKEN_INDEX).nonzero()[:, 0]

    def from_image(self, first: int, end: int | None = None) -> PackedBatch:
        """Return the batch with the pixels and questions of its views `first` to `end` alone."""
        ids, grids = self.question_ids, self.patch_grids
        return replace(
            self,
            pixels=self.pixels[first:end],
            patch_grids=None if grids is None else grids[first:end],
            question_ids=None if ids is None else ids[first:end],
        )

    def list_view_bounds(self) -> list[int]:
        """Return the first view of each image, and the number of all views, as Python numbers.

        On a GPU it waits for the device.
        """
        if self.view_bounds is None:
            return list(range(len(self.pixels) + 1))
        bounds: list[int] = self.view_bounds.tolist()
        return bounds

    def question_rows(self) -> list[list[int]]:
        """Return the ids of each image's question without padding; [] where none is read."""
        rows = [] if self.question_ids is None else self.question_ids.tolist()
        return [[token_id for token_id in row if token_id >= 0] for row in rows]

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self.locate_positions()._map_tensors(lambda tensor: tensor.pin_memory())

    def without_tensors(self) -> PackedBatch:
        """Return what is to be said about the batch once it is done: names, lengths and counts.

        Its tensors are empty, but for `view_bounds`; `pixels` still has a row for each view.
        """
        outline = self._map_tensors(lambda tensor: tensor.new_empty(0))
        pixels = self.pixels.new_empty(len(self.pixels), 3, 0, 0)
        return replace(outline, pixels=pixels, view_bounds=self.view_bounds)

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

    `load_pixels` returns the pixels `[3, height, width]` of an image, of a `TiledImage`
    `[views, 3, height, width]`; it is called once per use, in the order of the image positions.
    Raises ValueError when ids, labels and images do not match.
    """
    length = max(sum(len(encoded.input_ids) for encoded in row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    position_ids = torch.zeros_like(input_ids)
    sample_index = torch.full_like(input_ids, -1)
    image_index = torch.full_like(input_ids, -1)
    images: list[LazyImage] = []
    image_ids: list[str] = []
    sample_ids: list[str] = []
    captions: list[str] = []
    for row_number, row in enumerate(rows):
        start = 0
        for encoded in row:
            _check_encoded(encoded)
            end = start + len(encoded.input_ids)
            span = (row_number, slice(start, end))
            input_ids[span] = torch.tensor(encoded.input_ids)
            labels[span] = torch.tensor(encoded.labels)
            position_ids[span] = torch.arange(end - start)
            sample_index[span] = len(sample_ids)
            image_index[span] = assign_image_index(
                input_ids[span], encoded.image_lengths or encoded.tokens_per_image, len(images)
            )
            name = encoded.sample.unique_name
            sample_ids.append(name)
            captions.append(encoded.sample.caption_text)
            image_ids += name_views(name, encoded.sample.images)
            images += encoded.sample.images
            start = end
    return PackedBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        sample_index=sample_index,
        image_index=image_index,
        pixels=stack_pixels([load_pixels(image) for image in images]),
        sample_ids=sample_ids,
        sample_lengths=[[len(encoded.input_ids) for encoded in row] for row in rows],
        supervised_token_count=int((labels != IGNORE_INDEX).sum()),
        image_ids=image_ids,
        captions=captions,
        truncated_samples=sum(encoded.is_truncated for row in rows for encoded in row),
        lost_supervised_tokens=sum(e.lost_supervised_tokens for row in rows for e in row),
        question_ids=stack_questions(
            [repeat_by_view(e.questions, e.sample.images) for row in rows for e in row]
        ),
        reduced_samples=sum(encoded.is_reduced for row in rows for encoded in row),
        **join_views(
            [(e.sample.images, e.visual_index) for row in rows for e in row],
            rows[0][0].tokens_per_image,
        ),
    )


def _check_encoded(encoded: EncodedSample) -> None:
    name, image_positions = encoded.sample.id, encoded.input_ids.count(IMAGE_TOKEN_INDEX)
    if not encoded.input_ids or len(encoded.input_ids) != len(encoded.labels):
        raise ValueError(f"{name}: {len(encoded.input_ids)} ids, {len(encoded.labels)} labels")
    if image_positions != encoded.image_position_count:
        raise ValueError(
            f"{name}: {image_positions} image positions for {len(encoded.sample.images)} images x "
            f"{encoded.tokens_per_image} tokens"
        )
    if IMAGE_TOKEN_INDEX in encoded.labels:
        raise ValueError(f"{name}: the id of an image position is a label")


def number_image_tokens(batch: PackedBatch, tokens_per_image: int) -> Tensor:
    """Return `[rows, length]`: at an image position its number within its view, elsewhere -1.

    It is -1 at a newline, too.
    """
    positions = batch.find_image_positions()
    if batch.visual_index is None:
        numbers = torch.arange(len(positions), device=positions.device) % tokens_per_image
    else:
        index = batch.visual_index
        numbers = torch.where(index < 0, index, index % tokens_per_image)
    return _at_positions(batch, positions, numbers)


def number_image_views(batch: PackedBatch, tokens_per_image: int) -> Tensor | None:
    """Return `[rows, length]`: the view in `pixels` at an image position, elsewhere -1.

    It is -1 at a newline, too. None where images are not tiled: there it is the image.
    """
    if batch.visual_index is None:
        return None
    index = batch.visual_index
    views = torch.where(index < 0, index, index.div(tokens_per_image, rounding_mode="floor"))
    return _at_positions(batch, batch.find_image_positions(), views)


def _at_positions(batch: PackedBatch, positions: Tensor, values: Tensor) -> Tensor:
    """Return `[rows, length]` with `values` at `positions`, and -1 elsewhere."""
    spread = batch.input_ids.new_full((batch.input_ids.numel(),), -1)
    spread[positions] = values
    return spread.view(batch.input_ids.shape)


def normalize_levels(levels: Tensor, level_values: Tensor) -> Tensor:
    """Return the normalised values of uint8 pixels `[images, 3, height, width]`.

    They are looked up in `level_values` `[3, 256]`: the same bits on every device, whatever its
    arithmetic makes of a division, and a quarter of the bytes on the way to it.
    """
    channel_starts = torch.arange(0, level_values.numel(), 256, device=levels.device)
    return level_values.flatten().take(levels.long() + channel_starts[:, None, None])


def pack_samples(encoded: Sequence[EncodedSample], max_tokens_per_row: int) -> list[list[int]]:
    """Pack samples into rows by first-fit decreasing; return indices into `encoded` per row.

    No row exceeds `max_tokens_per_row`, except that a longer sample gets a row of its own.
    Deterministic: equal lengths keep their order, a row is in ascending order, and rows are sorted
    by their first sample.
    """
    lengths = [len(sample.input_ids) for sample in encoded]
    rows: list[list[int]] = []
    free_tokens: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = (row for row, free in enumerate(free_tokens) if free >= lengths[index])
        row = next(fitting, None)
        if row is None:
            rows.append([])
            free_tokens.append(max_tokens_per_row)
            row = len(rows) - 1
        rows[row].append(index)
        free_tokens[row] -= lengths[index]
    return sorted(sorted(row) for row in rows)
