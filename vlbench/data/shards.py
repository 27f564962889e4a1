"""WebDataset shards: tar files with random access to samples, through an index beside each.

    FOLDER/
        shards.json        the shards in order, with their numbers of samples
        000000.tar         KEY.json (a record in LLaVA's format), KEY.0.jpg, KEY.1.jpg ...
        000000.tar.index   what the tar file holds: see shard_index

`pack` writes them. Other WebDataset tar files (KEY.jpg and KEY.txt or KEY.json) are read as well:
they are indexed once, which reads their headers. The folder may be a URL: a sample is then read by
byte ranges alone.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlbench.data.content_parts import names_images
from vlbench.data.conversation_files import find_bad_samples
from vlbench.data.conversation_record import sample_from_record
from vlbench.data.image_processing import open_image_bytes
from vlbench.data.image_size import partial_image_size
from vlbench.data.record_dialects import IMAGE_KEYS, caption_problem, has_turns
from vlbench.data.record_files import unique_keys
from vlbench.data.remote_shards import is_url, read_byte_range, shown_name
from vlbench.data.sample import Sample
from vlbench.data.shard_image_names import ShardImageNames, is_image_member
from vlbench.data.shard_index import (
    BLOCK_BYTES,
    CAPTION_NAMES,
    FileStamp,
    ShardEntry,
    TarScan,
    file_stamp,
    index_path,
    load_shard_index,
)
from vlbench.data.shard_indexing import load_summaries
from vlbench.data.shard_list import SHARD_LIST_FILE, is_tar, read_shard_list
from vlbench.data.shard_patterns import expand_shard_pattern
from vlbench.data.shard_sampler import MAX_LANES, RecentOrders, ShardShuffle
from vlbench.errors import BadSample, UserError
from vlbench.regular_files import MAX_IMAGE_BYTES, format_bytes, open_regular
from vlbench.text_files import parse_json
from vlbench.text_tables import list_some

CACHED_INDEXES = 64  # indexes in memory: of about as many shards as are read alternately
READ_TRIES = 3  # attempts to read a shard
RETRY_SECONDS = 1.0  # between two attempts


@dataclass(frozen=True)
class TarImage:
    """An image inside a tar file."""

    tar: str
    member_name: str
    """Its name in the tar file."""
    offset: int
    """Of its first byte in the tar file."""
    size: int
    """In bytes."""
    header_crc: int | None = None
    """CRC-32 of its header; see `MemberLocation`."""

    @property
    def name(self) -> str:
        """The tar file and the name of the member."""
        return f"{shown_name(self.tar)}: {self.member_name}"

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a UserError with the name."""
        return open_image_bytes(self._read_bytes(), self.name)

    def open_draft(self, draft_side: int) -> Image.Image:
        """Return it in RGB; a JPEG may be downscaled to a longest edge >= `draft_side`."""
        return open_image_bytes(self._read_bytes(), self.name, draft_side)

    def read_size(self, exif: bool) -> tuple[int, int]:
        """Return width and height in pixels from the header of the image's file."""
        return partial_image_size(self._read_bytes, self.name, exif)

    def _read_bytes(self, most: int | None = None) -> bytes:
        size = self.size if most is None else min(self.size, most)
        return read_member(self.tar, self.offset, size, self.header_crc)


class WebDatasetShards:
    """The samples of shards as a source: a folder with shards.json, or a pattern of tar files."""

    def __init__(self, location: str | Path) -> None:
        """Find the shards of a folder that `pack` wrote, or of `dir/{000000..000123}.tar`.

        Both may be URLs. For a pattern, `notes` has a line for each kind of member that is left
        out.
        """
        self.name = shown_name(str(location))
        self.notes: list[str] = []
        self._truncated_samples: list[BadSample] = []
        listed = read_shard_list(str(location))
        self.tars, self.sample_counts = listed or self._list_matching_tars(str(location))
        self._shard_ends = np.cumsum(self.sample_counts)
        self._pass_orders = RecentOrders[ShardShuffle]()

    def __len__(self) -> int:
        return int(self._shard_ends[-1])

    def truncated_samples(self) -> list[BadSample]:
        """Return a bad sample for each tar file of a pattern that is truncated or damaged."""
        return self._truncated_samples

    @property
    def block_counts(self) -> Sequence[int]:
        """How many samples each shard has."""
        return self.sample_counts

    def pass_order(
        self,
        shuffle_key: str,
        block_counts: Sequence[int] | None = None,
        max_lanes: int = MAX_LANES,
    ) -> ShardShuffle:
        """Return the order of a pass over the samples, which reads few shards at a time.

        Of some of the samples, `block_counts` says how many each shard has. At most `max_lanes`
        lanes are read alternately.
        """
        if block_counts is not None:
            return ShardShuffle(block_counts, shuffle_key, max_lanes=max_lanes)
        return self._pass_orders.find(
            shuffle_key,
            max_lanes,
            lambda: ShardShuffle(self.sample_counts, shuffle_key, max_lanes=max_lanes),
        )

    def shard_of(self, index: int) -> int:
        """Return the number (from 0) of the shard that sample `index` (from 0) is in."""
        return int(self._shard_ends.searchsorted(index, side="right"))

    def find_bad_samples(
        self,
        indices: Sequence[int] | None = None,
        on_sample: Callable[[Sample], None] | None = None,
    ) -> list[BadSample]:
        """Return the samples with a bad record, as `ConversationFiles.find_bad_samples`."""
        return find_bad_samples(self, indices, on_sample)

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index` (from 0), or raise BadSample."""
        shard = self.shard_of(index)
        tar = self.tars[shard]
        entry_index = index - (int(self._shard_ends[shard - 1]) if shard else 0)
        name = f"{Path(shown_name(tar)).name} {entry_index}"
        try:
            _check_opens(tar)
            scan = _cached_index(tar, file_stamp(tar))
        except UserError as error:
            raise BadSample(name, str(error)) from error
        if isinstance(scan, str):
            raise BadSample(name, scan)
        if entry_index < len(scan.entries):
            return _make_sample(tar, scan.entries[entry_index])
        if scan.fault:
            raise BadSample(name, f"{shown_name(tar)}: {scan.fault}")
        origin = "it had when it was opened" if is_tar(self.name) else f"{SHARD_LIST_FILE} says"
        counts = f"{len(scan.entries)} samples, and {origin} {self.sample_counts[shard]}"
        raise BadSample(name, f"{shown_name(tar)} has {counts}")

    def _list_matching_tars(self, pattern: str) -> tuple[list[str], list[int]]:
        """Return the tar files of a pattern and their numbers of samples; record their faults."""
        tars, counts = expand_shard_pattern(pattern), []
        left_out: Counter[str] = Counter()
        for tar, summary in zip(tars, load_summaries(self.name, tars), strict=True):
            count, left_out_of_tar, fault = summary
            counts.append(count)
            left_out += left_out_of_tar
            if fault:  # counts as one bad sample, the last
                bad = BadSample(
                    f"{Path(shown_name(tar)).name} {count - 1}", f"{shown_name(tar)}: {fault}"
                )
                self._truncated_samples.append(bad.with_origin(self.name, sum(counts)))
        if not sum(counts):
            others = f"; it holds {_describe_left_out(left_out)}" if left_out else ""
            raise UserError(
                f"data {self.name}: holds no samples (KEY.jpg, KEY.txt, KEY.json){others}"
            )
        self.notes += [f"left out: {count} {kind}" for kind, count in left_out.items()]
        return tars, counts


def _describe_left_out(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in left_out.items())


@functools.lru_cache(maxsize=CACHED_INDEXES)
def _cached_index(tar: str, tar_stamp: FileStamp | None) -> TarScan | str:
    """Return the index of a tar file with that stamp, or why READ_TRIES attempts did not read it.

    While a file is as it was, what it holds is not tried again. Where the system refused to read
    it, or of a URL, the error is raised, and the next sample tries anew.
    """
    for attempt in range(READ_TRIES):
        try:
            return load_shard_index(tar)
        except UserError as error:
            problem = error
        if attempt < READ_TRIES - 1:
            time.sleep(RETRY_SECONDS)
    if tar_stamp is None or isinstance(problem.__cause__, OSError):
        raise problem
    return str(problem)


def _make_sample(tar: str, entry: ShardEntry) -> Sample:
    """Return the sample of an entry: a record in LLaVA's format, or an image and its caption."""
    members = entry.members
    name = f"{Path(shown_name(tar)).name}/{entry.key}"
    try:
        record = {}
        if "json" in members:
            record = parse_json(read_member(tar, *members["json"]), unique_keys)
    except UserError as error:
        raise BadSample(name, str(error)) from error
    except ValueError as error:
        raise BadSample(name, f"its json cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise BadSample(name, "its json is not a mapping")
    image_suffixes = sorted(filter(is_image_member, members), key=_natural_sort_key)
    unread_texts = [suffix for suffix in CAPTION_NAMES if suffix in members]
    if not has_turns(record):
        metadata = {
            key: value for key, value in record.items() if key not in (*CAPTION_NAMES, *IMAGE_KEYS)
        }
        turns, unread_texts = _caption_turns(name, tar, entry, record, image_suffixes)
        record = {**metadata, "id": entry.key, "conversations": turns}
    if not names_images(record):  # then it has all images of its key
        record = {key: value for key, value in record.items() if key not in IMAGE_KEYS}
        stem = entry.key.rpartition("/")[2]
        names = [f"{stem}.{suffix}" for suffix in image_suffixes]
        record |= {"image": names} if names else {}
    images = {
        suffix: TarImage(tar, f"{entry.key}.{suffix}", *location)
        for suffix, location in members.items()
    }
    sample = sample_from_record(record, name, ShardImageNames(name, entry.key, images).find)
    used_names = {image.name for image in sample.images}
    unread = [suffix for suffix in image_suffixes if images[suffix].name not in used_names]
    return replace(sample, unread_keys=(*sample.unread_keys, *unread, *unread_texts))


def _natural_sort_key(suffix: str) -> str:
    """Return a key that sorts 2.jpg before 10.jpg."""
    number, _, rest = suffix.partition(".")
    return f"{number:0>9}.{rest}"


def _caption_turns(
    sample_name: str, tar: str, entry: ShardEntry, record: dict[str, Any], image_suffixes: list[str]
) -> tuple[list[dict[str, str]], list[str]]:
    """Return the turns of an image with a caption, from a key of its json or a text member.

    Returns:
        The two turns, and the names of other texts, which are not the caption.
    """
    if len(image_suffixes) != 1:
        listed = ", ".join(image_suffixes)
        images = f"{len(image_suffixes)} images ({listed})" if image_suffixes else "no image"
        raise BadSample(
            sample_name,
            f"has {images}; a caption belongs to one (members: {_shorten_list(entry.members)})",
        )
    texts = [(name, record[name]) for name in CAPTION_NAMES if isinstance(record.get(name), str)]
    try:
        for name in CAPTION_NAMES:
            if name in entry.members:
                texts.append((name, read_member(tar, *entry.members[name]).decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        reason = f"its {name} is not UTF-8 text (byte {error.start + 1})"
        raise BadSample(sample_name, reason) from error
    except UserError as error:
        raise BadSample(sample_name, str(error)) from error
    caption = next((text.strip() for _, text in texts if text.strip()), "")
    if not caption:
        raise BadSample(sample_name, _missing_caption_reason(entry, record, bool(texts)))
    key = next(key for key, text in texts if text.strip())
    if problem := caption_problem(record, key, caption):
        raise BadSample(sample_name, problem)
    unread_texts = [name for name, text in texts if text.strip() not in ("", caption)]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
    return turns, unread_texts


def _missing_caption_reason(entry: ShardEntry, record: dict[str, Any], has_empty_text: bool) -> str:
    """Return why an image has no caption."""
    if has_empty_text:
        return "its text is empty"
    keys = f"; keys of its json: {_shorten_list(record)}" if "json" in entry.members else ""
    return (
        f"has no text: expected a member .txt, .caption or .text, or a json with a key of that "
        f"name or with conversations (members: {_shorten_list(entry.members)}{keys})"
    )


def _shorten_list(names: Collection[str]) -> str:
    return list_some(list(names), 8)


def _check_opens(tar: str) -> None:
    """Raise a UserError for a shard that cannot be opened."""
    problem = _open_failure(tar)
    if problem:
        raise UserError(f"{shown_name(tar)}: {problem}")


@functools.lru_cache(maxsize=1 << 16)
def _open_failure(tar: str) -> str:
    """Return why a shard cannot be opened after READ_TRIES attempts, "" if it can.

    One that is not there, may not be read or is no file is not tried again. Where a disk or a
    server failed, the UserError is raised, and the next sample tries anew.
    """
    has_failed = False
    for attempt in range(READ_TRIES):
        try:
            if is_url(tar):
                read_byte_range(tar, 0, 1)
                return ""
            with open_regular(tar):
                return ""
        except OSError as error:
            problem = f"cannot be opened in {READ_TRIES} tries ({error.strerror})"
            has_failed = not isinstance(error, FileNotFoundError | PermissionError)
        except UserError as error:
            problem = f"{str(error).removeprefix(f'{shown_name(tar)}: ')}, tried {READ_TRIES} times"
            has_failed = is_url(tar) and not isinstance(error.__cause__, FileNotFoundError)
        if attempt < READ_TRIES - 1:
            time.sleep(RETRY_SECONDS)
    if has_failed:
        raise UserError(f"{shown_name(tar)}: {problem}")
    return problem


def read_member(tar: str, offset: int, size: int, header_crc: int | None = None) -> bytes:
    """Return `size` bytes of a member from `offset` on; a UserError where the file is shorter.

    With `header_crc` the header before them must have that checksum.
    """
    name = shown_name(tar)
    if offset < 0 or not 0 <= size <= MAX_IMAGE_BYTES:
        raise UserError(
            f"{name}: has a member of {size} bytes at byte {offset}; one is read as a whole, so at "
            f"most {format_bytes(MAX_IMAGE_BYTES)} are allowed"
        )
    header_bytes = BLOCK_BYTES if header_crc is not None else 0
    header_offset = offset - header_bytes
    data = _read_tar_range(tar, header_offset, size + header_bytes)
    if len(data) < size + header_bytes:
        raise UserError(f"{name}: is truncated, it ends before byte {offset + size}")
    if header_crc is not None and zlib.crc32(data[:header_bytes]) != header_crc:
        index = shown_name(index_path(tar))
        remedy = "make it anew" if is_url(tar) else "remove it, and it is made anew"
        raise UserError(
            f"{name}: is another file than {index} was made of (byte {header_offset}): {remedy}"
        )
    return data[header_bytes:]


def _read_tar_range(tar: str, offset: int, size: int) -> bytes:
    _check_opens(tar)
    try:
        if is_url(tar):
            return read_byte_range(tar, offset, size)
        with open_regular(tar) as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UserError(f"{shown_name(tar)}: cannot be read ({error.strerror})") from error
