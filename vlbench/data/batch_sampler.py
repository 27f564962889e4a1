"""Optimizer steps as a dataset: step n is a pure function of (seed, n, rank, world size)."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlbench.data.feature_store import FeatureStore
from vlbench.data.image_processing import ImageTransform
from vlbench.data.packing import PackedBatch, collate, empty_batch, pack_samples
from vlbench.data.sample import LazyImage, Sample
from vlbench.data.sample_encoding import EncodedSample, NoImage, SampleEncoder
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import BadSample, UserError


@dataclass
class OptimizerStep:
    """What one rank computes in one optimizer step."""

    index: int
    micro_batches: list[PackedBatch]
    """Empty when every sample was bad."""
    bad_samples: list[BadSample] = field(default_factory=list)
    """Samples that are left out, with the reason."""
    skipped_samples: int = 0
    """Samples without an image in a caption stage."""
    sample_count: int = 0
    """Samples in the micro-batches."""
    image_count: int = 0
    """Images in the micro-batches."""
    text_token_count: int = 0
    """Positions that are not image positions."""
    supervised_token_count: int = 0
    """Positions with a label."""

    def pin_memory(self) -> OptimizerStep:
        """Return the step with its batches in page-locked memory."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


@dataclass(kw_only=True, eq=False)
class StepDataset(Dataset[OptimizerStep]):
    """The optimizer steps of a stage as one rank computes them.

    Step n takes positions n * global_batch_size to (n + 1) * global_batch_size - 1 of the stream,
    of which this rank takes every `world_size`-th. It encodes them and packs them into rows of at
    most `max_tokens_per_row` tokens; every row is a micro-batch. A bad sample is left out and
    reported in `OptimizerStep.bad_samples`.

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

    def __post_init__(self) -> None:
        self.encoder = self.encoder.with_token_cache()

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, index: int) -> OptimizerStep:
        """Make step `index`."""
        if not 0 <= index < self.total_steps:
            raise IndexError(f"step {index} of {self.total_steps}")
        step = OptimizerStep(index, [])
        encoded = self._encode_step(step)
        pixel_cache = _PixelCache(self.image_transform, list(encoded.values()))
        usable = {
            position: sample
            for position, sample in encoded.items()
            if self._can_open_images(sample, pixel_cache, step)
        }
        positions, samples = list(usable), list(usable.values())
        for row in pack_samples(samples, self.max_tokens_per_row):
            batch = self._collate_row([samples[i] for i in row], pixel_cache)
            batch = replace(batch, stream_index=[positions[i] for i in row])
            step.micro_batches.append(batch)
            image_positions = sum(samples[i].image_position_count for i in row)
            step.sample_count += len(row)
            step.image_count += len(batch.pixels)
            step.text_token_count += sum(batch.sample_lengths[0]) - image_positions
            step.supervised_token_count += batch.supervised_token_count
        return step

    def densest_row(self, sample_limit: int) -> PackedBatch:
        """Return the micro-batch with most images, and of those most tokens, of the first steps.

        About `sample_limit` samples are looked at, of at least one step; images are opened of the
        returned row alone. Without a sample that can be used it is an empty batch.
        """
        step_samples = -(-self.global_batch_size // self.world_size)
        step_count = min(self.total_steps, -(-sample_limit // step_samples))
        rows: list[list[EncodedSample]] = []
        for index in range(step_count):
            samples = list(self._encode_step(OptimizerStep(index, [])).values())
            packed = pack_samples(samples, self.max_tokens_per_row)
            rows += [[samples[i] for i in row] for row in packed]
        for row in sorted(rows, key=_row_size, reverse=True):
            with contextlib.suppress(UserError):  # training reports what cannot be opened
                return self._collate_row(row, _PixelCache(self.image_transform, row))
        return empty_batch()

    def _encode_step(self, step: OptimizerStep) -> dict[int, EncodedSample]:
        """Encode the samples of a step, by their position in the stream; record refused ones."""
        encoded = {}
        first = step.index * self.global_batch_size
        for position in range(first + self.rank, first + self.global_batch_size, self.world_size):
            try:
                encoded[position] = self._encode_sample(self.mixture[position])
            except NoImage:
                step.skipped_samples += 1
            except BadSample as bad:
                step.bad_samples.append(bad)
        return encoded

    def _encode_sample(self, sample: Sample) -> EncodedSample:
        try:
            return self.encoder.encode(sample)
        except BadSample as bad:
            raise bad.with_origin_of(sample) from bad.__cause__

    def _can_open_images(
        self, encoded: EncodedSample, pixel_cache: _PixelCache, step: OptimizerStep
    ) -> bool:
        """Load the pixels of a sample; tell whether all its images could be opened."""
        try:
            for image in encoded.sample.images:
                if self.feature_store is None or image not in self.feature_store.locations:
                    pixel_cache.load_pixels(image)
        except UserError as error:
            bad = BadSample(encoded.sample.id, str(error))
            step.bad_samples.append(bad.with_origin_of(encoded.sample))
            return False
        return True

    def _collate_row(self, row: list[EncodedSample], pixel_cache: _PixelCache) -> PackedBatch:
        """Make a micro-batch of one row, with cached features if all of its images have them."""
        images = [image for encoded in row for image in encoded.sample.images]
        features = self.feature_store.load_features(images) if self.feature_store else None
        if features is None:
            return collate([row], pixel_cache)
        return replace(collate([row], _empty_pixels), features=features)


def _row_size(row: list[EncodedSample]) -> tuple[int, int]:
    """Return the numbers of images and of positions of a row."""
    images = sum(len(encoded.sample.images) for encoded in row)
    return images, sum(len(encoded.input_ids) for encoded in row)


def _empty_pixels(_: LazyImage) -> Tensor:
    return torch.zeros(3, 0, 0)


class _PixelCache:
    """The pixels of a step's images: each is opened once, and released after its last use."""

    def __init__(
        self, image_transform: ImageTransform, encoded_samples: list[EncodedSample]
    ) -> None:
        self._image_transform = image_transform
        self._remaining_uses = Counter(
            image for encoded in encoded_samples for image in encoded.sample.images
        )
        self._loaded_pixels: dict[LazyImage, Tensor | UserError] = {}

    def load_pixels(self, image: LazyImage) -> Tensor:
        """Return the pixels `[3, height, width]` of an image; raise its UserError each time."""
        if image not in self._loaded_pixels:
            try:
                self._loaded_pixels[image] = self._image_transform.load_pixels(image)
            except UserError as error:
                self._loaded_pixels[image] = error
        pixels = self._loaded_pixels[image]
        if isinstance(pixels, UserError):
            raise pixels
        return pixels

    def __call__(self, image: LazyImage) -> Tensor:
        """Return the pixels `[3, height, width]` of an image, for one of its uses."""
        pixels = self.load_pixels(image)
        self._remaining_uses[image] -= 1
        if not self._remaining_uses[image]:
            del self._loaded_pixels[image]
        return pixels
