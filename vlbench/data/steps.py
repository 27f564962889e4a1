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

from vlbench.data.batch import Batch, collate, pack
from vlbench.data.features import Features
from vlbench.data.images import ImageTransform
from vlbench.data.order import Mixture
from vlbench.data.sample import Encoded, Encoder, Form, NoImage, Picture, Sample, encode
from vlbench.data.template import Template
from vlbench.mistakes import BadSample, Mistake


@dataclass
class Step:
    """What one rank does in one optimizer step."""

    index: int
    batches: list[Batch]  # micro-batches; empty when every sample was bad
    bad: list[BadSample] = field(default_factory=list)  # left out, with the reason
    skipped: int = 0  # samples without an image in a stage of captions
    samples: int = 0  # samples in the batches
    images: int = 0  # images in the batches
    text_tokens: int = 0  # positions that are not places
    tokens: int = 0  # supervised positions

    def pin_memory(self) -> Step:
        """Return the step with its batches in page-locked memory."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


@dataclass(kw_only=True, eq=False)
class Steps(Dataset[Step]):
    """The steps of a stage, `steps[n]`, as one rank sees them.

    A step takes the stream's positions n * batch to (n + 1) * batch - 1, of which this rank takes
    every `world`-th; it encodes them, packs them into rows of at most `row_tokens`, and every row
    is a micro-batch. A bad sample is left out and reported in `Step.bad`.
    """

    mixture: Mixture
    template: Template
    tokenizer: Encoder
    transform: ImageTransform
    tokens_per_image: int
    max_length: int
    form: Form
    batch: int  # samples per step over all ranks
    row_tokens: int
    total: int  # steps of the stage
    rank: int = 0
    world: int = 1
    features: Features | None = None  # of a frozen tower: pictures that it has are not opened

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, Memo):
            self.tokenizer = Memo(self.tokenizer)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Step:
        """Make step `index`."""
        if not 0 <= index < self.total:
            raise IndexError(f"step {index} of {self.total}")
        step = Step(index, [])
        encoded = self._encoded(step)
        pixels = _Pixels(self.transform, list(encoded.values()))
        sound = {n: one for n, one in encoded.items() if self._opens(one, pixels, step)}
        positions, samples = list(sound), list(sound.values())
        for row in pack(samples, self.row_tokens):
            batch = self._collated([samples[i] for i in row], pixels)
            batch = replace(batch, stream_index=[positions[i] for i in row])
            step.batches.append(batch)
            places = sum(len(samples[i].sample.pictures) * self.tokens_per_image for i in row)
            step.samples += len(row)
            step.images += len(batch.pixels)
            step.text_tokens += sum(batch.lengths[0]) - places
            step.tokens += batch.tokens
        return step

    def _encoded(self, step: Step) -> dict[int, Encoded]:
        """Encode the samples of a step, by their position in the stream; note refused ones."""
        encoded = {}
        first = step.index * self.batch
        for position in range(first + self.rank, first + self.batch, self.world):
            try:
                encoded[position] = self._encode(self.mixture[position])
            except NoImage:
                step.skipped += 1
            except BadSample as bad:
                step.bad.append(bad)
        return encoded

    def _encode(self, sample: Sample) -> Encoded:
        try:
            return encode(
                sample,
                self.template,
                self.tokenizer,
                self.tokens_per_image,
                self.max_length,
                self.form,
            )
        except BadSample as bad:
            raise bad.of(sample) from bad.__cause__

    def _opens(self, encoded: Encoded, pixels: _Pixels, step: Step) -> bool:
        """Make the pixels of a sample; tell whether all its pictures could be opened."""
        try:
            for picture in encoded.sample.pictures:
                if self.features is None or picture not in self.features.places:
                    pixels.make(picture)
        except Mistake as mistake:
            step.bad.append(BadSample(encoded.sample.id, str(mistake)).of(encoded.sample))
            return False
        return True

    def _collated(self, row: list[Encoded], pixels: _Pixels) -> Batch:
        """Make a micro-batch of one row, with features where all of its pictures have them."""
        pictures = [picture for sample in row for picture in sample.sample.pictures]
        features = self.features.of(pictures) if self.features else None
        if features is None:
            return collate([row], pixels)
        return replace(collate([row], _nothing), features=features)


def _nothing(_: Picture) -> Tensor:
    return torch.zeros(3, 0, 0)


class Memo:
    """A tokenizer that remembers texts: the system prompt opens every conversation."""

    def __init__(self, tokenizer: Encoder) -> None:
        """Remember what `tokenizer` answers."""
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos
        self._encode = functools.lru_cache(maxsize=4096)(self._ids)

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of a text."""
        return self._encode(text)

    def check(self, ids: Sequence[int]) -> None:
        """Raise a Mistake for an id that the model has no embedding for."""
        self.tokenizer.check(ids)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def __reduce__(self) -> tuple[Any, ...]:  # the memory itself cannot travel to a worker
        return Memo, (self.tokenizer,)


class _Pixels:
    """The pixels of a step's pictures: each is opened once, and let go after its last use."""

    def __init__(self, transform: ImageTransform, encoded: list[Encoded]) -> None:
        self._transform = transform
        self._uses = Counter(p for sample in encoded for p in sample.sample.pictures)
        self._made: dict[Picture, Tensor | Mistake] = {}

    def make(self, picture: Picture) -> None:
        """Open a picture unless that was done; raise its Mistake each time."""
        if picture not in self._made:
            try:
                self._made[picture] = self._transform.of(picture)
            except Mistake as mistake:
                self._made[picture] = mistake
        made = self._made[picture]
        if isinstance(made, Mistake):
            raise made

    def __call__(self, picture: Picture) -> Tensor:
        """Return the pixels `[3, height, width]` of a picture."""
        self.make(picture)
        self._uses[picture] -= 1
        made = self._made[picture] if self._uses[picture] else self._made.pop(picture)
        assert not isinstance(made, Mistake)
        return made
