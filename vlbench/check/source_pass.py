"""One pass over a source: every record is read, its images are opened, and it is encoded.

Records are read in the order of the file and forgotten, so that memory does not grow with their
texts; what is kept of each takes about 100 bytes.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import overload

from tqdm import tqdm

from vlbench.check.findings import (
    ODD,
    REFUSED,
    DataFinding,
    FindingLog,
    RefusedSamples,
    make_finding,
)
from vlbench.check.repeated_samples import RepeatedSamples, short_hash
from vlbench.check.sample_checks import ImageCheck, StageCheck, check_image, find_odd_text
from vlbench.data.chat_template import ChatTemplate
from vlbench.data.record_keys import is_metadata_key
from vlbench.data.sample import LazyImage, Sample, SampleSource, sample_at
from vlbench.errors import BadSample
from vlbench.train.run_report import format_duration

CHUNK_SAMPLES = 256  # samples whose images are opened at the same time
MAX_ASPECT_RATIO = 32  # longest edge / shortest; beyond it, padding leaves a strip of one patch
MAX_REMEMBERED_PROBLEMS = 100_000  # images whose problem is remembered; others are opened again
PACE_SECONDS = 5.0  # after which the time that is left is told


@dataclass
class SourceSummary:
    """What the report says of a source."""

    source: SampleSource
    good_indices: array[int] = field(default_factory=lambda: array("q"))
    """Records that are well formed and whose images can be read."""
    read_samples: int = 0
    """Samples that were looked at: all, or the first of a source of rendered scenes."""
    image_count: int = 0
    unread_key_counts: Counter[str] = field(default_factory=Counter)
    untagged_samples: int = 0
    refused: RefusedSamples = field(default_factory=RefusedSamples)

    def reading_notes(self) -> Iterator[str]:
        """Yield notes on records that are correct, but are read in another way than written."""
        counts = self.unread_key_counts.most_common()
        metadata = [f"{key} ({count})" for key, count in counts if is_metadata_key(key)]
        if metadata:
            yield f"keys that are not used, with the number of records: {', '.join(metadata)}"
        if self.untagged_samples:
            yield (
                f"{self.untagged_samples} records have an image and no <image>: it is put before "
                "the question"
            )


class GoodSamples(Sequence[Sample]):
    """The good samples of a source, each read again when it is asked for."""

    def __init__(self, summary: SourceSummary) -> None:
        self.summary = summary

    def __len__(self) -> int:
        return len(self.summary.good_indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return sample_at(self.summary.source, self.summary.good_indices[index])


@dataclass
class SourcePass:
    """The pass over a source.

    Args:
        source: Where the samples are.
        stage_checks: The source as each of the stages that read it encodes it.
        template: Of the language model.
        log: Takes the findings.
        workers: Threads that open images.
    """

    source: SampleSource
    stage_checks: list[StageCheck]
    template: ChatTemplate
    log: FindingLog
    workers: int

    def __post_init__(self) -> None:
        self.summary = SourceSummary(self.source)
        self._repeated = RepeatedSamples(self.source)
        self._seen_images: set[int] = set()
        self._image_problems: dict[int, str] = {}
        self._first_with_key: dict[str, DataFinding] = {}

    def check_files(self) -> SourceSummary:
        """Check every record of a source that reads files."""
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for chunk in self._read_chunks():
                self._open_images(chunk, pool)
                for index, sample in chunk:
                    self._check_sample(index, sample)
        self._add_all(self._unread_key_findings())
        self._add_all(self._repeated.iterate_findings())
        self.summary.image_count = len(self._seen_images)
        self.summary.read_samples = len(self.source)
        return self._finish()

    def check_rendered(self, max_samples: int) -> SourceSummary:
        """Encode the first samples of a source that has no files and no faults."""
        self.summary.read_samples = min(len(self.source), max_samples)
        for index in range(self.summary.read_samples):
            self._encode(index, self.source[index])
        return self._finish()

    def _finish(self) -> SourceSummary:
        for check in self.stage_checks:
            self._add_all(check.finish())
        return self.summary

    def _add_all(self, findings: Iterable[DataFinding]) -> None:
        for finding in findings:
            self._add(finding)

    def _add(self, finding: DataFinding) -> None:
        self.log.add(finding)
        self.summary.refused.note(finding)

    def _read_chunks(self) -> Iterator[list[tuple[int, Sample]]]:
        """Yield well-formed samples with their numbers; say how long it will take."""
        chunk: list[tuple[int, Sample]] = []
        pace = Pace(self.source.name, len(self.source))
        for index in tqdm(range(len(self.source)), desc="check", unit="record", disable=None):
            pace.note_done(index)
            try:
                chunk.append((index, sample_at(self.source, index)))
            except BadSample as bad:
                name = self.source.name
                self._add(
                    DataFinding(REFUSED, name, bad.sample_id, bad.reason, record=bad.record_number)
                )
            if len(chunk) == CHUNK_SAMPLES:
                yield chunk
                chunk = []
        yield chunk

    def _open_images(self, chunk: list[tuple[int, Sample]], pool: ThreadPoolExecutor) -> None:
        """Open the images of samples that no sample before had."""
        new_images: dict[int, tuple[int, int, Sample, LazyImage]] = {}
        for index, sample in chunk:
            for number, image in enumerate(sample.images):
                key = short_hash(image.name)
                if key not in self._seen_images and key not in new_images:
                    new_images[key] = (index, number, sample, image)
        self._seen_images.update(new_images)
        checks = pool.map(check_image, [image for *_, image in new_images.values()])
        for (key, place), check in zip(new_images.items(), checks, strict=True):
            self._note_image(key, place, check)

    def _note_image(
        self, key: int, place: tuple[int, int, Sample, LazyImage], check: ImageCheck
    ) -> None:
        index, number, sample, image = place
        if check.problem:
            is_remembered = len(self._image_problems) < MAX_REMEMBERED_PROBLEMS
            self._image_problems[key] = check.problem if is_remembered else ""
            return
        self._repeated.note_image(index, number, check.content_hash)
        if max(check.size) > MAX_ASPECT_RATIO * min(check.size):
            width, height = check.size
            problem = f"image {image.name} is a strip of {width} x {height} pixels"
            self._add(make_finding(sample, ODD, self.source.name, problem))

    def _check_sample(self, index: int, sample: Sample) -> None:
        """Check a sample whose images have been opened."""
        name = self.source.name
        self._repeated.note_sample(index, sample)
        self._add_all(find_odd_text(name, sample, self.template))
        self.summary.unread_key_counts.update(sample.unread_keys)
        self.summary.untagged_samples += sample.is_untagged
        for key in sample.unread_keys:
            if key not in self._first_with_key:
                self._first_with_key[key] = make_finding(sample, ODD, name, key)
        for image in sample.images:
            problem = self._image_problem(image)
            if problem:
                self._add(make_finding(sample, REFUSED, name, problem))
                return
        self._encode(index, sample)

    def _image_problem(self, image: LazyImage) -> str:
        """Return why an image that was opened cannot be read, "" if it can."""
        key = short_hash(image.name)
        if key not in self._image_problems:
            return ""
        return self._image_problems[key] or check_image(image).problem

    def _encode(self, index: int, sample: Sample) -> None:
        self.summary.good_indices.append(index)
        for check in self.stage_checks:
            self._add_all(check.check_sample(sample))

    def _unread_key_findings(self) -> Iterator[DataFinding]:
        """Yield a finding for each record key that is not read and may be meant for training."""
        for key, count in self.summary.unread_key_counts.most_common():
            if not is_metadata_key(key):
                first = self._first_with_key[key]
                what = f"key {key!r} is not read ({count} records have it)"
                yield DataFinding(ODD, first.source, first.sample, what, record=first.record)


class Pace:
    """Tells once how long a pass will take, if that is long."""

    def __init__(self, source_name: str, record_count: int) -> None:
        """Start the clock."""
        self.source_name, self.record_count = source_name, record_count
        self._start, self._is_told = time.monotonic(), False

    def note_done(self, done: int) -> None:
        """Print the time that is left when enough is done to tell."""
        seconds = time.monotonic() - self._start
        if self._is_told or seconds < PACE_SECONDS or not done:
            return
        self._is_told = True
        left = seconds * (self.record_count - done) / done
        print(
            f"{self.source_name}: {done:,} of {self.record_count:,} records in {seconds:.0f} s, "
            f"about {format_duration(left)} left",
            flush=True,
        )
