"""Optimizer steps as a dataset: step n is a pure function of (seed, n, rank, world)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlbench.data.chat_template import ChatTemplate
from vlbench.data.feature_store import FeatureStore
from vlbench.data.image_processing import ImageTransform
from vlbench.data.packing import PackedBatch, collate, pack_samples
from vlbench.data.sample_encoding import (
    EncodedSample,
    LazyImage,
    NoImage,
    Sample,
    SampleFormat,
    TokenEncoder,
    encode_sample,
)
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import BadSample, UserError


@dataclass
class OptimizerStep:
    """What one rank does in one optimizer step."""

    index: int
    micro_batches: list[PackedBatch]  # micro-batches; empty when every sample was bad
    bad_samples: list[BadSample] = field(default_factory=list)  # left out, with the reason
    skipped_samples: int = 0  # samples without an image in a stage of captions
    sample_count: int = 0  # samples in the batches
    image_count: int = 0  # images in the batches
    text_token_count: int = 0  # positions that are not places
    supervised_token_count: int = 0  # supervised positions

    def pin_memory(self) -> OptimizerStep:
        """Return the step with its batches in page-locked memory."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


@dataclass(kw_only=True, eq=False)
class StepDataset(Dataset[OptimizerStep]):
    """The steps of a stage, `steps[n]`, as one rank sees them.

    A step takes the stream's positions n * batch to (n + 1) * batch - 1, of which this rank takes
    every `world`-th; it encodes them, packs them into rows of at most
    `max_tokens_per_row`, and every row
    is a micro-batch. A bad sample is left out and reported in `Step.bad`.
    """

    mixture: SourceMixture
    chat_template: ChatTemplate
    tokenizer: TokenEncoder
    image_transform: ImageTransform
    tokens_per_image: int
    max_length: int
    sample_format: SampleFormat
    global_batch_size: int  # samples per step over all ranks
    max_tokens_per_row: int
    total_steps: int  # steps of the stage
    rank: int = 0
    world_size: int = 1
    feature_store: FeatureStore | None = (
        None  # of a frozen tower: pictures that it has are not opened
    )

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, CachedTokenizer):
            self.tokenizer = CachedTokenizer(self.tokenizer)

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, index: int) -> OptimizerStep:
        """Make step `index`."""
        if not 0 <= index < self.total_steps:
            raise IndexError(f"step {index} of {self.total_steps}")
        step = OptimizerStep(index, [])
        encoded = self._encode_step(step)
        pixels = _PixelCache(self.image_transform, list(encoded.values()))
        sound = {n: one for n, one in encoded.items() if self._can_open_images(one, pixels, step)}
        positions, samples = list(sound), list(sound.values())
        for row in pack_samples(samples, self.max_tokens_per_row):
            batch = self._collate_row([samples[i] for i in row], pixels)
            batch = replace(batch, stream_index=[positions[i] for i in row])
            step.micro_batches.append(batch)
            places = sum(len(samples[i].sample.images) * self.tokens_per_image for i in row)
            step.sample_count += len(row)
            step.image_count += len(batch.pixels)
            step.text_token_count += sum(batch.sample_lengths[0]) - places
            step.supervised_token_count += batch.supervised_token_count
        return step

    def _encode_step(self, step: OptimizerStep) -> dict[int, EncodedSample]:
        """Encode the samples of a step, by their position in the stream; note refused ones."""
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
            return encode_sample(
                sample,
                self.chat_template,
                self.tokenizer,
                self.tokens_per_image,
                self.max_length,
                self.sample_format,
            )
        except BadSample as bad:
            raise bad.with_origin_of(sample) from bad.__cause__

    def _can_open_images(
        self, encoded: EncodedSample, pixels: _PixelCache, step: OptimizerStep
    ) -> bool:
        """Make the pixels of a sample; tell whether all its pictures could be opened."""
        try:
            for picture in encoded.sample.images:
                if self.feature_store is None or picture not in self.feature_store.locations:
                    pixels.load_pixels(picture)
        except UserError as mistake:
            step.bad_samples.append(
                BadSample(encoded.sample.id, str(mistake)).with_origin_of(encoded.sample)
            )
            return False
        return True

    def _collate_row(self, row: list[EncodedSample], pixels: _PixelCache) -> PackedBatch:
        """Make a micro-batch of one row, with features where all of its pictures have them."""
        pictures = [picture for sample in row for picture in sample.sample.images]
        features = self.feature_store.load_features(pictures) if self.feature_store else None
        if features is None:
            return collate([row], pixels)
        return replace(collate([row], _empty_pixels), features=features)


def _empty_pixels(_: LazyImage) -> Tensor:
    return torch.zeros(3, 0, 0)


class CachedTokenizer:
    """A tokenizer that remembers texts: the system prompt opens every conversation."""

    def __init__(self, tokenizer: TokenEncoder) -> None:
        """Remember what `tokenizer` answers."""
        self.tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_token_id
        self._cached_encode = functools.lru_cache(maxsize=4096)(self._encode_tuple)

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of a text."""
        return self._cached_encode(text)

    def check_token_ids(self, ids: Sequence[int]) -> None:
        """Raise a Mistake for an id that the model has no embedding for."""
        self.tokenizer.check_token_ids(ids)

    def _encode_tuple(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def __reduce__(self) -> tuple[Any, ...]:  # the memory itself cannot travel to a worker
        return CachedTokenizer, (self.tokenizer,)


class _PixelCache:
    """The pixels of a step's pictures: each is opened once, and let go after its last use."""

    def __init__(
        self, image_transform: ImageTransform, encoded_samples: list[EncodedSample]
    ) -> None:
        self._image_transform = image_transform
        self._remaining_uses = Counter(
            p for sample in encoded_samples for p in sample.sample.images
        )
        self._loaded_pixels: dict[LazyImage, Tensor | UserError] = {}

    def load_pixels(self, image: LazyImage) -> None:
        """Open a picture unless that was done; raise its Mistake each time."""
        if image not in self._loaded_pixels:
            try:
                self._loaded_pixels[image] = self._image_transform.load_pixels(image)
            except UserError as mistake:
                self._loaded_pixels[image] = mistake
        made = self._loaded_pixels[image]
        if isinstance(made, UserError):
            raise made

    def __call__(self, image: LazyImage) -> Tensor:
        """Return the pixels `[3, height, width]` of a picture."""
        self.load_pixels(image)
        self._remaining_uses[image] -= 1
        made = (
            self._loaded_pixels[image]
            if self._remaining_uses[image]
            else self._loaded_pixels.pop(image)
        )
        assert not isinstance(made, UserError)
        return made
