"""Conversations in files: JSON, tables and Parquet, told apart by what they hold, or mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlbench.data.annotation_records import AnnotationRecords
from vlbench.data.conversation_record import list_written_images, sample_from_record
from vlbench.data.image_folder import missing_message
from vlbench.data.image_processing import ImageFile
from vlbench.data.json_records import JsonRecords
from vlbench.data.location_errors import folder_remedy, missing_file_error
from vlbench.data.mapped_sources import find_mapped_source
from vlbench.data.parquet_files import find_parquet_files
from vlbench.data.parquet_records import ParquetRecords
from vlbench.data.record_files import RecordFile, read_beginning
from vlbench.data.record_images import EmbeddedImage, WrittenImage, image_bytes
from vlbench.data.sample import LazyImage, Sample, SampleSource, sample_at
from vlbench.data.shard_sampler import MAX_LANES
from vlbench.data.table_records import TableRecords, is_table
from vlbench.errors import BadSample, UserError

MAX_FILE_CHECKS = 100_000  # image files whose existence is checked
PARQUET_SIGNATURE = b"PAR1"


class ConversationFiles:
    """The samples of files with a record each, in any dialect (`record_dialects`).

    A record is read and converted when its sample is requested, so that a file takes no memory.
    Reports count records from 1. `<image>` in a human turn becomes IMAGE_PLACEHOLDER.
    """

    def __init__(
        self,
        location: str | Path,
        image_folder: str | Path | None = None,
        allow_outside: bool = False,
    ) -> None:
        """Open a file, a folder of Parquet files, or MAPPING:FOLDER of annotation files.

        Image names are looked up in `image_folder`, by default the folder of the file that the
        record is in. Images outside of it are bad, unless `allow_outside`; see
        `image_folder.is_inside`. Raises a UserError when the file is missing, malformed or without
        records.
        """
        self.name = str(location)
        if image_folder is not None and not Path(image_folder).is_dir():
            raise UserError(f"images: there is no folder {image_folder}")
        self.records = open_record_file(str(location))
        self.image_folder = None if image_folder is None else Path(image_folder)
        self.allow_outside = allow_outside
        self._latest_images: tuple[int, list[WrittenImage]] | None = None
        """A record's number and its images: the next one that is asked for is often of it, too."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_latest_images": None}  # megabytes, of no use to another process

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample of record `index` (from 0), or raise BadSample."""
        return sample_from_record(
            self.read_record(index),
            f"record {index + 1}",
            lambda image_name: self._find_image(index, image_name),
            lambda number: EmbeddedImage(self, index, number),
        )

    @property
    def block_counts(self) -> Sequence[int] | None:
        """How many samples each part has that is read at once; None where any order is as fast."""
        return self.records.block_counts

    def pass_order(
        self,
        shuffle_key: str,
        block_counts: Sequence[int] | None = None,
        max_lanes: int = MAX_LANES,
    ) -> Callable[[int], int] | None:
        """Return the order of a pass over the samples; None where any order is as fast.

        Of some of the samples, `block_counts` says how many each part has. At most `max_lanes`
        lanes are read alternately.
        """
        return self.records.pass_order(shuffle_key, block_counts, max_lanes)

    def read_record(self, index: int, with_images: bool = False) -> Any:
        """Return record `index` (from 0) as it is written, or raise BadSample.

        Without images their bytes may be left out, where they are columns of a Parquet file.
        """
        try:
            return self.records.read_record(index, with_images)
        except BadSample:
            raise
        except UserError as error:
            raise BadSample(f"record {index + 1}", str(error)) from error

    def read_image(self, index: int, number: int, most: int | None = None) -> bytes:
        """Return the file of image `number` (from 0), which is in record `index`; UserError.

        Of its bytes it is the first `most`, if that is given.
        """
        latest = self._latest_images  # read once: another thread may replace it
        if latest is None or latest[0] != index:
            latest = index, list_written_images(self.read_record(index, with_images=True))
            self._latest_images = latest
        if number >= len(latest[1]):
            raise BadSample("record", f"has {len(latest[1])} images")
        return image_bytes(latest[1][number], most)

    def _find_image(self, index: int, image_name: str) -> ImageFile:
        folder = self.image_folder or self.records.folder_of(index)
        return ImageFile(str(folder / image_name), str(folder), self.allow_outside)

    def find_bad_samples(
        self,
        indices: Sequence[int] | None = None,
        on_sample: Callable[[Sample], None] | None = None,
    ) -> list[BadSample]:
        """Return every record that is malformed or names an image file that may not be read.

        That is one that does not exist, or is outside of the folder. Of `indices` (from 0) alone
        where they are given. At most MAX_FILE_CHECKS different files are looked up. `on_sample` is
        called with every well-formed sample.
        """
        return find_bad_samples(self, indices, on_sample)


def find_bad_samples(
    source: SampleSource,
    indices: Sequence[int] | None = None,
    on_sample: Callable[[Sample], None] | None = None,
) -> list[BadSample]:
    """Return the bad samples of files, as `ConversationFiles.find_bad_samples`."""
    faults: list[BadSample] = []
    problems: dict[LazyImage, str] = {}
    for index in range(len(source)) if indices is None else indices:
        try:
            sample = sample_at(source, index)
        except BadSample as fault:
            faults.append(fault)
            continue
        if on_sample:
            on_sample(sample)
        for image in sample.images:
            if image not in problems and len(problems) < MAX_FILE_CHECKS:
                problems[image] = _find_problem(image)
            if problems.get(image):
                faults.append(BadSample(sample.id, problems[image]).with_origin_of(sample))
                break
    return faults


def _find_problem(image: LazyImage) -> str:
    """Return why an image file may not be read, "" if it may; it is not opened."""
    if isinstance(image, ImageFile):
        try:
            image.refuse_outside()
        except UserError as error:
            return str(error)
        if not os.path.exists(image.name):
            return f"image {image.name}: {missing_message(image.name)}"
    return ""


def open_record_file(location: str) -> RecordFile:
    """Open records by what their file or folder is; raises a UserError that names it."""
    try:
        mapped = find_mapped_source(location)
        if mapped is not None:
            return AnnotationRecords(location, mapped)
        parquet_files = find_parquet_files(location)
        if parquet_files:
            return ParquetRecords(location, parquet_files)
        return _open_by_content(location)
    except FileNotFoundError:
        raise missing_file_error(Path(location)) from None
    except OSError as error:
        raise UserError(f"data {location}: cannot be read ({error.strerror})") from None
    except UserError as error:
        lines = [line.removeprefix(f"{location}: ") for line in error.lines]
        raise UserError(*(f"data {location}: {line}" for line in lines)) from None


def _open_by_content(location: str) -> RecordFile:
    """Open a file by how it begins; raises OSError, and a UserError for what is not read."""
    file = Path(location)
    if file.is_dir():
        raise UserError(f"is a folder, not a file; {folder_remedy(file)}")
    beginning = read_beginning(file)
    if beginning.startswith(PARQUET_SIGNATURE):
        return ParquetRecords(location, [file])
    if beginning[:1] in (b"", b"[", b"{"):
        return JsonRecords(file)
    if is_table(beginning):
        return TableRecords(file)
    raise _no_records_error(beginning)


def _no_records_error(beginning: bytes) -> UserError:
    """Return the error for a file that is neither JSON nor a table."""
    zero = beginning.find(b"\0")
    if zero >= 0:
        return UserError(f"is no text: its byte {zero + 1} is 0")
    first_line = beginning.split(b"\n", 1)[0].decode("utf-8", "replace")
    return UserError(
        f"line 1 begins with {first_line[:40]!r}; expected a JSON list, JSON records one after "
        "another, or a table (CSV or TSV) whose first line names columns"
    )
