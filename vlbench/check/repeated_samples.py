"""Samples and images that are there several times, found by hashes: 24 bytes for each sample."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vlbench.check.findings import TWICE, DataFinding, make_finding
from vlbench.data.sample import Sample, SampleSource, record_number, sample_at


def short_hash(text: str | bytes) -> int:
    """Return a hash of 64 bits: two of a million differ with probability 1 - 10^-7."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class RepeatedSamples:
    """Hashes of the samples of a source so far, and of the contents of its images."""

    def __init__(self, source: SampleSource) -> None:
        self.source = source
        self._indices, self._contents, self._ids = array("q"), array("Q"), array("Q")
        self._image_indices, self._image_numbers = array("q"), array("q")
        self._image_contents = array("Q")

    def note_sample(self, index: int, sample: Sample) -> None:
        """Note record `index` (from 0)."""
        parts = [turn.role + turn.text for turn in sample.turns]
        parts += [image.name for image in sample.images]
        self._indices.append(index)
        self._contents.append(short_hash("\0".join(parts)))
        self._ids.append(short_hash(sample.id))

    def note_image(self, index: int, number: int, content_hash: bytes) -> None:
        """Note image `number` of record `index`, where its name occurs first."""
        self._image_indices.append(index)
        self._image_numbers.append(number)
        self._image_contents.append(short_hash(content_hash))

    def iterate_findings(self) -> Iterator[DataFinding]:
        """Yield findings about samples equal to an earlier one, repeated ids, and images.

        An id is only a label, so that there is one finding for all repeated ones.
        """
        first_content = _first_places(self._contents)
        for place in np.flatnonzero(first_content != np.arange(len(first_content))).tolist():
            sample, number = self._sample_at(self._indices, place)
            first, first_number = self._sample_at(self._indices, int(first_content[place]))
            original = f"record {first_number} ({first.id})"
            problem = f"record {number} has the images and turns of {original}"
            yield make_finding(sample, TWICE, self.source.name, problem)
        yield from self._repeated_ids(first_content)
        first_image = _first_places(self._image_contents)
        for place in np.flatnonzero(first_image != np.arange(len(first_image))).tolist():
            sample, _ = self._sample_at(self._image_indices, place)
            first, _ = self._sample_at(self._image_indices, int(first_image[place]))
            image = sample.images[self._image_numbers[place]]
            original = first.images[self._image_numbers[first_image[place]]].name
            problem = f"image {image.name} has the same content as {original}"
            yield make_finding(sample, TWICE, self.source.name, problem)

    def _repeated_ids(self, first_content: NDArray[np.int64]) -> Iterator[DataFinding]:
        places = np.arange(len(first_content))
        is_repeated = (_first_places(self._ids) != places) & (first_content == places)
        repeated = np.flatnonzero(is_repeated).tolist()
        if repeated:
            sample, number = self._sample_at(self._indices, repeated[0])
            others = f", as {len(repeated) - 1} others do" if len(repeated) > 1 else ""
            problem = f"record {number} has the id of an earlier one{others} (ids are only labels)"
            yield make_finding(sample, TWICE, self.source.name, problem)

    def _sample_at(self, indices: array[int], place: int) -> tuple[Sample, int]:
        """Return a sample, which is read again, and the number of its record."""
        index = indices[place]
        return sample_at(self.source, index), record_number(self.source, index)


def _first_places(hashes: array[int]) -> NDArray[np.int64]:
    """Return for each hash the place of the first that equals it."""
    values = np.frombuffer(hashes, np.uint64) if hashes else np.zeros(0, np.uint64)
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], np.int64)
