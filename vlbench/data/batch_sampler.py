"""Optimizer steps as a dataset: step n is a pure function of (seed, n, rank, world size)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlbench.data.feature_store import FeatureStore
from vlbench.data.image_processing import ImageTransform
from vlbench.data.image_tiling import count_views
from vlbench.data.optimizer_step import LoadedRow, OptimizerStep, RowPlan, StepPlan
from vlbench.data.packing import PackedBatch, collate, pack_samples
from vlbench.data.sample import LazyImage, Sample
from vlbench.data.sample_encoding import EncodedSample, NoImage, SampleEncoder
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import BadSample, UserError

PixelsByImage = dict[LazyImage, "Tensor | UserError"]
"""The uint8 pixels `[3, height, width]` of images that were opened, or why they cannot be; of a
`TiledImage` they are `[views, 3, height, width]`."""


@dataclass(kw_only=True, eq=False)
class StepDataset(Dataset[OptimizerStep]):
    """The optimizer steps of a stage as one rank computes them.

    Step n takes positions n * global_batch_size to (n + 1) * global_batch_size - 1 of the stream,
    of which this rank takes every `world_size`-th. It encodes them and packs them into rows of at
    most `max_tokens_per_row` tokens; every row is a micro-batch. A bad sample is left out and
    reported: before packing if its text tells, out of its row if an image cannot be opened.

    Args:
        mixture: the stream of samples.
        encoder: turns a sample into token ids and labels.
        image_transform: turns an image into pixels.
        global_batch_size: samples per step over all ranks.
        max_tokens_per_row: tokens of a packed row; a longer sample gets a row of its own.
        total_steps: steps of the stage.
        rank: of this process, from 0.
        world_size: number of ranks.
        feature_store: cached features of a frozen vision encoder; an image in it is not opened.
    """

    mixture: SourceMixture
    encoder: SampleEncoder
    image_transform: ImageTransform
    global_batch_size: int
    max_tokens_per_row: int
    total_steps: int
    rank: int = 0
    world_size: int = 1
    feature_store: FeatureStore | None = None
    _planned_samples: dict[int, EncodedSample] = field(default_factory=dict, init=False, repr=False)
    """The samples of the newest plan by position: a process that loads its rows, too, has them."""

    def __post_init__(self) -> None:
        self.encoder = self.encoder.with_token_cache()

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, index: int) -> OptimizerStep:
        """Return step `index` with all of its micro-batches."""
        plan = self.plan_step(index)
        step = OptimizerStep(index, [], plan.bad_samples, plan.skipped_samples)
        opened: PixelsByImage = {}
        for row in plan.rows:
            loaded = self.load_row(row, opened)
            step.bad_samples += loaded.bad_samples
            step.micro_batches += [loaded.batch] if loaded.batch else []
        return step

    def plan_step(self, index: int) -> StepPlan:
        """Return step `index` without opening an image."""
        if not 0 <= index < self.total_steps:
            raise IndexError(f"step {index} of {self.total_steps}")
        plan = StepPlan(index)
        self._planned_samples = self._encode_step(plan)
        positions, samples = list(self._planned_samples), list(self._planned_samples.values())
        plan.rows = [
            RowPlan(
                [positions[i] for i in row],
                [len(samples[i].input_ids) for i in row],
                sum(len(samples[i].sample.images) for i in row),
                sum(samples[i].view_count for i in row),
                sum(samples[i].supervised_token_count for i in row),
                sum(samples[i].is_truncated for i in row),
                sum(samples[i].lost_supervised_tokens for i in row),
                sum(samples[i].is_reduced for i in row),
            )
            for row in pack_samples(samples, self.max_tokens_per_row)
        ]
        return plan

    def load_row(self, row: RowPlan, opened: PixelsByImage | None = None) -> LoadedRow:
        """Return a planned row with its pixels; `opened` has the pixels of other rows, if known."""
        opened = {} if opened is None else opened
        loaded = LoadedRow(None)
        usable: dict[int, EncodedSample] = {}
        for position in row.stream_index:
            try:
                usable[position] = self._load_sample(position, opened)
            except BadSample as bad:
                loaded.bad_samples.append(bad)
        if usable:
            batch = self._collate_row(list(usable.values()), opened)
            loaded.batch = replace(batch, stream_index=list(usable))
        return loaded

    def _encode_step(self, plan: StepPlan) -> dict[int, EncodedSample]:
        """Encode the samples of a step, by their position in the stream; record refused ones."""
        encoded = {}
        first = plan.index * self.global_batch_size
        for position in range(first + self.rank, first + self.global_batch_size, self.world_size):
            try:
                encoded[position] = self._encode_sample(self.mixture[position])
            except NoImage:
                plan.skipped_samples += 1
            except BadSample as bad:
                plan.bad_samples.append(bad)
        return encoded

    def _encode_sample(self, sample: Sample) -> EncodedSample:
        try:
            return self.encoder.encode(sample)
        except BadSample as bad:
            raise bad.with_origin_of(sample) from bad.__cause__

    def _load_sample(self, position: int, opened: PixelsByImage) -> EncodedSample:
        """Return a sample whose images are all in `opened`, or raise BadSample."""
        encoded = self._planned_samples.pop(position, None)
        if encoded is None:  # another process has planned the step
            encoded = self._encode_sample(self.mixture[position])
        for image in encoded.sample.images:
            if self.feature_store is None or image not in self.feature_store.locations:
                try:
                    self._open_image(image, opened)
                except UserError as error:
                    bad = BadSample(encoded.sample.id, str(error))
                    raise bad.with_origin_of(encoded.sample) from error
        return encoded

    def _open_image(self, image: LazyImage, opened: PixelsByImage) -> Tensor:
        """Return the pixels of an image, which is opened once, or raise its UserError."""
        if image not in opened:
            try:
                opened[image] = self.image_transform.load_levels(image)
            except UserError as error:
                opened[image] = error
        pixels = opened[image]
        if isinstance(pixels, UserError):
            raise pixels
        return pixels

    def _collate_row(self, row: Sequence[EncodedSample], opened: PixelsByImage) -> PackedBatch:
        """Make a micro-batch of one row, with cached features if all of its images have them."""
        images = [image for encoded in row for image in encoded.sample.images]
        features = self.feature_store.load_features(images) if self.feature_store else None
        if features is None:
            batch = collate([row], lambda image: self._open_image(image, opened))
            return replace(batch, level_values=self.image_transform.level_values())
        return replace(collate([row], _empty_pixels), features=features)


def _empty_pixels(image: LazyImage) -> Tensor:
    return torch.zeros(count_views(image), 3, 0, 0)
