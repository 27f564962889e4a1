"""WebDataset shards: tar files whose samples are reached by number, through an index beside each.

    FOLDER/
        shards.json        the shards in order, with their numbers of samples
        000000.tar         KEY.json (a record of LLaVA's), KEY.0.jpg, KEY.1.jpg ...
        000000.tar.index   what the tar file holds: see shard_index

`pack` writes them. Other tar files of the WebDataset kind (KEY.jpg and KEY.txt or KEY.json) are
read as well: an index is made of them once, which takes reading their headers. The folder may be a
URL: a sample is then read with a request for its bytes alone.
"""

from __future__ import annotations

import functools
import json
import time
import zlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from PIL import Image

from vlbench.data.conversation_record import IMAGE_KEYS, TURN_KEYS, sample_from_record
from vlbench.data.image_processing import open_image_bytes
from vlbench.data.remote_shards import file_exists, is_url, read_byte_range, read_json_file
from vlbench.data.sample import Sample
from vlbench.data.shard_index import (
    BLOCK_BYTES,
    CAPTION_NAMES,
    IMAGE_EXTENSIONS,
    FileStamp,
    ShardEntry,
    TarScan,
    file_stamp,
    index_path,
    load_shard_index,
    load_shard_summary,
)
from vlbench.data.shard_sampler import ShardShuffle
from vlbench.errors import BadSample, UserError

SHARD_LIST_FILE = "shards.json"
CACHED_INDEXES = 64  # indexes that are kept in memory: of about as many shards as are read in turn
READ_TRIES, RETRY_SECONDS = (
    3,
    1.0,
)  # how often a shard that cannot be read is tried, and seconds in between


@dataclass(frozen=True)
class TarImage:
    """A picture inside a tar file."""

    tar: str
    member_name: str
    """Its name in the tar file."""
    offset: int
    size: int
    header_crc: int | None = None
    """Of its header, see `Place`."""

    @property
    def name(self) -> str:
        """Name shard and file."""
        return f"{self.tar}: {self.member_name}"

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a Mistake that names shard and file."""
        return open_image_bytes(self._read_bytes(), self.name)

    def open_draft(self, draft_side: int) -> Image.Image:
        """Return it in RGB; a JPEG may be decoded smaller, its longest edge >= `side`."""
        return open_image_bytes(self._read_bytes(), self.name, draft_side)

    def _read_bytes(self) -> bytes:
        return read_member(self.tar, self.offset, self.size, self.header_crc)


class WebDatasetShards:
    """The samples of shards as a source: a folder with shards.json, or a pattern of tar files."""

    def __init__(self, location: str | Path) -> None:
        """Find the shards: `where` is a folder that `pack` wrote, or `dir/{000000..000123}.tar`.

        Both may be URLs. `notes` says what is left out of tar files that are in no list, a line
        for each kind of it.
        """
        self.name = str(location)
        self.notes: list[str] = []
        self._torn_samples: list[BadSample] = []
        listed = _read_shard_list(self.name)
        self.tars, self.sample_counts = listed or self._list_matching_tars()
        self._shard_ends = np.cumsum(self.sample_counts)
        self._pass_orders: dict[str, ShardShuffle] = {}

    def __len__(self) -> int:
        return int(self._shard_ends[-1])

    def torn_samples(self) -> list[BadSample]:
        """Return a bad sample for each tar file in no list that was not read to its end."""
        return self._torn_samples

    def pass_order(self, shuffle_key: str) -> ShardShuffle:
        """Return the order of a pass over the samples, which reads shards in turn."""
        if shuffle_key not in self._pass_orders:
            self._pass_orders = {shuffle_key: ShardShuffle(self.sample_counts, shuffle_key)}
        return self._pass_orders[shuffle_key]

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index` (from 0), or raise BadSample."""
        shard = int(self._shard_ends.searchsorted(index, side="right"))
        tar = self.tars[shard]
        place = index - (int(self._shard_ends[shard - 1]) if shard else 0)
        name = f"{Path(tar).name} {place}"
        problem = _open_failure(tar)
        if problem:
            raise BadSample(name, f"{tar}: {problem}")
        try:
            found = _cached_index(tar, file_stamp(tar))
        except UserError as mistake:
            raise BadSample(name, str(mistake)) from mistake
        if place < len(found.entries):
            return _make_sample(tar, found.entries[place])
        said = "it had when it was opened" if is_tar(self.name) else f"{SHARD_LIST_FILE} says"
        told = f"{tar} has {len(found.entries)} samples, and {said} {self.sample_counts[shard]}"
        raise BadSample(name, f"{tar}: {found.fault}" if found.fault else told)

    def _list_matching_tars(self) -> tuple[list[str], list[int]]:
        """Return the tar files of a pattern and their numbers of samples, and note their faults."""
        tars, counts = _expand_pattern(self.name), []
        left_out: Counter[str] = Counter()
        for tar in tars:
            count, some, fault = load_shard_summary(tar)
            counts.append(count)
            left_out += some
            if fault:
                bad = BadSample(f"{Path(tar).name} {count - 1}", f"{tar}: {fault}")
                self._torn_samples.append(
                    bad.with_origin(self.name, sum(counts))
                )  # its last sample
        if not sum(counts):
            other = f"; it holds {_describe_left_out(left_out)}" if left_out else ""
            raise UserError(
                f"data {self.name}: holds no samples (KEY.jpg, KEY.txt, KEY.json){other}"
            )
        self.notes += [f"left out: {count} {what}" for what, count in left_out.items()]
        return tars, counts


def _describe_left_out(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in left_out.items())


@functools.lru_cache(maxsize=CACHED_INDEXES)
def _cached_index(tar: str, tar_stamp: FileStamp | None) -> TarScan:
    """Return what a tar file holds, `of` that stamp; one that cannot be read is tried again."""
    for _ in range(READ_TRIES - 1):
        try:
            return load_shard_index(tar)
        except UserError:
            time.sleep(RETRY_SECONDS)
    return load_shard_index(tar)


def is_tar(name: str) -> bool:
    """Tell whether a file's name is that of a tar file, one that is compressed included."""
    return name.lower().endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def _read_shard_list(location: str) -> tuple[list[str], list[int]] | None:
    """Return the tar files of a folder's list and their numbers of samples; None for tar files."""
    if is_tar(location):
        return None
    file = f"{location.rstrip('/')}/{SHARD_LIST_FILE}"
    if not file_exists(file):
        raise UserError(
            f"data {location}: holds no {SHARD_LIST_FILE}; give a folder that `pack` wrote, or "
            "tar files as "
            "dir/{000000..000123}.tar"
        )
    told = read_json_file(file)
    shards = told.get("shards") if isinstance(told, dict) else None
    if not isinstance(shards, list) or not all(_is_shard(one) for one in shards) or not shards:
        raise UserError(f"{file}: is not a list of shards with file and samples")
    files = [file.removesuffix(SHARD_LIST_FILE) + one["file"] for one in shards]
    return files, [one["samples"] for one in shards]


def _expand_pattern(pattern: str) -> list[str]:
    """Return the tar files of a pattern, which are all there."""
    try:
        tars = list(braceexpand(pattern))
    except ValueError:  # UnbalancedBracesError
        what = "a brace without its other one; expected dir/{000000..000123}.tar"
        raise UserError(f"data {pattern}: {what}") from None
    missing = [tar for tar in tars if not file_exists(tar)]
    if missing:
        raise UserError(f"data {pattern}: there is no {missing[0]} ({len(missing)} are missing)")
    return tars


def _is_shard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("file"), str)
        and value.get("samples", 0) > 0
    )


def _make_sample(tar: str, entry: ShardEntry) -> Sample:
    """Make the sample of an entry: a record of LLaVA's, or a picture and its caption."""
    members = entry.members
    name = f"{Path(tar).name}/{entry.key}"
    try:
        record = json.loads(read_member(tar, *members["json"])) if "json" in members else {}
    except UserError as mistake:
        raise BadSample(name, str(mistake)) from mistake
    except (ValueError, RecursionError) as error:
        raise BadSample(name, f"its json cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise BadSample(name, "its json is no mapping")
    kinds = sorted((kind for kind in members if _is_image_member(kind)), key=_natural_sort_key)
    texts = [kind for kind in CAPTION_NAMES if kind in members]
    if not any(key in record for key in TURN_KEYS):
        others = {
            key: value for key, value in record.items() if key not in (*CAPTION_NAMES, *IMAGE_KEYS)
        }
        turns, texts = _caption_turns(name, tar, entry, record, kinds)
        record = {**others, "id": entry.key, "conversations": turns}
    if not _has_image_names(record):  # pictures of a key are its own
        record = {key: value for key, value in record.items() if key not in IMAGE_KEYS}
        record |= {"image": kinds} if kinds else {}
    pictures = {kind: TarImage(tar, f"{entry.key}.{kind}", *at) for kind, at in members.items()}
    sample = sample_from_record(record, name, lambda file: _find_image(pictures, file, name))
    shown = {picture.name for picture in sample.images}
    unread = [kind for kind in kinds if pictures[kind].name not in shown] + texts
    return replace(sample, unread_keys=(*sample.unread_keys, *unread))


def _has_image_names(record: dict[str, Any]) -> bool:
    """Tell whether a record says itself which pictures it has, in a key or in parts of a turn."""
    turns = record.get("messages")
    parts = turns if isinstance(turns, list) else []
    return any(record.get(key) for key in IMAGE_KEYS) or any(
        isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in parts
    )


def _is_image_member(suffix: str) -> bool:
    return suffix.split(".")[-1] in IMAGE_EXTENSIONS


def _natural_sort_key(suffix: str) -> str:
    """Return what sorts 2.jpg before 10.jpg."""
    number, _, rest = suffix.partition(".")
    return f"{number:0>9}.{rest}"


def _find_image(tar_images: dict[str, TarImage], image_name: str, sample_name: str) -> TarImage:
    """Return the picture that a record calls `file`: KEY.jpg, jpg or with any folders before it."""
    base = image_name.replace("\\", "/").rpartition("/")[2].lower()
    for kind in (base, base.partition(".")[2], base.rpartition(".")[2]):
        if kind in tar_images:
            return tar_images[kind]
    has = (
        ", ".join(one.member_name for kind, one in tar_images.items() if _is_image_member(kind))
        or "none"
    )
    raise BadSample(sample_name, f"its shard has no picture {image_name} (its pictures: {has})")


def _caption_turns(
    sample_name: str, tar: str, entry: ShardEntry, record: dict[str, Any], image_suffixes: list[str]
) -> tuple[list[dict[str, str]], list[str]]:
    """Return the turns of a picture with a caption: of a key of its json, or a text member.

    The second is where other texts are that are not the caption.
    """
    if len(image_suffixes) != 1:
        what = (
            f"has {len(image_suffixes)} pictures ({', '.join(image_suffixes)})"
            if image_suffixes
            else "has no picture"
        )
        raise BadSample(
            sample_name,
            f"{what}; a caption belongs to one (members: {_shorten_list(entry.members)})",
        )
    texts = [(kind, record[kind]) for kind in CAPTION_NAMES if isinstance(record.get(kind), str)]
    try:
        for kind in CAPTION_NAMES:
            if kind in entry.members:
                texts.append((kind, read_member(tar, *entry.members[kind]).decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        what = f"its {kind} is not UTF-8 text (byte {error.start + 1})"
        raise BadSample(sample_name, what) from error
    except UserError as mistake:
        raise BadSample(sample_name, str(mistake)) from mistake
    caption = next((text.strip() for _, text in texts if text.strip()), "")
    if not caption:
        raise BadSample(sample_name, _missing_caption_reason(entry, record, bool(texts)))
    other = [kind for kind, text in texts if text.strip() not in ("", caption)]
    return [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}], other


def _missing_caption_reason(entry: ShardEntry, record: dict[str, Any], has_empty_text: bool) -> str:
    """Say why a picture has no caption."""
    if has_empty_text:
        return "its text is empty"
    said = f"; keys of its json: {_shorten_list(record)}" if "json" in entry.members else ""
    return (
        f"has no text: expected a member .txt, .caption or .text, or a json with a key of that "
        f"name or with conversations (members: {_shorten_list(entry.members)}{said})"
    )


def _shorten_list(names: Collection[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(list(names)[:8]) + more


@functools.lru_cache(maxsize=1 << 16)
def _open_failure(tar: str) -> str:
    """Say why a shard cannot be opened, "" if it can; asked once, and then again a few times."""
    for number in range(READ_TRIES):
        try:
            if is_url(tar):
                read_byte_range(tar, 0, 1)
                return ""
            with open(tar, "rb"):
                return ""
        except OSError as error:
            problem = f"cannot be opened in {READ_TRIES} tries ({error.strerror})"
        except UserError as mistake:
            problem = f"{str(mistake).removeprefix(f'{tar}: ')}, tried {READ_TRIES} times"
        if number < READ_TRIES - 1:
            time.sleep(RETRY_SECONDS)
    return problem


def read_member(tar: str, offset: int, size: int, header_crc: int | None = None) -> bytes:
    """Return `size` bytes of a member from `offset` on; a Mistake where they are not there.

    With `crc` the header before them must have that checksum.
    """
    head = BLOCK_BYTES if header_crc is not None else 0
    data = _read_tar_range(tar, offset - head, size + head)
    if len(data) < size + head:
        raise UserError(f"{tar}: is torn, it ends before byte {offset + size}")
    if header_crc is not None and zlib.crc32(data[:head]) != header_crc:
        help_ = "make it anew" if is_url(tar) else "remove it, and it is made anew"
        raise UserError(
            f"{tar}: is another file than {index_path(tar)} was made of (byte {offset - head}): "
            f"{help_}"
        )
    return data[head:]


def _read_tar_range(tar: str, offset: int, size: int) -> bytes:
    problem = _open_failure(tar)
    if problem:
        raise UserError(f"{tar}: {problem}")
    try:
        if is_url(tar):
            return read_byte_range(tar, offset, size)
        with open(tar, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror})") from error
