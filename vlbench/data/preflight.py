"""What can be known about the data before training starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vlbench.data.record_keys import is_metadata_key
from vlbench.data.remote_shards import is_url
from vlbench.data.sample import LazyImage, Sample, SampleSource, sample_at
from vlbench.data.shards import WebDatasetShards
from vlbench.errors import BadSample, UserError

MAX_OPENED_IMAGES = 500  # pictures of a source up to which all are opened

MAX_PROBED_SAMPLES = 16  # samples of shards, evenly spread, of which one must be usable

MAX_UNREADABLE = 5  # samples that cannot be read until a search among them ends


@runtime_checkable
class CheckableSource(Protocol):
    """A source that can check itself without opening pictures."""

    def find_bad_samples(
        self, on_sample: Callable[[Sample], None] | None = None
    ) -> list[BadSample]:
        """Return every sample that is known to be bad; call `see` with well-formed samples."""
        ...


@dataclass
class PreflightReport:
    """What was found in a source."""

    bad_samples: list[BadSample]
    """Samples that cannot be used, each with its first fault; of a missing shard the first."""
    other_missing_samples: int = 0
    """The other samples of missing shards."""
    unread_key_counts: Counter[str] = field(default_factory=Counter)
    """In how many well-formed samples a key is there and not read."""
    untagged_samples: int = 0
    """Samples whose only picture has no tag."""

    @property
    def bad_sample_count(self) -> int:
        """How many samples cannot be used."""
        return len(self.bad_samples) + self.other_missing_samples

    def describe_unread_keys(self) -> str:
        """Return the keys that are not read and may hold something to learn; "" for none."""
        return ", ".join(
            f"{key!r} ({count} records)"
            for key, count in self.unread_key_counts.most_common()
            if not is_metadata_key(key)
        )


def preflight_bad_samples(
    source: SampleSource, max_opened_images: int = MAX_OPENED_IMAGES
) -> list[BadSample]:
    """Return the bad samples of a source; see `look_through`."""
    return inspect_source(source, max_opened_images).bad_samples


def inspect_source(
    source: SampleSource, max_opened_images: int = MAX_OPENED_IMAGES
) -> PreflightReport:
    """Look at all records of a source and whether its image files exist.

    Pictures are opened too when there are at most `limit_open` of them. Of shards it is only looked
    whether the files are there and whole; rendered scenes are as they are.
    """
    if isinstance(source, WebDatasetShards):  # too many to be read
        return _inspect_shards(source)
    if not isinstance(source, CheckableSource):
        return PreflightReport([])
    found = PreflightReport([])
    pictures: set[LazyImage] = set()

    def note_sample(sample: Sample) -> None:
        found.unread_key_counts.update(sample.unread_keys)
        found.untagged_samples += sample.is_untagged
        if len(pictures) <= max_opened_images:
            pictures.update(sample.images)

    found.bad_samples = source.find_bad_samples(note_sample)
    if len(pictures) <= max_opened_images:
        found.bad_samples = _find_unopenable(source)
    return found


def has_images(source: SampleSource, bad_samples: list[BadSample]) -> bool:
    """Tell whether any sample of a source, those in `bad` left out, has a picture.

    True also of a source of which UNREADABLE samples cannot be read now: nobody knows.
    """
    left_out = {one.record_number for one in bad_samples}
    unreadable = 0
    for index in range(len(source)):
        if index + 1 in left_out:
            continue
        try:
            if source[index].images:
                return True
        except BadSample:
            unreadable += 1
            if unreadable == MAX_UNREADABLE:
                return True
    return False


def no_usable_sample(
    source: WebDatasetShards, bad_samples: list[BadSample]
) -> tuple[int, BadSample] | None:
    """Look for a usable sample in shards, in vain: how many were read, and what was wrong first.

    None if one was found, which ends the search; at most LOOKED_AT are read, and none of `bad`.
    """
    left_out = {one.record_number for one in bad_samples}
    count = min(MAX_PROBED_SAMPLES, len(source))
    places = (number * len(source) // count for number in range(count))
    faults: list[BadSample] = []
    for index in places:
        if index + 1 in left_out:
            continue
        try:
            _open_all_images(sample_at(source, index), {})
            return None
        except BadSample as fault:
            faults.append(fault)
    return (len(faults), faults[0]) if faults else None


def _inspect_shards(source: WebDatasetShards) -> PreflightReport:
    """Return what was found torn while it was opened, and the shards that are not there.

    Those behind a URL are not asked for.
    """
    found, first = PreflightReport(list(source.torn_samples())), 1
    for tar, count in zip(source.tars, source.sample_counts, strict=True):
        if not is_url(tar) and not os.path.exists(tar):
            bad = BadSample(f"{os.path.basename(tar)} 0", f"{tar}: does not exist")
            found.bad_samples.append(bad.with_origin(source.name, first))
            found.other_missing_samples += count - 1
        first += count
    return found


def _find_unopenable(source: SampleSource) -> list[BadSample]:
    """Return the bad samples of a source, all pictures opened."""
    faults: list[BadSample] = []
    reasons: dict[LazyImage, str] = {}
    for index in range(len(source)):
        try:
            _open_all_images(sample_at(source, index), reasons)
        except BadSample as fault:
            faults.append(fault)
    return faults


def _open_all_images(sample: Sample, failure_reasons: dict[LazyImage, str]) -> None:
    """Open the pictures of a sample, each only once; raise BadSample for the first that fails."""
    for picture in sample.images:
        if picture not in failure_reasons:
            failure_reasons[picture] = _open_failure(picture)
        if failure_reasons[picture]:
            raise BadSample(sample.id, failure_reasons[picture]).with_origin_of(sample)


def _open_failure(image: LazyImage) -> str:
    """Say why a picture cannot be opened, or return an empty text."""
    try:
        image.open()
    except UserError as mistake:
        return str(mistake)
    return ""
