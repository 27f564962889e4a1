"""Checks of the data before training starts, in a time that does not grow with the data.

Reading a record takes 0.1 ms, and some milliseconds over a network: all of 20,000 are seconds, all
of 10^8 would be hours in which every GPU waits. Of a larger source some are inspected; the others
are judged when training meets them, and the verb `check` reads all.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vlbench.data.caption_rest import CaptionRest
from vlbench.data.chosen_samples import base_source
from vlbench.data.record_keys import is_metadata_key
from vlbench.data.remote_shards import is_url
from vlbench.data.sample import LazyImage, Sample, SampleSource, record_number, sample_at
from vlbench.data.shards import WebDatasetShards
from vlbench.errors import BadSample, UserError

MAX_INSPECTED_SAMPLES = 20_000
"""Samples that are inspected of a source: a share of 1 % is found as 1 %, give or take 0.2."""
RUN_SAMPLES = 100  # inspected one after another: a block of a Parquet file is read for them once
MAX_OPENED_IMAGES = 500  # a source with more images has none of them opened
MAX_PROBED_SAMPLES = 16  # samples of shards, evenly spread, of which one must be usable
MAX_UNREADABLE = 5  # unreadable samples after which a search for an image ends


@runtime_checkable
class CheckableSource(Protocol):
    """A source that can check itself without opening images."""

    def find_bad_samples(
        self,
        indices: Sequence[int] | None = None,
        on_sample: Callable[[Sample], None] | None = None,
    ) -> list[BadSample]:
        """Return the bad ones of samples, all for None; call `on_sample` with the well-formed."""
        ...


@dataclass
class PreflightReport:
    """The result of checking one source."""

    bad_samples: list[BadSample]
    """Samples that cannot be used, each with its first fault; of a missing shard only the first.

    Shards that are missing or truncated are named, also where none of their samples is inspected.
    """
    sample_count: int
    """Samples of the source."""
    inspected_samples: int
    """How many of them were inspected."""
    further_bad_samples: int = 0
    """How many of the inspected samples are bad beside `bad_samples`; negative where some of these
    are not among them."""
    unread_key_counts: Counter[str] = field(default_factory=Counter)
    """Number of well-formed samples that have a key which is not read."""
    untagged_samples: int = 0
    """Samples whose only image has no tag."""
    beyond_captions: CaptionRest = field(default_factory=CaptionRest)
    """What a stage of captions leaves out."""

    @property
    def bad_sample_count(self) -> int:
        """Number of inspected samples that cannot be used, at least 1 where any is known."""
        return max(min(1, len(self.bad_samples)), len(self.bad_samples) + self.further_bad_samples)

    @property
    def inspected_words(self) -> str:
        """What bad samples are counted among, as "4 samples"."""
        inspected = "" if self.is_complete else f"{self.inspected_samples} inspected of "
        return f"{inspected}{self.sample_count} samples"

    @property
    def is_complete(self) -> bool:
        """Whether all samples were inspected."""
        return self.inspected_samples == self.sample_count

    def describe_unread_keys(self) -> str:
        """Return the keys that are not read and may be training content; "" for none."""
        return ", ".join(
            f"{key!r} ({count} records)"
            for key, count in self.unread_key_counts.most_common()
            if not is_metadata_key(key)
        )


def choose_inspected(sample_count: int, most: int = MAX_INSPECTED_SAMPLES) -> Sequence[int]:
    """Return the indices of the samples to inspect: all, or of more than `most` runs all over.

    They follow from the number of samples alone.
    """
    if sample_count <= most:
        return range(sample_count)
    run_count = most // RUN_SAMPLES
    starts = (number * sample_count // run_count for number in range(run_count))
    return [start + offset for start in starts for offset in range(RUN_SAMPLES)]


def inspect_source(
    source: SampleSource,
    max_opened_images: int = MAX_OPENED_IMAGES,
    max_inspected_samples: int = MAX_INSPECTED_SAMPLES,
) -> PreflightReport:
    """Check the records of a source, or some from all over it, and whether image files exist.

    Images are opened too when there are at most `max_opened_images` of them. Of shards at a URL
    nothing is requested; rendered scenes need no check.
    """
    base = base_source(source)
    if not isinstance(base, CheckableSource):
        return PreflightReport([], len(source), len(source))
    if isinstance(base, WebDatasetShards) and is_url(base.tars[0]):
        return PreflightReport(list(base.truncated_samples()), len(source), len(source))
    assert isinstance(source, CheckableSource)
    indices = choose_inspected(len(source), max_inspected_samples)
    report = PreflightReport([], len(source), len(indices))
    if isinstance(base, WebDatasetShards):
        indices = _inspect_shard_files(source, base, indices, report)
    images: set[LazyImage] = set()

    def note_sample(sample: Sample) -> None:
        report.unread_key_counts.update(sample.unread_keys)
        report.untagged_samples += sample.is_untagged
        report.beyond_captions.add(sample)
        if len(images) <= max_opened_images:
            images.update(sample.images)

    bad_samples = source.find_bad_samples(indices, note_sample)
    if images and len(images) <= max_opened_images:
        bad_samples = _find_unopenable(source, indices)
    report.bad_samples += bad_samples
    return report


def has_images(source: SampleSource, bad_samples: list[BadSample]) -> bool:
    """Tell whether any inspected sample of a source, `bad_samples` left out, has an image.

    Also True, as it is unknown, after MAX_UNREADABLE samples that cannot be read now.
    """
    left_out = {bad.record_number for bad in bad_samples}
    unreadable = 0
    for index in choose_inspected(len(source)):
        if record_number(source, index) in left_out:
            continue
        try:
            if source[index].images:
                return True
        except BadSample:
            unreadable += 1
            if unreadable == MAX_UNREADABLE:
                return True
    return False


def probe_shards(
    source: SampleSource, bad_samples: list[BadSample]
) -> tuple[int, BadSample] | None:
    """Probe shards for a usable sample, and return None where there is one.

    At most MAX_PROBED_SAMPLES are read, and none of `bad_samples`.

    Returns:
        If none of them is usable, their number and the first fault.
    """
    left_out = {bad.record_number for bad in bad_samples}
    count = min(MAX_PROBED_SAMPLES, len(source))
    faults: list[BadSample] = []
    for index in (number * len(source) // count for number in range(count)):
        if record_number(source, index) in left_out:
            continue
        try:
            _open_all_images(sample_at(source, index), {})
            return None
        except BadSample as fault:
            faults.append(fault)
    return (len(faults), faults[0]) if faults else None


def _inspect_shard_files(
    source: SampleSource,
    shards: WebDatasetShards,
    indices: Sequence[int],
    report: PreflightReport,
) -> Sequence[int]:
    """Add the shards that are truncated or missing to a report, each with one sample.

    Of a missing shard as many samples are bad as are among those to inspect.

    Args:
        source: The shards, or a part of their samples.
        shards: The shards.
        indices: The samples of `source` to inspect.
        report: About these samples.

    Returns:
        Those of `indices` that can be read.
    """
    has_record = getattr(source, "has_record", None)  # of a part of the samples
    truncated = [
        bad
        for bad in shards.truncated_samples()
        if has_record is None or has_record(bad.record_number)
    ]
    report.bad_samples += truncated
    used_counts = getattr(source, "block_counts", shards.sample_counts)
    missing = {
        number
        for number, (tar, used) in enumerate(zip(shards.tars, used_counts, strict=True))
        if used and not os.path.exists(tar)
    }
    shard_numbers = {index: shards.shard_of(record_number(source, index) - 1) for index in indices}
    inspected = Counter(shard_numbers.values())
    first_records = list(itertools.accumulate(shards.sample_counts, initial=1))
    for number in sorted(missing):
        tar, first_record = shards.tars[number], first_records[number]
        bad = BadSample(f"{os.path.basename(tar)} 0", f"{tar}: does not exist")
        report.bad_samples.append(bad.with_origin(source.name, first_record))
        report.further_bad_samples += inspected[number] - 1
    known = {bad.record_number for bad in report.bad_samples}
    looked_at = {record_number(source, index) for index in indices}
    report.further_bad_samples -= sum(bad.record_number not in looked_at for bad in truncated)
    return [
        index
        for index, number in shard_numbers.items()
        if number not in missing and record_number(source, index) not in known
    ]


def _find_unopenable(source: SampleSource, indices: Sequence[int]) -> list[BadSample]:
    """Return the bad ones of some samples after opening all of their images."""
    faults: list[BadSample] = []
    reasons: dict[LazyImage, str] = {}
    for index in indices:
        try:
            _open_all_images(sample_at(source, index), reasons)
        except BadSample as fault:
            faults.append(fault)
    return faults


def _open_all_images(sample: Sample, failure_reasons: dict[LazyImage, str]) -> None:
    """Open the images of a sample, each only once; raise BadSample for the first that fails."""
    for image in sample.images:
        if image not in failure_reasons:
            failure_reasons[image] = _open_failure(image)
        if failure_reasons[image]:
            raise BadSample(sample.id, failure_reasons[image]).with_origin_of(sample)


def _open_failure(image: LazyImage) -> str:
    """Return why an image cannot be opened, or an empty text."""
    try:
        image.open()
    except UserError as error:
        return str(error)
    return ""
